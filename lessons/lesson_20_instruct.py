r"""
Lesson 20 · Instruct: answers, and a preference between them
============================================================

**The question.** A model that was trained on text continues it. How does it come to *answer*, and to end? And of two
right answers, how does it come to give the one that we prefer, when all we can say is "this one rather than that"?

Mixtral – Instruct was made in two steps (section 4 of the paper): supervised fine-tuning on answers (SFT), then direct
preference optimisation on pairs of answers (DPO, Rafailov et al., `arXiv 2305.18290
<https://arxiv.org/abs/2305.18290>`__). Both are losses on the same log-probabilities. We derive both with their
gradients, check them by finite differences and through a whole model, train a toy with them in front of you, and break
the second in a way that its own accuracy does not show.

**You need** the cross-entropy from :doc:`lesson 1 </lessons/lesson_01_bytes>` and a training step from
:doc:`lesson 9 </lessons/lesson_09_training>`. The toy is trained here. Read, not made: ``lessons/checkpoint``, whose
README has the command, and ``docs/results/instruct-seed0.json`` and ``-seed1.json``, which
``tinymoe experiment instruct --seed N`` writes. On paper: :doc:`/math/dpo`.
"""

# %%
# Continuing is not answering
# ---------------------------
# The committed model has read Python's library. It knows what code looks like, and goes on and on:
import dataclasses
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tinymoe
from tinymoe import instruct, training
from tinymoe.examples import ETX, Example, Examples, padded
from tinymoe.tokenizer import ByteTokenizer

repository = Path(tinymoe.__file__).parents[1]
LINE = "def add(a, b): return a + b"
prompt, answer = LINE[: LINE.index("a +")], LINE[LINE.index("a +") :]
encode, decode = ByteTokenizer().encode, ByteTokenizer().decode

base = tinymoe.Mixtral.from_pretrained(repository / "lessons/checkpoint")
print(repr(decode(tinymoe.generate(base, encode(prompt), max_new_tokens=40))))

# %%
# An example for fine-tuning is a prompt, an answer, and a token that says "done". In bytes we take ASCII's end of text,
# the byte 3. All is one sequence, and as ever the input at position t predicts the token at t + 1. Only the answer is
# to be learnt, the prompt is given. So the targets of the prompt are −100, which no loss counts:
sequence = np.append(encode(LINE), ETX)  # prompt, answer, end
inputs, targets = sequence[:-1].astype(np.int64), sequence[1:].astype(np.int64)
targets[: len(prompt) - 1] = -100
for t in (0, len(prompt) - 2, len(prompt) - 1, len(prompt), len(inputs) - 1):
    shown = "not counted" if targets[t] == -100 else repr(chr(targets[t]))
    print(f"t = {t:>2}: input {chr(inputs[t])!r:>4}, target {shown}")

batch = padded([(encode(prompt), np.append(encode(answer), ETX))])  # the library's
assert (batch.inputs[0] == inputs).all()
assert (batch.targets[0] == targets).all()

# %%
# The **last token of the prompt** has the first target: from there the answer begins. And the end has to be a target,
# or the model never learns to stop.
#
# The loss on answers
# -------------------
# With A the positions that count,
#
# .. math:: L_\text{SFT} = -\frac{1}{|A|} \sum_{t \in A} \log p(y_t \mid \text{all before}), \qquad
#           dz_t = \frac{\mathrm{softmax}(z_t) - \mathrm{onehot}(y_t)}{|A|} \;\; (t \in A), \quad
#           dz_t = 0 \;\; (t \notin A)
#
# where :math:`z_t` are the logits at t. It is the cross-entropy of pre-training, with fewer terms. That a position is
# not counted does not cut it off: attention reads the prompt, so the weights learn to read it, too.


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def sft_loss(z, targets):
    counted = np.flatnonzero(targets != -100)
    return -log_softmax(z)[counted, targets[counted]].mean()


def sft_backward(z, targets):
    counted = np.flatnonzero(targets != -100)
    dz = np.zeros_like(z)
    dz[counted] = np.exp(log_softmax(z)[counted])
    dz[counted, targets[counted]] -= 1
    return dz / len(counted)


def slope(f, x, h=1e-5):
    d = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        d[i] = (f(up) - f(down)) / (2 * h)
    return d


rng = np.random.default_rng(0)
z, some = rng.standard_normal((6, 8)), np.array([-100, -100, 5, 0, 7, 3])  # 6 positions, V = 8
dz = sft_backward(z, some)
np.testing.assert_allclose(dz, slope(lambda z: sft_loss(z, some), z), atol=1e-9)
loss, saved = tinymoe.reference.cross_entropy(z, some)
np.testing.assert_allclose(loss, sft_loss(z, some))
np.testing.assert_allclose(tinymoe.reference.cross_entropy_backward(1.0, saved), dz, atol=1e-15)
print("finite differences and the library agree; rows of the prompt:", dz[:2].any(axis=1))

# %%
# From rewards to a loss on pairs
# -------------------------------
# Now suppose that an answer y to a prompt x had a reward r(x, y). We would want a model π of high reward that stays
# near the model :math:`\pi_\text{ref}` that we have, with β for how near:
#
# .. math:: \max_\pi \; \mathbb{E}_{y \sim \pi}[r(x, y)] - \beta \, \mathrm{KL}(\pi \,\|\, \pi_\text{ref}).
#
# Put both into one expectation, and name :math:`\pi^*(y) = \pi_\text{ref}(y) \, e^{r(x, y)/\beta} / Z(x)`, with Z(x)
# such that it sums to one:
#
# .. math:: \mathbb{E}_{y \sim \pi}\Bigl[ r - \beta \log \frac{\pi}{\pi_\text{ref}} \Bigr]
#           = -\beta \, \mathbb{E}_{y \sim \pi}\Bigl[ \log \frac{\pi}{\pi_\text{ref} \, e^{r/\beta}} \Bigr]
#           = \beta \log Z(x) - \beta \, \mathrm{KL}(\pi \,\|\, \pi^*).
#
# A KL divergence is never negative and zero only for equal distributions, so :math:`\pi^*` is the best model. In
# numbers, for five answers:
beta = 0.1
reference, reward, any_model = rng.dirichlet(np.ones(5)), rng.standard_normal(5), rng.dirichlet(np.ones(5))
unnormalised = reference * np.exp(reward / beta)
Z, best = unnormalised.sum(), unnormalised / unnormalised.sum()


def kl(p, q):
    return (p * np.log(p / q)).sum()


value = any_model @ reward - beta * kl(any_model, reference)
np.testing.assert_allclose(value, beta * np.log(Z) - beta * kl(any_model, best))
print(f"a model at random is worth {value:.3f}, the best one {best @ reward - beta * kl(best, reference):.3f}")
assert best @ reward - beta * kl(best, reference) > value

# %%
# Solved for the reward this reads :math:`r(x, y) = \beta \log (\pi^*(y) / \pi_\text{ref}(y)) + \beta \log Z(x)`:
# **every model is the best one for some reward**, the one that its log-probabilities imply. We do not know rewards, but
# which of two answers was preferred. Bradley and Terry's model of such choices is
# :math:`P(y_w \succ y_l) = \sigma(r(x, y_w) - r(x, y_l))`, and in the difference the unknown Z(x) cancels. What is left
# is minus the log-likelihood of the choices, with no reward model in it:
#
# .. math:: L_\text{DPO} = -\log \sigma(m), \qquad m
#           = \beta \Bigl[ \log \frac{\pi(y_w)}{\pi_\text{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_\text{ref}(y_l)} \Bigr].
#
# Here :math:`\log \pi(y)` is the **sum** of the log-probabilities of the answer's tokens, its end among them. With
# :math:`\partial(-\log \sigma)/\partial m = -\sigma(-m)` and the mean over B pairs,
#
# .. math:: d \log \pi(y_w) = -\frac{\beta}{B} \, \sigma(-m), \qquad d \log \pi(y_l) = +\frac{\beta}{B} \, \sigma(-m).
#
# One up, one down, by the same amount, in proportion to the probability that the model gives to the wrong order.


def dpo(log_probs, references, beta):
    chosen, rejected = log_probs - references  # (2, B)
    m = beta * (chosen - rejected)  # (B,)
    loss = np.log1p(np.exp(-m)).mean()
    pull = beta / (1 + np.exp(m)) / len(m)
    return loss, np.stack([-pull, pull]), m


log_probs, references = -5 * rng.random((2, 4)), -5 * rng.random((2, 4))
loss, dlog_probs, m = dpo(log_probs, references, beta)
np.testing.assert_allclose(dlog_probs, slope(lambda lp: dpo(lp, references, beta)[0], log_probs), atol=1e-10)
library_loss, saved = instruct.dpo_loss(log_probs, references, beta)
np.testing.assert_allclose(loss, library_loss)
np.testing.assert_allclose(instruct.dpo_loss_backward(1.0, saved), dlog_probs)
print("margins", m.round(3), "pull", dlog_probs[1].round(4))

# %%
# Through a whole model
# ---------------------
# A pair becomes two sequences. The chain is: log-probabilities forward, :math:`d\log\pi` as above, back through the
# model. The reference is the model itself before the first step, and its weights never change: so what it says of the
# pairs is computed **once** and kept, two numbers a pair, instead of a second model in memory. At the first step m is
# therefore exactly 0, the loss is ln 2, and the gradient is not zero.
small = tinymoe.MixtralConfig(
    dim=32, n_layers=1, hidden_dim=64, n_heads=4, n_kv_heads=4, vocab_size=128, num_experts=4, context_len=64
)
alone = dataclasses.replace(small, aux_loss_coef=0.0)  # DPO, and no balance loss
checked = tinymoe.Mixtral.init(alone, seed=0, dtype="float64")
pair = Example(encode(prompt), tuple(np.append(encode(form), ETX) for form in ("a + b", "a+b")))
both = padded([(pair.prompt, form) for form in pair.answers])
kept = checked.log_probs(both.inputs, both.targets).reshape(2, 1)  # the reference, once
log_probs, backward = checked.log_probs_and_backward(both.inputs, both.targets, both.lengths)
loss, dlog_probs, m = dpo(log_probs.reshape(2, 1), kept, beta)
grads = backward(dlog_probs.ravel())
np.testing.assert_allclose([loss, m[0]], [math.log(2), 0])


def loss_with(name, index, step):
    checked.params[name][index] += step
    loss, *_ = dpo(checked.log_probs(both.inputs, both.targets).reshape(2, 1), kept, beta)
    checked.params[name][index] -= step
    return loss


for name in ("layers.0.attention.wq", "layers.0.moe.gate", "layers.0.moe.w2", "output"):
    index = np.unravel_index(abs(grads[name]).argmax(), grads[name].shape)
    measured = (loss_with(name, index, 1e-4) - loss_with(name, index, -1e-4)) / 2e-4
    print(f"{name:<22} {grads[name][index]: .9f}, by finite differences {measured: .9f}")
    np.testing.assert_allclose(grads[name][index], measured, rtol=1e-4)

# %%
# What the pull does not hold
# ---------------------------
# Both answers begin with ``a``, after the same tokens. That term is in both sums, once pulled up and once down, and
# cancels: not counting it changes no gradient. **The beginning that two answers share, DPO neither teaches nor
# protects.** If the weights move far enough, it goes. (After the first difference equal tokens no longer cancel: they
# stand behind different text.)
common = both.targets.copy()
common[:, len(prompt) - 1] = -100  # the token "a" of both
_, backward = checked.log_probs_and_backward(both.inputs, common, both.lengths)
without = backward(dlog_probs.ravel())
difference = max(abs(without[name] - grads[name]).max() for name in grads)
largest = max(abs(grad).max() for grad in grads.values())
print(f"largest gradient {largest:.4f}; without the common token it differs by {difference:.0e}")
assert difference < 1e-12

# %%
# A toy, trained
# --------------
# The task is our line with other letters: the prompt ``def add(g, c): return`` asks for ``g + c``, with 12 letters and
# a fifth of the pairs of letters held out. Both forms, ``g + c`` and ``g+c``, are examples for SFT. Then DPO prefers
# the first, as PEP 8 does. What counts as right is either form, so the preference has no part in it.
letters = "abcdefghijkl"
names = [(p, q) for p in letters for q in letters if p != q]
rng = np.random.default_rng(1)
rng.shuffle(names)


def example(p, q, *forms):
    return Example(encode(f"def add({p}, {q}): return "), tuple(np.append(encode(form), ETX) for form in forms))


pairs = [example(p, q, f"{p} + {q}", f"{p}+{q}") for p, q in names]
held_out, train = pairs[: len(pairs) // 5], pairs[len(pairs) // 5 :]
forms = [Example(pair.prompt, (form,)) for pair in train for form in pair.answers]


def learn(model, task, options):
    optimizer = tinymoe.AdamW(model.params, betas=(options.beta1, options.beta2), weight_decay=0.0)
    return [training.take_step(model, optimizer, task, options) for _ in range(options.steps)]


def right(model):
    """Return the share of held-out prompts answered rightly in either form, and in the preferred one."""
    written = instruct.answers(model, [pair.prompt for pair in held_out], 8, ETX)
    of_form = np.array([[np.array_equal(text, form) for form in pair.answers] for text, pair in zip(written, held_out)])
    return of_form.any(axis=1).mean(), of_form[:, 0].mean()


options = training.Options(steps=500, batch_size=16, learning_rate=5e-3, warmup=50)
fine_tuned = tinymoe.Mixtral.init(small, seed=1)
examples = Examples(objective="sft", manifest={}, train=forms, held_out=forms[:8])
lines = learn(fine_tuned, instruct.sft_task(examples, options), options)
of_train, of_held_out = (instruct.log_probs(fine_tuned, some) for some in (train, held_out))  # the references, (2, n)
print(f"loss {lines[0]['train_loss']:.2f} -> {lines[-1]['train_loss']:.2f}; right {right(fine_tuned)[0]:.0%}")
print(f"log-probability of the forms: {of_held_out.mean(axis=1).round(2)}, and ln ½ = {math.log(0.5):.2f}")
assert right(fine_tuned)[0] > 0.9

# %%
# It answers prompts that it never saw, and ends. Each form has half of the probability, as in its examples: SFT copies
# how often a thing was said. Now 60 steps of DPO, at a small rate, and again from the same start at ten times the rate.
# Two figures are DPO's own: the mean margin m, and the share of pairs with m > 0, its *preference accuracy*, "told
# apart" below.


def prefer(rate, gradients=None, steps=60):
    """Return the model, what was seen every 10 steps (log π of both forms, right, preferred), and DPO's own figures."""
    model = tinymoe.Mixtral(small, {name: p.copy() for name, p in fine_tuned.params.items()})
    options = training.Options(steps=steps, batch_size=16, learning_rate=rate, warmup=6)
    pairs = Examples(objective="dpo", manifest={}, train=train, held_out=held_out)
    task = instruct.dpo_task(pairs, (of_train, of_held_out), beta, options)
    task = task._replace(gradients=gradients or task.gradients)
    optimizer, seen = tinymoe.AdamW(model.params, betas=(options.beta1, options.beta2), weight_decay=0.0), []
    for step in range(steps + 1):
        if step % 10 == 0:
            seen.append((*instruct.log_probs(model, held_out).mean(axis=1), *right(model)))
        if step < steps:
            training.take_step(model, optimizer, task, options)
    return model, np.array(seen), task.evaluate(model)


def show(seen, figures):
    print(f"told apart {figures['val_preference_accuracy']:.0%}, margin {figures['val_margin']:.2f}, ", end="")
    print(f"right {seen[-1, 2]:.0%}, in the preferred form {seen[-1, 3]:.0%}, log π {seen[-1, :2].round(2)}")


runs = {rate: prefer(rate) for rate in (3e-5, 3e-4)}
for rate, (_, seen, figures) in runs.items():
    print(f"rate {rate:.0e}: ", end="")
    show(seen, figures)
    assert figures["val_preference_accuracy"] > 0.9, "both tell the pairs apart"
(_, gentle, _), (hasty_model, hasty, _) = runs.values()
assert gentle[-1, 3] > 0.9, "the small rate gets the preferred form"
assert hasty[-1, 2] < gentle[-1, 2] - 0.1, "ten times the rate loses answers"

# %%
# At the small rate the preferred form takes all, and no answer is lost. At ten times the rate the pairs are told apart
# just as well, with a margin many times as large, and a part of the answers is wrong. How many is a matter of luck:
# with other seeds from a third to five in six stayed right. The picture shows when it happens: at first the chosen
# answer gains and all stay right; then **both** log-probabilities fall, the rejected one far faster, and the margin
# goes on growing.
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for axis, (rate, (_, seen, _)) in zip(axes, runs.items()):
    for column, label in enumerate(("chosen: g + c", "rejected: g+c")):
        axis.plot(range(0, 61, 10), seen[:, column], "o-", markersize=4, label=f"log π of {label}")
    axis.set(xlabel="step of DPO", title=f"rate {rate:.0e}: {seen[-1, 2]:.0%} right in the end")
    axis.legend(fontsize=8)
axes[0].set_ylabel("held-out answers, nats")
figure.suptitle(
    "At a small rate one answer gains what the other loses; at ten times it, after a while, both fall (mind the scales)"
)
plt.show()

texts = instruct.answers(hasty_model, [pair.prompt for pair in held_out], 8, ETX)
wrong = [(text, pair) for text, pair in zip(texts, held_out) if not any(np.array_equal(text, a) for a in pair.answers)]
for text, pair in wrong[:3]:
    print(repr(decode(text)), "instead of", repr(decode(pair.answers[0])))

# %%
# The records
# -----------
# The experiment is the same at another size: five kinds of instruction on words, a model of 0.25 M parameters that has
# read text before, two seeds, and the full stop as the preferred form. ``chosen`` is log π of the preferred answer.
files = [repository / f"docs/results/instruct-seed{seed}.json" for seed in (0, 1)]
records = [json.loads(file.read_text())["numbers"] for file in files]
print(f"{'':>4} {'stage':<16}{'right':>8}{'preferred':>11}{'pairs':>8}{'margin':>8}{'chosen':>9}{'text':>7}")
for seed, of_seed in enumerate(records):
    for stage, of_stage in of_seed["stages"].items():
        print(
            f"{seed:>4} {stage:<16}{of_stage['exact_match']:8.1%}{of_stage['preferred_form']:11.1%}"
            f"{of_stage['implicit_accuracy']:8.1%}{of_stage['margin']:8.3f}{of_stage['chosen_log_prob']:9.2f}"
            f"{of_stage['text_loss']:7.2f}"
        )
    stages = of_seed["stages"]
    assert stages["dpo"]["exact_match"] >= stages["sft"]["exact_match"] - 0.02
    assert stages["dpo, 10 x rate"]["implicit_accuracy"] > 0.99 > 0.01 > stages["dpo, 10 x rate"]["exact_match"]

# %%
# Three things to read off. SFT brings nearly all answers, and costs something on plain text, although pieces of text
# were among its examples. DPO at the small rate turns the form and keeps the rest. And the negative result: at ten
# times the rate **not one answer is right** while preference accuracy, the figure that DPO reports of itself, says
# 100 %. Here the pairs differ in nothing but the full stop: everything that makes an answer right is the common part.
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axis, key, label in zip(axes, ("exact_match", "implicit_accuracy"), ("right, either form", "pairs told apart")):
    for seed, of_seed in enumerate(records):
        values = [of_stage[key] for of_stage in of_seed["stages"].values()]
        axis.bar(np.arange(4) + 0.4 * (seed - 0.5), values, 0.4, label=f"seed {seed}")
    axis.set_xticks(range(4), records[0]["stages"], fontsize=8)
    axis.set_title(label, fontsize=10)
axes[0].legend(fontsize=8)
figure.suptitle("The record: DPO at ten times the rate tells all pairs apart and answers nothing right")
plt.show()

# %%
# Broken on purpose
# -----------------
# **1. The shift forgotten.** Put the answer's tokens as targets at their own positions, and each is to be predicted
# from itself. In 150 steps the loss falls to 0.004, where an honest one stands at 0.98: the model has
# learnt to copy its input.
options = training.Options(steps=150, batch_size=16, learning_rate=5e-3, warmup=15)
task = instruct.sft_task(examples, options)


class Unshifted:
    def __getitem__(self, step):
        batch = task.batches[step]
        targets = np.where(batch.targets != -100, batch.inputs, -100)  # the input itself, instead of the next token
        return batch._replace(targets=targets)


copying = tinymoe.Mixtral.init(small, seed=1)
lines = learn(copying, task._replace(batches=Unshifted()), options)
print(f"loss {lines[-1]['train_loss']:.4f}, right {right(copying)[0]:.0%}")
assert lines[-1]["train_loss"] < 0.05
assert right(copying)[0] == 0

# %%
# **2. A reference that follows.** If the references are computed anew from the model in training, the margin is zero
# forever: the loss stays at ln 2, accuracy at one half, and the pull never weakens, whatever happens to the answers.
now = instruct.log_probs(hasty_model, held_out)
loss, dlog_probs, m = dpo(now, now, beta)
print(f"after all those steps: loss {loss:.4f} = ln 2, pull {dlog_probs[1, 0] * len(m):.3f} a pair, as at the first")
assert np.allclose(dlog_probs[1] * len(m), beta / 2)
np.testing.assert_allclose(loss, math.log(2))

# %%
# Remember
# --------
# * SFT is cross-entropy on the answers alone; the last token of the prompt has the first target, and the end is one.
# * A model implies a reward, :math:`\beta \log \pi/\pi_\text{ref}`; DPO is the log-likelihood of choices under it.
# * Its gradient is :math:`\mp\beta\,\sigma(-m)/B` on two sums of log-probabilities. The references are two numbers a
#   pair, computed once.
# * What two answers share before they part, DPO does not protect. Preference accuracy does not see that; measure the
#   answers.
#
# **Ask yourself.** (a) Why is the prompt not a target? (b) Why may the references be kept, and when must they be
# computed anew? (c) Why does Z(x) not matter? (d) Can the loss fall while both answers become less probable? (e) A
# pair's rejected answer is already much less probable than the chosen one, under both models alike. Does DPO pull on
# it?
#
# Exercises
# ---------
# 1. Hold the answers: add :math:`-\lambda \, \text{mean} \log \pi(y_w)` to the loss. Derive the gradient, and run it
#    with :math:`\lambda = 0.1` at ten times the rate.
# 2. With β = 0.1, how far apart must two log-ratios be for the pull to have fallen to half of what it was at the start,
#    and to a hundredth?
# 3. Someone divides log π by the number of tokens. Which pull do the common tokens get now, if the chosen answer is
#    longer?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) it is given, and a model that learns to write prompts as well has less left for answers; (b) the
# reference's weights never change; anew if the examples do; (c) it depends on the prompt alone and cancels in the
# difference; (d) yes, only their difference is in it; (e) yes, fully: m compares with the reference, and is 0.
#
# 1. The term adds :math:`-\lambda/B` to :math:`d \log \pi(y_w)`, and now the common tokens are pulled up, too:


def held(model, batch):
    log_probs, backward = model.log_probs_and_backward(batch.inputs, batch.targets, batch.lengths)
    loss, dlog_probs, _ = dpo(log_probs.reshape(2, -1), batch.references, beta)
    dlog_probs[0] -= 0.1 / dlog_probs.shape[1]  # λ = 0.1
    return training.Gradients(backward(dlog_probs.ravel()), int(batch.lengths.sum()), {"train_loss": loss})


_, seen, figures = prefer(3e-4, held)
show(seen, figures)
assert seen[-1, 2] > hasty[-1, 2]

# %%
# 2. The pull is β σ(−m), at the start β/2. Half of that is σ(−m) = 1/4, so m = ln 3; a hundredth is σ(−m) = 1/200,
#    m = ln 199. Divided by β that is 11 and 53 nats. DPO hardly lets go of pairs that any reader would call settled,
#    which is why the number of steps and the rate matter so much:
apart = np.log([3, 199]) / beta
print("log-ratios apart by", apart.round(1), "nats")
np.testing.assert_allclose(1 / (1 + np.exp(beta * apart)), [1 / 4, 1 / 200])

# %%
# 3. A common token has :math:`d = -\beta\sigma(-m)\,(1/|y_w| - 1/|y_l|)`, which is positive for a longer chosen answer:
#    gradient descent pushes down what both have in common. With log-probabilities token by token, the first shared:
tokens = -rng.random(1 + 5 + 3)  # shared, the rest of "g + c" and its end, the rest of "g+c" and its end


def mean_loss(t):
    chosen, rejected = (t[0] + t[1:6].sum()) / 6, (t[0] + t[6:].sum()) / 4
    return dpo(np.array([[chosen], [rejected]]), np.zeros((2, 1)), beta)[0]


d = slope(mean_loss, tokens)
m = beta * ((tokens[0] + tokens[1:6].sum()) / 6 - (tokens[0] + tokens[6:].sum()) / 4)
np.testing.assert_allclose(d[0], -beta / (1 + np.exp(m)) * (1 / 6 - 1 / 4), rtol=1e-5)
assert d[0] > 0

# %%
# .. raw:: html
#
#    </details>

# %%
# **This is the last lesson.** What the project measured, negative results included, is on the page of
# :doc:`results </results>`; the formulas of every component stand in :doc:`/math/router` and its neighbours.
