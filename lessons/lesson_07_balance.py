r"""
Lesson 7 · Balance: a router collapses, and what brings it back
===============================================================

**The question.** Nothing in the layer of lesson 6 asks the router to use all its experts. What happens if nobody does,
and how can a loss, or something better than a loss, make it share out the work?

An expert that is chosen learns, and what has learned is chosen more. We provoke that, live, until one of eight experts
is among every token's two and others hardly work. Then we derive the Switch loss, which spreads the load, look hard at
what its value means, and at three losses in circulation that do not balance. The z-loss, capacity, a bias and expert
choice follow, each in a few lines, the last with its leak from the future. The same contest at the size of a small
language model is a committed record.

**You need** lessons 5 and 6: the router's gradient reaches only the experts that were chosen. On paper, with numbers
worked by hand: :doc:`/math/balance`.
"""

# %%
# Collapse, live
# --------------
# A toy that can be watched: N tokens of width D, of eight kinds, each kind to be mapped by a matrix of its own; and a
# layer of E = 8 small experts of hidden width F, k = 2 of them for a token. The tokens share one direction, as the
# hidden states of a language model do, so that a row of the gate can raise its logit for *all* of them. And six
# experts start with their three matrices at 0.3 of the size, so that they put out about 0.03 as much. That is to
# *provoke* a collapse, which mere chance brings about slowly or not at all: take the handicap away, or another seed,
# and see.
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tinymoe
from tinymoe.reference import (
    Variation,
    drop_overflow,
    expert_choice,
    expert_load,
    hf_load_balancing_loss,
    moe,
    moe_backward,
    route,
    softmax,
    switch_loss,
    switch_loss_backward,
    varied_moe,
    z_loss,
    z_loss_backward,
)

LINE = "def add(a, b): return a + b"
E, k, D, F, N = 8, 2, 16, 8, 256
kinds = np.random.default_rng(0)
centres, maps = kinds.standard_normal((8, D)), kinds.standard_normal((8, D, D)) / D**0.5
shared = D - 1
centres[:, shared] = 2


def batch(rng):
    kind = rng.integers(8, size=N)
    x = centres[kind] + 0.3 * rng.standard_normal((N, D))
    x[:, shared] = 2
    return x, (maps[kind] @ x[:, :, None])[:, :, 0]  # tokens (N, D), and what should come out


def learn(coefficient, steps=2500, rate=0.1):
    """Gradient descent; coefficient(step) is the weight of the balance loss. Return loads (steps, E) and losses."""
    rng = np.random.default_rng(1)
    gate = 0.02 * rng.standard_normal((E, D))
    experts = [0.5 * rng.standard_normal(s) / s[-1] ** 0.5 for s in ((E, F, D), (E, D, F), (E, F, D))]
    for w in experts:
        w[2:] *= 0.3
    rng, loads, losses = np.random.default_rng(2), [], []
    for step in range(steps):
        x, goal = batch(rng)
        y, saved = moe(x, gate, *experts, k)
        load = expert_load(saved.routing.experts, E)
        _, of_balance = switch_loss(saved.routing.logits, load)
        dlogits = switch_loss_backward(coefficient(step), of_balance)
        _, *grads = moe_backward((y - goal) / N, dlogits, saved)
        for w, dw in zip((gate, *experts), grads):
            w -= rate * dw
        loads.append(load)
        losses.append(0.5 * ((y - goal) ** 2).sum(axis=1).mean())
    return np.array(loads), np.array(losses)


alone, losses_alone = learn(lambda step: 0.0)
for step in (0, 100, 500, len(alone) - 1):
    print(f"load at step {step:4}:", alone[step].round(2), f"the busiest has {alone[step].max() * E:.1f} times 1/E")

# %%
# The load f of an expert is its share of the N·k assignments of tokens to experts; its fair share is 1/E. After 500
# steps one expert is among every token's two. That is a half of all assignments, E/k = 4 times its fair share, and no
# expert can have more. The others share the second place unevenly. The task does not mend this by itself: lesson 5
# showed that the gradient of a logit that was not chosen is exactly zero, because the weights are a softmax over the
# chosen k alone. An expert that nobody chooses can come back only if the chosen ones' logits fall below its own. Until
# then its parameters cost memory and do little. And the busiest sets the pace: on eight devices with an expert each,
# seven wait for it.
#
# The Switch loss
# ---------------
# We want the loads even: :math:`\sum_e f_e^2` would measure that, with its minimum at :math:`f_e = 1/E`. But f is a
# count. It has steps, and no gradient. The probabilities have one, and their mean :math:`P_e = \frac1N \sum_n p_{ne}`
# usually moves with f. So let one factor count and the other learn (Fedus et al. 2021, equation 4):
#
# .. math:: L = E \sum_e f_e P_e .
#
# With f taken as given, L is linear in p: :math:`\partial L / \partial p_{ne} = \frac{E}{N} f_e`. Write
# :math:`dp` for :math:`\partial L / \partial p` and :math:`d\ell` for the gradient of the logits. Through the softmax,
# :math:`d\ell_e = p_e (dp_e - \sum_i p_i \, dp_i)`, so
#
# .. math:: d\ell_{ne} = \frac{E}{N} \, p_{ne} \Bigl( f_e - \sum_i f_i \, p_{ni} \Bigr).
#
# The bracket is how much busier an expert is than what this token would meet on average. Busier ones are pushed down,
# idler ones up, *including those that this token did not choose*, whose logits get no other gradient from it. The
# factor p says how strongly: an expert at :math:`p = 10^{-6}` is hardly pulled. So balance from the first step on.


def balance(logits, load):
    p = softmax(logits)
    dlogits = len(load) / len(p) * p * (load - (p @ load)[:, None])
    return len(load) * load @ p.mean(axis=0), dlogits


rng = np.random.default_rng(3)
logits = rng.standard_normal((20, E))
load = expert_load(np.argsort(-logits, axis=1)[:, :k], E)
value, by_hand = balance(logits, load)
measured = np.zeros_like(logits)
for i in np.ndindex(logits.shape):
    h = np.zeros_like(logits)
    h[i] = 1e-5
    measured[i] = (balance(logits + h, load)[0] - balance(logits - h, load)[0]) / 2e-5
of_library, saved = switch_loss(logits, load)
print("by hand against finite differences:", abs(by_hand - measured).max())
assert abs(by_hand - measured).max() < 1e-9
np.testing.assert_allclose(by_hand, switch_loss_backward(1.0, saved), atol=1e-14)
assert abs(value - of_library) < 1e-12

# %%
# What it does to the toy, from the start with a coefficient of 0.3, and from step 500, when the collapse is complete.
# This toy needs a larger coefficient than a language model, where 0.01 is usual and Mixtral's released config has 0.02:
# with 0.02 its busiest expert stays where it is.
early, losses_early = learn(lambda step: 0.3)
late, losses_late = learn(lambda step: 0.3 * (step >= 500))

figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
for axis, loads, name in zip(axes, (alone, early, late), ("no balance loss", "from the start", "from step 500")):
    axis.stackplot(np.arange(len(loads)), loads.T, linewidth=0.2)
    axis.set(title=name, xlabel="step", ylim=(0, 1), xlim=(0, len(loads) - 1))
axes[0].set_ylabel("share of assignments")
figure.suptitle("Eight experts' shares: one takes a half, the most it can; the Switch loss spreads them, if not evenly")
plt.show()
print("loss, mean of 100 steps, and the busiest expert in fair shares:")
runs = {"none": (alone, losses_alone), "early": (early, losses_early), "late": (late, losses_late)}
for name, (loads, losses) in runs.items():
    parts = [
        f"{losses[n - 100 : n].mean():.2f} ({loads[n - 100 : n].mean(axis=0).max() * E:.2f})" for n in (500, 700, 2500)
    ]
    print(f"{name:6} up to step 500: {parts[0]}   700: {parts[1]}   2500: {parts[2]}")
assert early[-100:].mean(axis=0).max() < 0.75 * alone[-100:].mean(axis=0).max()
assert losses_early[-100:].mean() < losses_alone[-100:].mean()

# %%
# Balance costs at first: it pulls at the same gate as the task, and experts that are called in have learned nothing yet
# (the late run's loss more than doubles). Later it pays, since eight kinds of token have more to learn than the few
# busy experts can hold.
#
# In a language model there is much more to learn. The record of ``tinymoe experiment balance`` trains the small model
# on Python's library, 900 steps, with all experts but two starting at a hundredth of their weights, once for each
# remedy:
#
# * the *Switch loss*, coefficient 0.02;
# * the *z-loss*, on the size of the logits; *jitter* and *noisy top-k*, which shake the router's input and its logits
#   at random while it trains; a *capacity*, beyond which an expert takes no more;
# * a *bias* on the selection; and *expert choice*, where experts select tokens.
#
# The last four have sections below.
repository = Path(tinymoe.__file__).parents[1]
record = json.loads((repository / "docs/results/balance.json").read_text())
print("made by:", record["command"], "\n")
print(f"{'':16} busiest expert (worst layer)   held-out loss")
for name, lines in record["numbers"]["methods"].items():
    print(
        f"{name:16} {max(lines[-1]['busiest']):8.2f} x fair                 {lines[-1]['val_loss']:8.3f} nats per byte"
    )

# %%
# One seed: differences of 0.02 in the loss may be chance, and noisy top-k, wholly collapsed, is as good as the Switch
# loss after so few steps. Expert choice's loss is measured on whole texts, from which it knows the future; see below.
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for name, lines in record["numbers"]["methods"].items():
    steps = [line["step"] for line in lines]
    axes[0].plot(steps, [max(line["busiest"]) for line in lines], label=name, linewidth=1.2)
    axes[1].plot(steps[2:], [line["val_loss"] for line in lines[2:]], linewidth=1.2)
axes[0].set(xlabel="step", title="busiest expert of the worst layer, in fair shares")
axes[1].set(xlabel="step", title="held-out loss, nats per byte")
axes[0].legend(fontsize=7, ncols=2)
figure.suptitle("Only what looks at the load, or fixes it, brings the busiest expert down")
plt.show()

# %%
# Noise, jitter and the z-loss, which are often listed as remedies, have no eye for the load. A capacity limits what is
# computed, not what the router wants. The Switch loss and the bias read the load, and expert choice fixes it. For a run
# of your own: the Switch loss at 0.02, as here by default, or the bias (``--bias-update-rate 0.005`` in the record). Be
# alarmed if an expert of any layer stays above twice its fair share, or below a tenth of it.
#
# What its value says
# -------------------
# * If f is uniform, :math:`L = E \cdot \frac1E \sum_e P_e = 1`, whatever P is; if P is uniform, 1 too, whatever f is.
# * If all tokens take the same k, which have all of the probability, then :math:`f = 1/k` for these k, and
#   :math:`L = E \cdot \frac1k \sum_e P_e = E/k`.
# * **Balance is not its minimum.** Two experts, top-1; 60 % of the tokens at p = (0.51, 0.49), the others at
#   (0.01, 0.99). Then f = (0.6, 0.4) and P = (0.31, 0.69):
two = np.log(np.repeat([[0.51, 0.49], [0.01, 0.99]], [6, 4], axis=0))
below, by_token = balance(two, np.array([0.6, 0.4]))
even, slope = balance(logits, np.full(E, 1 / E))
certain = np.tile(np.where(np.arange(E) < k, 0.0, -999), (5, 1))
print(f"uniform f: {even:.3f}, and its largest gradient is {abs(slope).max():.0e}")
print(f"collapsed: {balance(certain, np.where(np.arange(E) < k, 1 / k, 0))[0]:.3f} = E/k")
print(f"uneven:    {below:.3f}, with a gradient of the busier expert's logit of {by_token[[0, -1], 0].round(4)}")
assert abs(even - 1) < 1e-12
assert abs(below - 0.924) < 1e-12
assert (by_token[:, 0] > 0).all()  # descending lowers expert 0, the busier

# %%
# Since both f and P sum to one, :math:`L - 1 = E \sum_e (f_e - \frac1E)(P_e - \frac1E)`: below 1 where experts with
# more than their share of the choices have less than their share of the probability. The value is no distance from
# balance, and "it has fallen below 1" is no success. The *gradient* has the right direction here as well: it takes
# from the busier expert, and is zero if f is uniform.
#
# Broken on purpose: three losses that do not balance
# ---------------------------------------------------
# All three are in circulation.
#
# 1. The load as ``(probs > 0)``. A softmax is never zero, so every expert is counted for every token.
# 2. The variance of the probabilities, over tokens and experts together. It looks at how undecided each token is, not
#    at where the tokens go.
# 3. The Switch loss of all layers' tokens in one heap.
#
# For the first two take three routers: balanced and confident (the chosen have nearly all of the probability);
# collapsed and confident; collapsed by a hair, nearly uniform.


def positive_load(logits, load):
    return balance(logits, (softmax(logits) > 0).mean(axis=0))


def variance(logits, load):
    p = softmax(logits)
    dp = 2 * (p - 1 / p.shape[1]) / p.size
    return p.var(), p * (dp - (p * dp).sum(axis=1, keepdims=True))


some = rng.standard_normal((400, E))
head_start = np.repeat([1.0, 0.0], [k, E - k])
routers = {
    "balanced, confident": 4 * some,
    "collapsed, confident": some + 8 * head_start,
    "collapsed, nearly uniform": 0.02 * some + 0.2 * head_start,
}
print(f"{'':26} busiest   Switch loss    probs > 0    variance    (value, and length of its gradient)")
for name, of_router in routers.items():
    load = expert_load(np.argsort(-of_router, axis=1, kind="stable")[:, :k], E)
    told = [loss(of_router, load) for loss in (balance, positive_load, variance)]
    columns = "  ".join(f"{value:5.3f} {np.linalg.norm(gradient):.0e}" for value, gradient in told)
    print(f"{name:26} {load.max() * E:5.2f}   {columns}")
    assert np.linalg.norm(told[1][1]) < 1e-15

# %%
# The loss with (probs > 0) is E for all three, with no gradient: it is a constant. The variance calls the third router,
# which sends everything to two experts, nearly perfect, and the collapsed confident one better than the balanced one.
# Look at the Switch loss, too: barely above 1 at the nearly uniform collapse; and where the collapse is confident its
# gradient is smaller than what counting noise gives a balanced router, by that factor p. What 2000 steps down each loss
# do to a gate that makes such logits of random inputs is in the record; the busiest expert, in fair shares:
print(f"{'':26} {'Switch loss':>17} {'probs > 0':>17} {'variance':>17}")
for name, losses in record["numbers"]["losses"].items():
    cells = [f"{of['busiest_before']:.2f} -> {of['busiest_after']:.2f}" for of in losses.values()]
    print(f"{name:26}", *(f"{cell:>17}" for cell in cells))


# %%
# (probs > 0) leaves every router as it was. The variance makes the confident collapse worse, and mends the other in
# part.
#
# **3. All layers in one heap.** transformers concatenates all layers' tokens before it counts and multiplies (and
# counts f per token, so that its balanced value is k, and its largest E). Four layers, each collapsed onto two of
# eight experts:
def collapsed_onto(*pairs):
    return [20.0 * np.tile(np.isin(np.arange(E), pair), (10, 1)) for pair in pairs]


different, same = collapsed_onto((0, 1), (2, 3), (4, 5), (6, 7)), collapsed_onto(*4 * [(0, 1)])
apart = [switch_loss(z, expert_load(np.argsort(-z, axis=1, kind="stable")[:, :k], E))[0] for z in different]
print(f"in one heap, on different experts: {hf_load_balancing_loss(different, k):.3f}, which is k: balanced")
print(f"in one heap, on the same ones:     {hf_load_balancing_loss(same, k):.3f}, which is E")
print(f"layer by layer, either way:        {', '.join(f'{loss:.3f}' for loss in apart)}, which is E/k: collapsed")
assert abs(hf_load_balancing_loss(different, k) - k) < 1e-6
assert abs(hf_load_balancing_loss(same, k) - E) < 1e-6
assert all(abs(loss - E / k) < 1e-6 for loss in apart)

# %%
# The z-loss
# ----------
# Another loss on the same logits, for another purpose (ST-MoE, equation 5): :math:`\frac1N \sum_n z_n^2` with
# :math:`z = \log \sum_e e^{\ell_e}`. Large logits round badly in bfloat16 and make softmax saturate. Since
# :math:`\partial z / \partial \ell_e = p_e`, its gradient is :math:`\frac2N z \, p_e`: where z > 0 a step against it
# lowers all logits of a token, the largest most. It does not look at the load.
value, saved = z_loss(logits)
np.testing.assert_allclose(
    z_loss_backward(1.0, saved),
    2 / len(logits) * np.log(np.exp(logits).sum(axis=1, keepdims=True)) * softmax(logits),
    atol=1e-14,
)
down = logits - z_loss_backward(1.0, saved)
print(
    f"z-loss {value:.3f} -> {z_loss(down)[0]:.3f} after a step against its gradient; tokens that choose otherwise:",
    end=" ",
)
print((np.sort(np.argsort(-down)[:, :k]) != np.sort(np.argsort(-logits)[:, :k])).any(axis=1).sum())
assert z_loss(down)[0] < value

# %%
# Capacity
# --------
# A device that waits for the busiest expert may set a limit: with a factor c an expert takes at most
# :math:`\lceil c \cdot Nk/E \rceil` assignments, first choices first, and what overflows is dropped: a token that
# loses one of its two experts gets the other's output with the weight it had, and one that loses both is carried on by
# the residual stream alone. So watch the share that is dropped; it depends on how uneven the router is. Mixtral has no
# limit.
for name, of_router in routers.items():
    experts = np.argsort(-of_router, axis=1, kind="stable")[:, :k]
    dropped = []
    for factor in (1.0, 1.25, 2.0, 4.0):
        kept = drop_overflow(experts, E, math.ceil(factor * len(experts) * k / E))
        dropped.append(f"c = {factor}: {(kept < 0).mean():4.0%}")
    print(f"{name:26} dropped at", ", ".join(dropped))

# %%
# A bias for the selection only
# -----------------------------
# A balance loss pulls at the same weights as the task. Wang et al. 2024 (and DeepSeek-V3, which keeps only a tiny loss
# beside) give each expert a bias that is added to its score **where the k largest are chosen**, and nowhere else. After
# each step it moves by γ, up for experts below their fair share, down for those above: a controller. No gradient could
# do it, since the bias acts through a choice alone. On a router that stays as it is, collapsed by a hair, with γ =
# 0.0005:
gate, pull = np.eye(E), 0.02 * some + 0.2 * head_start
bias, busiest = np.zeros(E), []
for _ in range(300):
    (mixing, experts, _), _ = route(pull, gate, k, bias=bias)
    load = expert_load(experts, E)
    busiest.append(load.max() * E)
    bias += 0.0005 * np.sign(1 / E - load)  # γ
expected = softmax(np.take_along_axis(pull, experts, axis=1))
print(f"busiest: {busiest[0]:.2f} -> {busiest[100]:.2f} -> {busiest[-1]:.2f}; the bias: {bias.round(3)}")
np.testing.assert_allclose(mixing, expected, rtol=1e-12)  # the weights know nothing of it
assert busiest[-1] < 1.3 < busiest[0]

# %%
# A step of fixed size overshoots, so it does not end at 1.00: a smaller γ comes closer, and takes longer. The weights
# are those of the unbiased scores. Were the bias in them as well, an expert would speak louder for being unpopular.
#
# Expert choice, and its leak
# ---------------------------
# Turn the question around: each *expert* takes the :math:`\lceil cNk/E \rceil` tokens that give it the highest
# probability. The load is even by construction, and a token may get none or all. But whether an expert takes a token
# depends on who else applies, and that includes tokens that come **later**. There is no attention here, so with a
# causal router each output would depend on its own token alone. Change the last byte of the line, and look at the
# earlier ones:
table = rng.standard_normal((256, D))
gate = rng.standard_normal((E, D)) / D**0.5
weights = [rng.standard_normal(s) / D**0.5 for s in ((E, F, D), (E, D, F), (E, F, D))]


def outputs(line, by_experts):
    x = table[np.frombuffer(line.encode(), np.uint8)]
    return varied_moe(x, gate, *weights, k, Variation(by_experts=by_experts))[0]


changed = {}
for by_experts in (False, True):
    moved = abs(outputs(LINE, by_experts) - outputs(LINE[:-1] + "!", by_experts)).max(axis=1)[:-1]
    changed[by_experts] = [n for n in range(len(LINE) - 1) if moved[n] > 1e-12]
    print("experts choose:" if by_experts else "tokens choose: ", f"{len(changed[by_experts])} earlier tokens changed")
assert not changed[False]
assert changed[True]

routing, _ = expert_choice(table[np.frombuffer(LINE.encode(), np.uint8)], gate, math.ceil(len(LINE) * k / E))
figure, axis = plt.subplots(figsize=(9, 2.4), layout="constrained")
axis.imshow((routing.experts >= 0).T, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
for n in changed[True]:
    axis.axvline(n, color="C3", linewidth=2)
axis.set_xticks(range(len(LINE)), [c if c != " " else "␣" for c in LINE], family="monospace")
axis.set(yticks=range(E), ylabel="expert")
axis.set_title("Expert choice: equal rows, unequal columns; red: tokens that noticed a change of the last byte")
plt.show()

# %%
# The later byte took a place from an earlier token, or made room for one. A model trained so has seen a little of the
# future, and when it generates, later tokens do not exist yet.
#
# Remember
# --------
# * Once some experts are ahead, nothing in the task brings the others back: a logit that is not chosen gets no
#   gradient. The Switch loss gives it one.
# * :math:`L = E \sum f P`, f counted and constant, P learned: 1 at balance, E/k at a confident collapse, barely above
#   1 at a nearly uniform one, sometimes below. Watch the load of every layer, not the loss.
# * A balance loss must read the *decisions*, and layer by layer: (probs > 0), the variance and the heap do not.
# * The z-loss keeps logits small, a capacity drops what is too much; neither balances.
# * A bias that only selects needs no gradient. Expert choice balances by construction, and is not causal.
#
# **Ask yourself.** (a) What is the load of an expert at collapse with E = 8, k = 2, in fair shares? (b) Why can f
# have no gradient? (c) What is L when f is uniform and P is not? (d) Which experts get a gradient from the Switch
# loss that get none from the task? (e) An expert's probability has fallen to :math:`10^{-6}`: how strongly does the
# loss pull it back? (f) Why is the variance of probabilities blind to collapse? (g) What does the z-loss do to the
# load? (h) c = 1 and the router sends all to two of eight experts, k = 2: how much is dropped? (i) Where does the
# selection bias enter, where not? (j) Why may expert choice not be used to write?
#
# Exercises
# ---------
# 1. With f fixed, how small can L become, and where is P then? Check with f = (0.5, 0.3, 0.2, 0).
# 2. Split a batch over two workers, in equal parts. Show that the Switch loss of the whole is the mean of both parts'
#    if both use the load *of the whole batch*, and in general not if each uses its own.
# 3. Show that rows of :math:`d\ell` sum to zero for the Switch loss, but not for the z-loss. What does that say of what
#    each can change?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) E/k = 4; (b) it counts choices, which are steps of the logits; (c) 1; (d) those that were not
# chosen; (e) by a factor of :math:`10^{-6}`, hardly: prevention works better than cure; (f) it averages over tokens
# how far each row is from uniform, and not where the rows point; (g) it does not look at it; (h) two experts take N·k/8
# pairs each, a quarter of all, so 75 %; (i) in the selection, not in the weights; (j) what an earlier token gets
# depends on tokens that are not written yet.
#
# 1. L is linear in P, so its least value puts all probability on the idlest expert: :math:`E \min_e f_e`, here 0. But
#    then that expert would be chosen, and f would not be what it is: f and P come of the same logits, and such lows
#    are not met.
few = np.array([0.5, 0.3, 0.2, 0.0])
assert balance(np.tile([0.0, 0, 0, 99], (5, 1)), few)[0] < 1e-9
assert balance(np.tile([0.0, 0, 99, -99], (5, 1)), few)[0] > 0.79

# %%
# 2. Given f, L is a mean over tokens, and means of equal parts average. With each part's own f it is another number:
#    a product of means is not the mean of products.
halves = logits[:10], logits[10:]
loads = [expert_load(np.argsort(-z, axis=1)[:, :k], E) for z in (logits, *halves)]
whole = balance(logits, loads[0])[0]
assert abs(np.mean([balance(z, loads[0])[0] for z in halves]) - whole) < 1e-12
assert abs(np.mean([balance(z, f)[0] for z, f in zip(halves, loads[1:])]) - whole) > 1e-3

# %%
# 3. :math:`\sum_e p_e (f_e - \sum_i f_i p_i) = 0`, since the p sum to one; :math:`\sum_e 2 z p_e / N = 2z/N`. The
#    Switch loss cannot shift all logits of a token together, only against each other; the z-loss shifts them, and
#    against each other as well, the largest most.
assert abs(balance(logits, loads[0])[1].sum(axis=1)).max() < 1e-15
z = np.log(np.exp(logits).sum(axis=1))
np.testing.assert_allclose(z_loss_backward(1.0, z_loss(logits)[1]).sum(axis=1), 2 * z / len(z))

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 8 </lessons/lesson_08_model>` stacks layers to the whole model, and counts its 46.7 billion
# parameters by hand.
