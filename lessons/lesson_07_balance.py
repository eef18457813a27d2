r"""
Lesson 7 · Balance: a router collapses, and what brings it back
===============================================================

**The question.** Nothing in the layer of lesson 6 asks the router to use all its experts. What happens if nobody does,
and how can a loss, or something better than a loss, make it share out the work?

An expert that is chosen learns, and what has learned is chosen more. We let that run, live, until one of eight experts
is in every token's pair and others stand idle. Then we derive the Switch loss, which pulls the load apart, look hard
at what its value means, and at three losses in circulation that do not balance. The z-loss, capacity, a bias and expert
choice follow, each in a few lines, the last with its leak from the future. The same contest at the size of a small
language model is a committed record.

**You need** lessons 5 and 6: the router's gradient reaches only the experts that were chosen. On paper, with numbers
worked by hand: :doc:`/math/balance`.
"""

# %%
# Collapse, live
# --------------
# A toy that can be watched: tokens of eight kinds, each to be mapped by a matrix of its own, and a layer of eight small
# experts. The tokens share one direction, as the hidden states of a language model do, so that a row of the gate can
# raise its logit for *all* of them. Six experts start with weights of 0.3 of the size: a disadvantage that learning
# could mend.
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


def learn(coefficient, steps=500, rate=0.1):
    """Gradient descent; coefficient(step) is the weight of the balance loss. Returns the load (steps, E), the loss."""
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
    return np.array(loads), np.mean(losses[-100:])


alone, loss_alone = learn(lambda step: 0.0)
print("load at first:", alone[0].round(2))
print("load at last: ", alone[-1].round(2))
assert alone[-1].max() * E > 3.9  # of 4 = E/k: every token takes it

# %%
# The load f of an expert is its share of the N·k assignments; its fair share is 1/E. One expert now has a half of them,
# the most that is possible, E/k times its fair share: it is one of every token's two. Others have next to nothing, and
# stay there: lesson 5 showed that the gradient of a logit that was not chosen is exactly zero. They are parameters that
# cost memory and do nothing. And the busiest sets the pace: on eight devices with an expert each, seven wait for it.
#
# The Switch loss
# ---------------
# We want the loads even: :math:`\sum_e f_e^2` would measure that, with its minimum at :math:`f_e = 1/E`. But f is a
# count. It has steps, and no gradient. The probabilities have one, and their mean :math:`P_e = \frac1N \sum_n p_{ne}`
# moves with f. So let one factor count and the other learn (Fedus et al. 2021, equation 4):
#
# .. math:: L = E \sum_e f_e P_e .
#
# With f taken as given, L is linear in p: :math:`\partial L / \partial p_{ne} = \frac{E}{N} f_e`. Through the softmax,
# :math:`d\ell_e = p_e (dp_e - \sum_i p_i \, dp_i)`,
#
# .. math:: d\ell_{ne} = \frac{E}{N} \, p_{ne} \Bigl( f_e - \sum_i f_i \, p_{ni} \Bigr).
#
# The bracket is how much busier an expert is than what this token would meet on average. Busier ones are pushed down,
# idler ones up, *including those that were not chosen*: it is the only gradient that they get.


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
# What it does to the toy, from the start with a coefficient of 0.3, and from step 250, when the collapse is complete.
# The toy needs a larger coefficient than a language model, where 0.01 is usual and Mixtral's released config has 0.02.
early, loss_early = learn(lambda step: 0.3)
late, loss_late = learn(lambda step: 0.3 * (step >= 250))

figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
for axis, loads, name in zip(axes, (alone, early, late), ("no balance loss", "from the start", "from step 250")):
    axis.stackplot(np.arange(len(loads)), loads.T, linewidth=0.2)
    axis.set(title=name, xlabel="step", ylim=(0, 1), xlim=(0, len(loads) - 1))
axes[0].set_ylabel("share of assignments")
figure.suptitle("Eight experts' shares: one takes a half, the most it can; with the Switch loss all have work")
plt.show()
for name, loads, loss in (("none", alone, loss_alone), ("early", early, loss_early), ("late", late, loss_late)):
    print(f"{name:6} busiest expert at {loads[-20:].mean(axis=0).max() * E:.2f} of its fair share, loss {loss:.2f}")
assert early[-20:].mean(axis=0).max() < 0.6 * alone[-20:].mean(axis=0).max()

# %%
# Balance is not free: it pulls at the same gate as the task, and the toy, for which a few experts are enough, loses a
# little by it, and more where experts are called in late that have learned nothing. In a language model there is more
# to learn than a few experts can hold. The record of ``tinymoe experiment balance`` trains the small model on Python's
# library, with all experts but two starting at a hundredth of their weights, once for each remedy:
repository = Path(tinymoe.__file__).parents[1]
record = json.loads((repository / "docs/results/balance.json").read_text())
print("made by:", record["command"], "\n")
print(f"{'':16} busiest expert   held-out loss")
for name, lines in record["numbers"]["methods"].items():
    print(f"{name:16} {max(lines[-1]['busiest']):8.2f} x fair   {lines[-1]['val_loss']:8.3f} nats per byte")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for name, lines in record["numbers"]["methods"].items():
    steps = [line["step"] for line in lines]
    axes[0].plot(steps, [max(line["busiest"]) for line in lines], label=name, linewidth=1.2)
    axes[1].plot(steps[2:], [line["val_loss"] for line in lines[2:]], linewidth=1.2)
axes[0].set(xlabel="step", title="busiest expert of the worst layer, in fair shares")
axes[1].set(xlabel="step", title="held-out loss, nats per byte")
axes[0].legend(fontsize=7, ncols=2)
figure.suptitle("Only what acts on the choice itself brings the busiest expert down")
plt.show()

# %%
# Noise, jitter and the z-loss, which are often listed as remedies, have no eye for the load. A capacity limits what is
# computed, not what the router wants. The Switch loss, the bias and expert choice act on the choice.
#
# What its value says
# -------------------
# * If f is uniform, :math:`L = E \cdot \frac1E \sum_e P_e = 1`, whatever P is; if P is uniform, 1 too, whatever f is.
# * If all tokens take the same k with certainty, :math:`f = P = 1/k` there: :math:`L = E/k`.
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
# Since both f and P sum to one, :math:`L - 1 = E \sum_e (f_e - \frac1E)(P_e - \frac1E)`: below 1 whenever counts and
# probabilities lean to different sides. The value is no distance from balance, and "it has fallen below 1" is no
# success. The *gradient* is right here as well: it takes from the busier expert, and is zero exactly when f is uniform.
#
# Broken on purpose: three losses that do not balance
# ---------------------------------------------------
# **1. The load as** ``(probs > 0)``. A softmax is never zero, so every expert is counted for every token.
# **2. The variance of the probabilities.** It looks at how undecided each token is, not at where the tokens go.
# Take three routers: balanced and confident; collapsed and confident; collapsed by a hair, nearly uniform.


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
# The second loss is E for all three, with no gradient: it is a constant. The variance calls the third router, which
# sends everything to two experts, nearly perfect, and the collapsed confident one better than the balanced one. What
# following each loss for 2000 steps does to such routers is in the record; the busiest expert, in fair shares:
print(f"{'':26} {'Switch loss':>17} {'probs > 0':>17} {'variance':>17}")
for name, losses in record["numbers"]["losses"].items():
    cells = [f"{of['busiest_before']:.2f} -> {of['busiest_after']:.2f}" for of in losses.values()]
    print(f"{name:26}", *(f"{cell:>17}" for cell in cells))

# %%
# **3. Averaging over layers before multiplying.** transformers concatenates all layers' tokens first (and counts f per
# token, so that its balanced value is k). Two layers that have collapsed onto *different* experts then look balanced:
one, other = (np.tile(20.0 * np.array(mask), (10, 1)) for mask in ([1, 1, 0, 0], [0, 0, 1, 1]))
apart = [switch_loss(z, expert_load(np.argsort(-z, axis=1, kind="stable")[:, :2], 4))[0] for z in (one, other)]
print(f"transformers' loss: {hf_load_balancing_loss([one, other], 2):.3f}, which is k: balanced")
print(f"layer by layer:     {apart[0]:.3f} and {apart[1]:.3f}, which is E/k: collapsed")
assert abs(hf_load_balancing_loss([one, other], 2) - 2) < 1e-6

# %%
# The z-loss
# ----------
# Another loss on the same logits, for another purpose (ST-MoE, equation 5): :math:`\frac1N \sum_n z_n^2` with
# :math:`z = \log \sum_e e^{\ell_e}`. Large logits round badly in bfloat16 and make softmax saturate. Since
# :math:`\partial z / \partial \ell_e = p_e`, its gradient is :math:`\frac2N z \, p_e`: it lowers all logits of a token,
# the largest most. The weights of lesson 5 do not change when all logits move together, so the loss has room to do it.
value, saved = z_loss(logits)
np.testing.assert_allclose(
    z_loss_backward(1.0, saved),
    2 / len(logits) * np.log(np.exp(logits).sum(axis=1, keepdims=True)) * softmax(logits),
    atol=1e-14,
)
down = logits - 40 * z_loss_backward(1.0, saved)
print(f"z-loss {value:.3f} -> {z_loss(down)[0]:.3f} after a step along its gradient")

# %%
# Capacity
# --------
# A device that waits for the busiest expert may set a limit: with a factor c an expert takes at most
# :math:`\lceil c \cdot Nk/E \rceil` pairs, first choices first, and what overflows skips the block. The residual stream
# carries such a token on. How much is dropped depends on how uneven the router is; Mixtral has no limit.
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
# A balance loss pulls at the same weights as the task. DeepSeek-V3 leaves the loss out: each expert has a bias that is
# added to its probability **where the k largest are chosen**, and nowhere else. After each step it moves by γ, up for
# experts below their fair share, down for those above: a controller, without gradients. On a router that stays as
# it is, collapsed by a hair:
gate, pull = np.eye(E), 0.02 * some + 0.2 * head_start
bias, busiest = np.zeros(E), []
for _ in range(300):
    (mixing, experts, _), _ = route(pull, gate, k, bias=bias)
    load = expert_load(experts, E)
    busiest.append(load.max() * E)
    bias += 0.0005 * np.sign(1 / E - load)
expected = softmax(np.take_along_axis(pull, experts, axis=1))
print(f"busiest: {busiest[0]:.2f} -> {busiest[100]:.2f} -> {busiest[-1]:.2f}; the bias: {bias.round(3)}")
np.testing.assert_allclose(mixing, expected, rtol=1e-12)  # the weights know nothing of it
assert busiest[-1] < 1.3 < busiest[0]

# %%
# The weights are those of the unbiased scores. Were the bias in them as well, an expert would speak louder for being
# unpopular.
#
# Expert choice, and its leak
# ---------------------------
# Turn the question around: each *expert* takes the :math:`cNk/E` tokens that want it most. The load is even by
# construction, and a token may get none or all. But whether an expert takes a token depends on who else applies, and
# that includes tokens that come **later**. Change the last byte of the line, and look at the earlier ones:
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
# A model trained so has seen a little of the future, and when it writes, the future is not there. Its loss in the
# record is measured on whole texts, so it is not comparable with the others, though it stands beside them.
#
# Remember
# --------
# * Without balancing a mixture collapses, because the unchosen get no gradient; the Switch loss gives them one.
# * :math:`L = E \sum f P`, f counted and constant, P learned: 1 at balance, E/k at collapse, and sometimes below 1.
#   Watch the load, not the loss.
# * A balance loss must read the *decisions*, and layer by layer: (probs > 0), the variance and the pooled form do not.
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
# 2. Split a batch over two workers. Show that the Switch loss of the whole is the mean of both parts' only if both use
#    the load *of the whole batch*.
# 3. Show that rows of :math:`d\ell` sum to zero for the Switch loss, but not for the z-loss. What does that say of what
#    each can change?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) E/k = 4; (b) it counts choices, which are steps of the logits; (c) 1; (d) those that were not
# chosen; (e) by a factor of :math:`10^{-6}`, hardly: prevention works better than cure; (f) it averages over tokens
# how far each row is from uniform, and not where the rows point; (g) nothing on its own; (h) two experts take N·k/8
# pairs each, a quarter of all, so 75 %; (i) in the selection, not in the weights; (j) what an earlier token gets
# depends on tokens that are not written yet.
#
# 1. L is linear in P, so its least value puts all probability on the idlest expert: :math:`E \min_e f_e`, here 0.
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
#    Switch loss cannot shift all logits of a token together, only against each other; the z-loss does shift them.
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
