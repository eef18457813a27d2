r"""
Lesson 9 · Training: from ln 256 down, on Python's own library
==============================================================

**The question.** A model with random weights finds all 256 bytes equally likely. What exactly has to be done a few
hundred times until it has learned what Python looks like, and which of the many precautions around it matter?

Batches, AdamW, a schedule, clipping: each is built in a few lines, held against the library, and then used from there.
A model of 0.1 million parameters trains here, live, in seconds, on the standard library of the Python that runs this
page, and is measured against what one can know by counting. It is stopped and resumed to the same bits, it overfits on
purpose, and four precautions are left out one at a time, with an honest look at whether that hurts.

**You need** the model of :doc:`lesson 8 </lessons/lesson_08_model>`. On paper: :doc:`/math/adamw`,
:doc:`/math/cross_entropy`.
"""

# %%
# Text and batches
# ----------------
# Each machine has this text: the modules of its Python, without their docstrings, the docstrings, and the language
# reference behind ``help()``. About a tenth of the *documents* is held out, chosen by a hash of their names, so that no
# held-out text has its other half in training. The numbers below vary a little between versions of Python.
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tinymoe
from tinymoe import corpora, data, training
from tinymoe.tokenizer import ByteTokenizer

LINE = "def add(a, b): return a + b"
corpus = corpora.standard_library()
text = corpus.train_tokens(ByteTokenizer())  # (n,) uint8
held_out = corpus.held_out_tokens(ByteTokenizer())["code"]
print(f"{len(text):,} bytes to train on; {sum(map(len, held_out)):,} bytes of code held out")

# %%
# A batch is B windows of T bytes that start anywhere, and as targets the same windows one byte further on: each
# position predicts its next byte, so a window is T exercises at once. The batch of a step depends on the seed and the
# step, and on nothing that happened before. That costs one line and will give us exact resumption.


def batch(step, B=8, T=64, seed=0):
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(len(text) - T, size=(B, 1))
    positions = starts + np.arange(T)  # (B, T)
    return text[positions].astype(np.int64), text[positions + 1].astype(np.int64)


inputs, targets = batch(0)
print("inputs ", repr(bytes(inputs[0, :40].tolist()).decode(errors="replace")))
print("targets", repr(bytes(targets[0, :40].tolist()).decode(errors="replace")))
batches = data.Batches(text, 8, 64, seed=0)
assert all((a == b).all() for step in (0, 7) for a, b in zip(batch(step), batches[step]))

# %%
# What counting knows
# -------------------
# Before a model is praised: how well does a table do? The cross-entropy is the mean of
# :math:`-\ln p(\text{next byte})`. With no knowledge p = 1/256. A **unigram** table has one probability per byte; a
# **bigram** table one per pair, the best that any model can do which sees a single byte of context. Both are counted
# on the training text, one added to each count so that none is zero, and measured on the held-out code.
windows = training.sample_windows({"code": held_out}, 64, most=128)
x, y = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*windows))
x, y = x[y >= 0], y[y >= 0]  # without padding

pairs = np.bincount(text[:-1].astype(np.int64) * 256 + text[1:], minlength=65536).reshape(256, 256) + 1
counts = np.bincount(text, minlength=256) + 1
baselines = {
    "uniform": math.log(256),
    "unigram": -np.log(counts[y] / counts.sum()).mean(),
    "bigram": -np.log(pairs[x, y] / pairs.sum(axis=1)[x]).mean(),
}
for name, loss in baselines.items():
    print(f"{name:8} {loss:.3f} nats, {loss / math.log(2):.2f} bits per byte")

# %%
# AdamW
# -----
# Gradients of different parameters differ in size by orders of magnitude: an embedding row that occurs once in a batch,
# a norm that every token passes. One step length for all is too long for one and too short for the other. Adam divides
# each element's gradient by its typical size. It keeps two running means,
#
# .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 .
#
# They begin at zero, and that must be corrected. If every gradient were c, then after t steps
# :math:`m = (1 - \beta_1) \sum_{i=0}^{t-1} \beta_1^i \, c = (1 - \beta_1^t) \, c` by the geometric series: too small by
# :math:`1 - \beta_1^t`. Divided by it, :math:`\hat m = c`; in the same way :math:`\hat v = v / (1 - \beta_2^t)`. The
# update:
#
# .. math:: p \leftarrow p - \eta \lambda \, p - \eta \, \frac{\hat m}{\sqrt{\hat v} + \varepsilon} .
#
# At the first step :math:`\hat m / \sqrt{\hat v} = \pm 1`: every weight with a gradient moves by η, whatever
# its size. The W is the
# decay :math:`\eta \lambda p`, which does not pass through the division; inside it, weights with large gradients would
# hardly decay.


def adamw(p, g, m, v, step, rate, betas=(0.9, 0.95), eps=1e-8, decay=0.1, corrected=True):
    m += (1 - betas[0]) * (g - m)
    v += (1 - betas[1]) * (g * g - v)
    c1, c2 = (1 - betas[0] ** step, 1 - betas[1] ** step) if corrected else (1, 1)
    p -= rate * decay * (p.ndim > 1) * p  # norms, the vectors, do not decay
    p -= rate * (m / c1) / (np.sqrt(v / c2) + eps)


rng = np.random.default_rng(0)
p = rng.standard_normal((5, 7))
m, v, ours = np.zeros_like(p), np.zeros_like(p), p.copy()
library = tinymoe.AdamW({"p": p}, 1e-2, betas=(0.9, 0.95), weight_decay=0.1)
for step in range(1, 6):
    g = rng.choice([-1.0, 1.0], p.shape) * 10.0 ** rng.integers(-5, 4, p.shape)  # nine orders of magnitude
    before = ours.copy()
    adamw(ours, g, m, v, step, 1e-2)
    library.step({"p": g})
    if step == 1:
        print("lengths of a first step, in η:", np.unique((abs(ours - before * (1 - 1e-3)) / 1e-2).round(2)))
np.testing.assert_allclose(ours, p, rtol=1e-12)
print("the library agrees")

# %%
# Schedule and clipping
# ---------------------
# The rate rises linearly over the first steps, while m and v are means of very little, then falls along half a cosine
# to a tenth: long steps to get near, short ones to settle. And all gradients together are one long vector; if its
# length exceeds a limit it is scaled down to it, so that one odd batch cannot move the model far.
options = training.Options(steps=700, batch_size=8, seq_len=64, learning_rate=1e-2, warmup=30)


def learning_rate(step):
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - options.warmup) / (options.steps - options.warmup)
    return options.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def clip(grads, limit):
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    return {name: g * min(1, limit / norm) for name, g in grads.items()}, norm


assert all(math.isclose(learning_rate(s), training.learning_rate(s, options)) for s in range(options.steps))
given = {"a": np.full(9, 2.0)}
ours, norm = clip(given, 1.0)
training.clip_gradients(given, 1.0)  # in place
np.testing.assert_allclose(given["a"], ours["a"])

# %%
# A run
# -----
# The loop: a batch, its loss and gradients, clip, step. The model is a Mixtral with four experts, small enough for this
# page; the loss that is noted is the cross-entropy alone, without the balance term that is trained beside it.
config = tinymoe.MixtralConfig(
    dim=48, n_layers=2, hidden_dim=64, n_heads=4, n_kv_heads=2, vocab_size=256, num_experts=4, sliding_window=64
)


def train(model, optimizer, batches, first, last, rate=learning_rate, limit=1.0):
    losses, norms = [], []
    for step in range(first, last):
        _, grads = model.loss_and_grads(*batches[step])
        norms.append(training.clip_gradients(grads, limit))  # our clip, in place
        optimizer.learning_rate = rate(step)
        optimizer.step(grads)
        losses.append(model.losses.cross_entropy)
    return np.array(losses), np.array(norms)


def fresh(betas=(0.9, 0.95)):
    model = tinymoe.Mixtral.init(config, seed=0)
    return model, tinymoe.AdamW(model.params, betas=betas, weight_decay=0.1)


model, optimizer = fresh()
losses, norms = train(model, optimizer, batches, 0, options.steps)
loss = training.evaluate(model, windows)[0]
print(f"{config.count_parameters():,} parameters, {options.steps * 512:,} bytes seen")
print(f"loss {losses[0]:.3f} -> {losses[-50:].mean():.3f}; held-out code {loss:.3f}, bigrams {baselines['bigram']:.3f}")
print(f"gradient longer than 1 in {(norms > 1).mean():.0%} of the steps")
assert abs(losses[0] - math.log(256)) < 0.1
assert loss < baselines["bigram"]

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=[2, 1])
axes[0].plot(losses, linewidth=0.4, color="C0")
axes[0].plot(np.convolve(losses, np.ones(25) / 25, "valid"), color="C0", label="mean of 25 batches")
axes[0].axhline(loss, color="C1", linewidth=1, label="held-out code, at the end")
for name, height in baselines.items():
    axes[0].axhline(height, color="grey", linewidth=0.7, linestyle=":")
    axes[0].text(len(losses), height + 0.04, name, ha="right", fontsize=8, color="grey")
axes[0].set(xlabel="step", ylabel="nats per byte")
axes[0].legend(fontsize=8)
axes[1].plot([learning_rate(step) for step in range(options.steps)])
axes[1].set(xlabel="step", ylabel="learning rate")
figure.suptitle("First it learns which bytes are frequent, then pairs, then more than any pair can say")
plt.show()

# %%
# The curve has the shape of what there is to know: the unigram level within tens of steps, then the bigram level,
# slower, and below it only with context, for which attention must have begun to work. What it writes, a byte at a time,
# drawn from its probabilities (lesson 10 explains the temperature):
prompt = np.frombuffer(b"def add(self, ", np.uint8)
written = tinymoe.generate(model, prompt, max_new_tokens=80, temperature=0.6, seed=0)
print(repr(bytes(written.tolist()).decode(errors="replace")))

# %%
# Pieces of words, and of Python's punctuation: what a third of a megabyte teaches.
#
# Stopped and resumed, bit for bit
# --------------------------------
# The next step depends on the weights, on m and v, on the number of steps, and on the batch, which depends on the
# number of steps. So that is what must be saved. Twenty steps at once, and ten, a file, a new process's worth of new
# objects, and ten more:
whole, whole_optimizer = fresh()
train(whole, whole_optimizer, batches, 0, 20)

half, half_optimizer = fresh()
train(half, half_optimizer, batches, 0, 10)
with tempfile.TemporaryDirectory() as folder:
    kinds = {"p": half.params, "m": half_optimizer.m, "v": half_optimizer.v}
    np.savez(Path(folder) / "state.npz", **{f"{kind} {n}": a for kind, of in kinds.items() for n, a in of.items()})
    resumed, resumed_optimizer = fresh()
    with np.load(Path(folder) / "state.npz") as state:
        for kind, of in (("p", resumed.params), ("m", resumed_optimizer.m), ("v", resumed_optimizer.v)):
            for name, array in of.items():
                array[...] = state[f"{kind} {name}"]
resumed_optimizer.steps = 10
train(resumed, resumed_optimizer, batches, 10, 20)
same = all((whole.params[name] == resumed.params[name]).all() for name in whole.params)
print("resumed to the same bits:", same)
assert same

# %%
# ``tinymoe train --resume`` does this, and writes the file so that a process killed in the middle of it leaves the last
# one whole. The order of sums counts as state, too: the number of workers is kept in the run's manifest, because it
# decides how gradients are added up.
#
# What overfits
# -------------
# A model overfits text that it sees again and again, if it has the parameters to hold it. The same one, of 0.1
# million, on the first 3,000 bytes, which each step sees a sixth of, beside held-out code:
few = text[:3000]
short = training.Options(steps=300, learning_rate=1e-2, warmup=20)
memorising, its_optimizer = fresh()
seen, unseen, steps = [], [], list(range(0, 301, 50))
for first, last in zip([0, *steps], steps):
    curve, _ = train(
        memorising, its_optimizer, data.Batches(few, 8, 64, 0), first, last, lambda s: training.learning_rate(s, short)
    )
    seen.append(curve[-10:].mean() if len(curve) else math.log(256))
    unseen.append(training.evaluate(memorising, windows[:2])[0])

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.plot(steps, seen, marker="o", label="the 3,000 bytes it trains on")
axis.plot(steps, unseen, marker="o", label="held-out code")
axis.set(xlabel="step", ylabel="nats per byte")
axis.set_title("Learning 3,000 bytes by heart: better on those, and in the end worse on all others")
axis.legend(fontsize=8)
plt.show()
print("seen  ", np.round(seen, 2))
print("unseen", np.round(unseen, 2))
assert unseen[-1] > min(unseen)
assert seen[-1] < unseen[-1] - 0.5

# %%
# The full text has over nine million bytes, of which the run above saw one in twenty-five, once. It cannot overfit,
# since nothing is seen twice; more steps are what it lacks. (Its two losses above are not of the same mixture: the
# held-out one is of code alone, which is easier than prose.)
#
# Broken on purpose
# -----------------
# Four precautions are left out, for 60 steps. **Bias correction**, with the customary :math:`\beta_2 = 0.999`:
# after t steps the uncorrected ratio is too large by :math:`(1 - 0.9^t) / \sqrt{1 - 0.999^t}`, and *that* grows
# before it shrinks:
for t in (1, 3, 10, 30, 100, 1000, 5000):
    print(f"t = {t:4}: steps are {(1 - 0.9**t) / math.sqrt(1 - 0.999**t):.1f} times as long as meant")


def trial(rate, warmup=0, betas=(0.9, 0.999), corrected=True, limit=1.0, steps=60):
    schedule = training.Options(steps=1000, learning_rate=rate, warmup=warmup)

    def of_step(step):
        t = step + 1
        too_long = 1 if corrected else (1 - betas[0] ** t) / math.sqrt(1 - betas[1] ** t)
        return training.learning_rate(step, schedule) * too_long

    return train(*fresh(betas), batches, 0, steps, of_step, limit)[0]


trials = {
    "all precautions": trial(0.03, warmup=30),
    "no warm-up": trial(0.03),
    "no correction": trial(0.03, warmup=30, corrected=False),
    "no warm-up, no correction": trial(0.03, corrected=False),
    "33 times the rate": trial(1.0, warmup=30),
    "no clipping": trial(0.03, warmup=30, limit=math.inf),
}
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, curve in trials.items():
    axis.plot(curve, label=name, linewidth=1.2)
    print(f"{name:26} worst {curve[1:].max():5.2f}, last ten {curve[-10:].mean():.2f}")
axis.axhline(math.log(256), color="grey", linewidth=0.7, linestyle=":")
axis.set(xlabel="step", ylabel="nats per byte")
axis.set_title(
    "Without warm-up the loss leaps above that of knowing nothing; without the correction, too, it stays behind"
)
axis.legend(fontsize=8)
plt.show()
assert trials["no warm-up, no correction"][-10:].mean() > trials["all precautions"][-10:].mean()
assert trials["33 times the rate"][-10:].mean() > trials["all precautions"][-10:].mean()

# %%
# Read the numbers before believing the list of precautions. Both runs without warm-up leap above ln 256: worse than
# knowing nothing. With the correction that is one bad step, after which it learns as fast; without it, it is still
# behind in the end. Behind a warm-up the missing correction makes no leap, since the short steps hide that they are up
# to six times too long. A rate that is far too large never settles, though AdamW and clipping keep it from
# overflowing. And clipping does next to nothing for *this* model in these steps. These are insurance for deep models
# and long runs, where one bad step can spoil days; a toy cannot show their worth, and an experiment that shows nothing
# should be reported so.
#
# Remember
# --------
# * The first loss is ln V; a bigram table is the least that a model with context must beat.
# * AdamW divides each gradient by its typical size: a step is about η long for every weight. The corrections make means
#   of sums that began at zero.
# * A batch that depends on (seed, step) alone makes resumption exact. Save the weights, m, v and the step.
# * Hold out whole documents. What is seen often is learned by heart; what is seen once is not.
#
# **Ask yourself.** (a) What is the loss of a model that gives the right byte probability 1/2 each time, in nats and
# bits? (b) By what factor may a gradient be scaled, the same at each step, without changing AdamW's path? (c) Why is
# the bigram loss no bound for our model? (d) Which of the saved arrays could be left out with plain gradient descent?
# (e) Why are the documents and not the windows held out?
#
# Exercises
# ---------
# 1. Show that AdamW with clipping off walks the same path if every loss is multiplied by 1000 (take ε = 0). Does it
#    with clipping on?
# 2. How many numbers does training a model of P parameters keep in memory (parameters, gradients, m and v), and how
#    many bytes is that in float32? Count for 8x7B.
# 3. Estimate how many *different* windows of 64 bytes the 3,000 bytes have, how many the run saw, and how often each
#    byte was a target.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) ln 2 = 0.693 nats, one bit; (b) by any, both :math:`\hat m` and :math:`\sqrt{\hat v}` scale alike,
# but for ε; (c) it bounds models that see one byte, ours sees all that came before in its window; (d) v, and m as
# well without momentum; (e) windows of one document overlap or share names and phrases, so the held-out ones would be
# half known.
#
# 1. The same to rounding without clipping. With a limit both gradients are cut to it where they exceed it, but the
#    larger one exceeds it more often: another path.
for limit, equal in ((math.inf, True), (1.0, False)):
    ends = []
    for scale in (1.0, 1000.0):
        p, m, v, draws = np.ones(4), np.zeros(4), np.zeros(4), np.random.default_rng(5)
        for step in range(1, 20):
            cut, _ = clip({"p": scale * draws.standard_normal(4) * draws.random()}, limit)
            adamw(p, cut["p"], m, v, step, 0.1, eps=0.0)
        ends.append(p)
    assert np.allclose(*ends, rtol=1e-9) == equal

# %%
# 2. Four numbers of four bytes per parameter, and activations on top:
print(f"{4 * 4 * tinymoe.MixtralConfig.mixtral_8x7b().count_parameters() / 1e9:.0f} GB")

# %%
# 3. Windows start at 2,936 places; 300 steps of 8 windows saw 2,400, so most places were begun once or not at all.
#    But the windows overlap: 300 · 512 targets over 3,000 bytes is about 51 for each byte.
print(len(few) - 64, "places,", 300 * 8, "windows,", round(300 * 512 / len(few)), "times each byte")

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 10 </lessons/lesson_10_generation>` makes a trained model write, one byte at a time, without
# computing anything twice.
