r"""
Lesson 1 · Bytes: a table that predicts, and what a model must beat
===================================================================

**The question.** A language model says how probable each next token is. What is a token, what is the one number that
says how good a model is, and how low must it be to mean anything?

The model of this course has millions of parameters. Before it comes one that has 65,536 and can be trained in two
ways: by counting, and by gradient descent. Both must arrive at the same table, since the loss has one lowest point.
So we can see whether the loss, its gradient and the training are right before anything deep is built on them. Nothing
in these three changes when the table becomes a mixture of experts.

**You need** NumPy and the chain rule. The text is the library of the Python that runs this; the numbers differ a
little between its versions.
"""

# %%
# Text is bytes
# -------------
# A computer has text as bytes already: UTF-8 takes one for an ASCII character and two to four for any other. We take
# the bytes themselves as tokens. The vocabulary has V = 256 of them, nothing is ever unknown, and there is no
# tokenizer to train. The price is length: with Mixtral's own vocabulary of 32,000 pieces the same text has fewer
# tokens.
import lzma

import matplotlib.pyplot as plt
import numpy as np

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)  # (T,)
V = 256
print(tokens.shape, tokens[:8], "...")
print("é takes", list("é".encode()))

# %%
# To predict is to say something of each token from those before it. So inputs and targets are the same array, one
# place apart: T tokens make T − 1 questions, and each answer is in the text.
inputs, targets = tokens[:-1], tokens[1:]
for byte, answer in list(zip(inputs, targets))[:4]:
    print(f"after {chr(byte)!r} comes {chr(answer)!r}")

# %%
# Text to learn from, and text to ask about
# -----------------------------------------
# The library splits its corpus by documents: about a tenth of the files is **held out**, chosen by a hash of their
# names. Whatever we fit, we fit on the first part; whatever we claim, we measure on the second. We use a third of the
# training files here, which is enough for tables.
from tinymoe.corpora import standard_library

corpus = standard_library()
train = np.frombuffer(b"".join(document.text for document in corpus.train["code"][::3]), np.uint8)
held_out = np.frombuffer(b"".join(document.text for document in corpus.held_out["code"]), np.uint8)
print(f"{len(train):,} bytes to train on, {len(held_out):,} held out")

# %%
# One number
# ----------
# A model gives the token that came, :math:`x_t`, the probability :math:`p(x_t \mid x_{<t})`. Probabilities of a whole
# text multiply, and the product of a million of them is zero in any floating point. So take logarithms, which add, and
# divide by the number of tokens. With a minus, so that less is better, that is the **cross-entropy**:
#
# .. math:: L = -\frac{1}{T} \sum_{t} \ln p(x_t \mid x_{<t}).
#
# It is in *nats*. Divided by :math:`\ln 2` it is in *bits*: what an ideal compressor that knows the model would need
# for a token. Its exponential is the *perplexity*: as unsure as if it were choosing evenly among so many. Who knows
# nothing gives each byte 1/256.


def show(name, nats):
    print(f"{name:32s} {nats:.3f} nats = {nats / np.log(2):.3f} bits per byte, perplexity {np.exp(nats):6.1f}")


show("uniform", -np.log(1 / V))
assert np.isclose(np.log(V) / np.log(2), 8)

# %%
# Which bytes are frequent: unigrams
# ----------------------------------
# The first thing to know of a text is how often each byte occurs. We give every byte a little more than its count, so
# that one which was never seen is not impossible: a single probability of 0 makes the loss infinite.
SMOOTHING = 0.01


def normalised(counts):
    """Counts (..., V) to probabilities: nothing is impossible."""
    return (counts + SMOOTHING) / (counts + SMOOTHING).sum(axis=-1, keepdims=True)


unigram = normalised(np.bincount(train, minlength=V))  # (V,)
print("most frequent:", [chr(b) for b in np.argsort(-unigram)[:8]])
unigram_loss = -np.log(unigram[held_out]).mean()
show("unigram, held out", unigram_loss)

# %%
# What follows what: bigrams
# --------------------------
# The next step is one such row for each previous byte, (V, V). It has learned spelling, of a kind: ``q`` is
# followed by ``u``, an opening bracket at once by a closing one or a name.
pairs = np.bincount(train[:-1] * np.int64(V) + train[1:], minlength=V * V).reshape(V, V)  # (V, V): from, to
bigram = normalised(pairs)


def table_loss(table, text):
    return -np.log(table[text[:-1], text[1:]]).mean()


show("bigram, held out", table_loss(bigram, held_out))
assert table_loss(bigram, held_out) < unigram_loss < np.log(V)

letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz_ \n.,:()='0", np.uint8)
figure, axes = plt.subplots(figsize=(6.2, 5.6), layout="constrained")
image = axes.imshow(bigram[np.ix_(letters, letters)], cmap="Blues", vmin=0, vmax=0.6)
names = [{" ": "␣", "\n": "⏎"}.get(chr(b), chr(b)) for b in letters]
axes.set_xticks(range(len(letters)), names, family="monospace", fontsize=7)
axes.set_yticks(range(len(letters)), names, family="monospace", fontsize=7)
axes.set(xlabel="next byte", ylabel="this byte")
axes.set_title("Most bytes have a few likely followers: after q comes u", fontsize=10)
figure.colorbar(image, label="probability", shrink=0.8)
plt.show()

# %%
# A table can write: draw the next byte from the row of the last, again and again.
rng = np.random.default_rng(0)
written = [ord("d")]
for _ in range(120):
    written.append(rng.choice(V, p=bigram[written[-1]]))
print(bytes(written).decode(errors="replace"))

# %%
# The same table, by gradient descent
# -----------------------------------
# Now forget the counts. Let w be (V, V), a row of **logits** for each previous byte: any numbers, which softmax makes
# probabilities. This is what stays until the last lesson; only where the logits come from will change. For one row
# z of logits and its target y
#
# .. math:: L = -\ln \frac{e^{z_y}}{\sum_v e^{z_v}} = \ln \sum_v e^{z_v} - z_y, \qquad
#           \frac{\partial L}{\partial z_j} = \frac{e^{z_j}}{\sum_v e^{z_v}} - \delta_{jy} = p_j - \delta_{jy}.
#
# **The probability that was said, minus the one that was right.** For N rows, divide by N. A row sums to zero.
#
# Softmax has a derivative of its own, :math:`\partial p_i / \partial z_j = p_i (\delta_{ij} - p_j)`: the quotient rule,
# once with i in the numerator and once without. Given dp, the chain rule sums it to
# :math:`dz_j = \sum_i dp_i \, p_i (\delta_{ij} - p_j) = p_j (dp_j - \sum_i p_i \, dp_i)`. Put in
# :math:`dp_i = -\delta_{iy} / p_y` and the line above comes out again. The router and attention will use the general
# form; here the short one saves a division by a small number.
#
# In code the largest logit is subtracted first. That changes nothing, since numerator and denominator both get the
# factor :math:`e^{-\max z}`, and no exponential exceeds one.


def cross_entropy(logits, targets):
    shifted = logits - logits.max(axis=1, keepdims=True)  # (N, V)
    total = np.exp(shifted).sum(axis=1, keepdims=True)  # (N, 1)
    rows = np.arange(len(targets))
    loss = np.mean(np.log(total[:, 0]) - shifted[rows, targets])
    dlogits = np.exp(shifted) / total  # p
    dlogits[rows, targets] -= 1
    return loss, dlogits / len(targets)


# %%
# The logits of a token are row ``inputs[n]`` of w. Forward that is a look-up; backward each dlogits row is *added* to
# the row that it came from, which may be the same for many tokens:
#
# .. math:: dw_u = \sum_{n \,:\, \text{inputs}_n = u} d\text{logits}_n.


def loss_and_grad(w, inputs, targets):
    loss, dlogits = cross_entropy(w[inputs], targets)  # (N, V)
    dw = np.zeros_like(w)
    np.add.at(dw, inputs, dlogits)
    return loss, dw


w = rng.standard_normal((V, V))
loss, dw = loss_and_grad(w, inputs, targets)
print(f"w {w.shape}, loss of the line with random logits {loss:.3f}; a row sums to {dw[ord('a')].sum():.0e}")

# %%
# Checked
# -------
# By central differences, for some entries of rows that occur, and against the library.


def slope(f, x, where, h=1e-5):
    up, down = x.copy(), x.copy()
    up[where] += h
    down[where] -= h
    return (f(up) - f(down)) / (2 * h)


places = [(u, v) for u, v in zip(inputs, targets)] + [(ord("a"), v) for v in range(0, V, 16)]
measured = np.array([slope(lambda z: loss_and_grad(z, inputs, targets)[0], w, place) for place in places])
by_hand = np.array([dw[place] for place in places])
print("by hand against finite differences:", abs(by_hand - measured).max())
assert abs(by_hand - measured).max() < 1e-9

from tinymoe import reference

library_loss, saved = reference.cross_entropy(w[inputs], targets)
dlogits = reference.cross_entropy_backward(1.0, saved)
assert np.isclose(library_loss, loss, rtol=1e-12)
np.testing.assert_allclose(dlogits, cross_entropy(w[inputs], targets)[1], atol=1e-15)
np.testing.assert_allclose(
    reference.embedding_backward(dlogits, reference.embedding(inputs, w)[1]), dw, atol=1e-15
)  # dw by sorting, which is faster than np.add.at
print("the library agrees")

# %%
# Counting is where the gradient is zero
# --------------------------------------
# Collect the tokens of one row u. Each adds the same p minus its own one-hot, so with :math:`c_{uv}` the counts of
# pairs and :math:`c_u` their sum
#
# .. math:: dw_{uv} = \frac{c_u}{N} \Bigl( \mathrm{softmax}(w_u)_v - \frac{c_{uv}}{c_u} \Bigr).
#
# It vanishes exactly where softmax gives the observed frequencies. And the loss is convex in w, a log-sum-exp minus
# a linear term, so there is no other lowest point: training the table must end at the counts. (Two tables of logits
# that differ by a number per row are the same to softmax.) We can watch it get there, with random batches and AdamW,
# which :doc:`lesson 9 </lessons/lesson_09_training>` derives.
w = np.zeros((V, V), np.float32)
optimizer = reference.AdamW({"w": w}, learning_rate=0.1, weight_decay=0.0)
seen, curve = [], []
for step in range(401):
    if step % 20 == 0:
        log_p = w - np.log(np.exp(w).sum(axis=1, keepdims=True))
        seen.append(step)
        curve.append(-log_p[held_out[:-1], held_out[1:]].mean())
    at = rng.integers(len(train) - 1, size=2048)
    logits, looked_up = reference.embedding(train[at], w)
    batch_loss, saved = reference.cross_entropy(logits, train[at + 1])
    dlogits = reference.cross_entropy_backward(1.0, saved)
    optimizer.step({"w": reference.embedding_backward(dlogits, looked_up)})

show("trained table, held out", curve[-1])
show("counted table, held out", table_loss(bigram, held_out))
assert np.isclose(curve[0], np.log(V))  # all logits equal: the uniform model
assert abs(curve[-1] - table_loss(bigram, held_out)) < 0.05

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(seen, curve, label="trained")
for name, level, style in (("uniform", np.log(V), ":"), ("unigram", unigram_loss, "--")):
    axes.axhline(level, color="grey", linestyle=style, label=name)
axes.axhline(table_loss(bigram, held_out), color="black", linewidth=1, label="counted")
axes.set(xlabel="step", ylabel="held-out loss, nats per byte")
axes.set_title("Trained from the uniform model, the table comes down to what counting gives", fontsize=10)
axes.legend()
plt.show()

# %%
# Why held-out text
# -----------------
# Look further back, and the table of contexts grows: :math:`256^n` rows for n bytes. Most rows are never seen, some
# are seen once. What such a table says of its own text is then no prediction but a memory. The probability of a byte
# is its count after the n − 1 before it; here with sorted arrays of n bytes packed into one integer.


def packed(text, n):
    """Every n bytes in a row as one integer: (T − n + 1,)."""
    key = np.zeros(len(text) - n + 1, np.int64)
    for i in range(n):
        key = key * V + text[i : i + len(key)]
    return key


def occurrences(keys, wanted):
    return np.searchsorted(keys, wanted, "right") - np.searchsorted(keys, wanted, "left")


def probabilities(n, text):
    """p of each byte of a text from the n − 1 before it, by the counts in train."""
    grams, contexts = np.sort(packed(train, n)), np.sort(packed(train[:-1], n - 1))
    wanted = packed(text, n)
    return (occurrences(grams, wanted) + SMOOTHING) / (occurrences(contexts, wanted // V) + V * SMOOTHING)


orders = range(1, 7)
of_held_out = {n: probabilities(n, held_out) for n in orders}
on_held_out = [-np.log(of_held_out[n]).mean() for n in orders]
on_train = [-np.log(probabilities(n, train[: len(held_out)])).mean() for n in orders]
for n in orders:
    print(f"patterns of {n}: train {on_train[n - 1]:.3f}, held out {on_held_out[n - 1]:.3f}")
best = int(np.argmin(on_held_out)) + 1
assert np.isclose(on_held_out[1], table_loss(bigram, held_out))  # two bytes: the bigram
assert 2 < best < 6
assert on_train[5] < on_train[best - 1]
assert on_held_out[5] > on_held_out[best - 1]

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(orders, on_train, "o--", label="text it was counted on")
axes.plot(orders, on_held_out, "o-", label="held out")
axes.set(xlabel="bytes in a pattern", ylabel="loss, nats per byte", xticks=orders)
axes.set_title(f"On its own text a longer table is always better; on other text only up to {best} bytes", fontsize=10)
axes.legend()
plt.show()

# %%
# What a model must beat
# ----------------------
# A compressor is a model, too: its output size is its loss in bits. So the bar is not the uniform model, which is
# where training starts, nor the unigram, which every network learns in its first steps. It is the best table, and a
# general compressor without any training text. The two get there differently: the table knows Python and sees a few
# bytes back, ``lzma`` knows nothing and sees the whole text before. A trained network that is worse than
# the bigram has a bug.
squeezed = 8 * len(lzma.compress(held_out.tobytes())) / len(held_out) * np.log(2)
show("uniform", np.log(V))
show("unigram", unigram_loss)
show("bigram", table_loss(bigram, held_out))
show(f"{best} bytes, the best table", on_held_out[best - 1])
show("lzma, no training text", squeezed)

# %%
# Broken on purpose
# -----------------
# **1. Targets that were not shifted.** The model is asked for a byte that it has just been shown. The loss falls
# below everything above, and the text that it writes is one byte, repeated. A loss that is too good is the most
# frequent bug of this kind; its sisters are a mask that looks ahead (lesson 4) and held-out text that was trained on.
leak = normalised(np.diag(np.bincount(train, minlength=V)))
show("target = input", -np.log(leak[held_out, held_out]).mean())
assert -np.log(leak[held_out, held_out]).mean() < 0.01

# %%
# **2. Rows that lose their updates.** ``dw[inputs] += dlogits`` reads all rows, adds, and writes them back: of tokens
# that share a row, the last one wins. It has the right shape and, on a text without repetition, the right values.
_, dlogits = cross_entropy(np.zeros((len(inputs), V)), targets)
lost, right = np.zeros((V, V)), np.zeros((V, V))
lost[inputs] += dlogits
np.add.at(right, inputs, dlogits)
print(f"{len(inputs)} tokens in {len(set(inputs))} rows; off by", np.linalg.norm(lost - right) / np.linalg.norm(right))
assert np.linalg.norm(lost - right) > 0.1 * np.linalg.norm(right)
assert not np.allclose(lost[ord("d")], right[ord("d")])  # d occurs three times
assert np.allclose(lost[ord("f")], right[ord("f")])  # f once

# %%
# **3. Softmax without the shift.** float32 ends at :math:`e^{88.7}`. One large logit and the quotient is ∞/∞.
large = np.array([[100.0, 0.0]], np.float32)
with np.errstate(over="ignore", invalid="ignore"):
    print("without the shift:", np.exp(large) / np.exp(large).sum())
    assert np.isnan(np.exp(large) / np.exp(large).sum()).any()
print("with it:", reference.softmax(large))

# %%
# Remember
# --------
# * Tokens are bytes, V = 256. Inputs and targets are one array, a place apart.
# * Loss is the mean of :math:`-\ln p` of what came. Nats divided by :math:`\ln 2` are bits; the exponential of nats is
#   the perplexity.
# * The gradient of the logits is :math:`(p - \text{one-hot}) / N`, and zero where the model says the frequencies.
# * ln 256 = 5.545 is where training starts. Bigrams, the best table and ``lzma`` are what it has to pass, on text that
#   nobody fitted.
#
# **Ask yourself.** (a) What is the perplexity of a model that always spreads its belief evenly over 10 bytes, one of
# which is right? (b) Why does dlogits sum to zero in each row? (c) What is the loss before training if all logits are
# 0, and what does a much larger one tell? (d) When is the gradient of a row of w exactly zero, though the table is
# wrong? (e) Why may perplexities of two models with different tokenizers not be compared?
#
# Exercises
# ---------
# 1. Show with the unigram that the loss on a text is :math:`H + \mathrm{KL}`: the entropy H of the text's own
#    frequencies f, plus :math:`\sum_v f_v \ln (f_v / p_v)`, which is never negative. Which part can a better p remove?
# 2. A model with 32,000 tokens has a loss of 2.0 nats per token, and a token has 3.6 bytes on average. One with bytes
#    has 0.6 nats per byte. Which is better? Compute bits per byte, and the perplexity of each per its own token.
# 3. Mix two tables, :math:`p = \lambda p_5 + (1 - \lambda) p_3`. Find a good :math:`\lambda` on the first half of
#    the held-out text and report the loss on the second. Why not on all of it?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) 10; (b) both p and the one-hot sum to one; (c) ln V = 5.545, and a larger one says that the initial
# logits are too large: it is sure, and wrong; (d) when its byte does not occur in the batch; (e) the loss is per
# token, and tokens are of different length: compare bits per byte.
#
# 1. Add and subtract :math:`\sum f \ln f`. A better p removes the KL. What is left, H, no unigram can pass.
f = np.bincount(held_out, minlength=V) / len(held_out)
some = f > 0
entropy = -(f[some] * np.log(f[some])).sum()
divergence = (f[some] * np.log(f[some] / unigram[some])).sum()
print(f"H {entropy:.4f} + KL {divergence:.4f} = {entropy + divergence:.4f}, measured {unigram_loss:.4f}")
assert np.isclose(entropy + divergence, unigram_loss)
assert divergence >= 0

# %%
# 2. The first: 2.0 / 3.6 = 0.556 nats per byte. Its perplexity, 7.4 per token, looks worse than 1.8 per byte.
print(f"{2.0 / 3.6 / np.log(2):.3f} against {0.6 / np.log(2):.3f} bits per byte")
print(f"perplexity {np.exp(2.0):.2f} per token against {np.exp(0.6):.2f} per byte")
assert 2.0 / 3.6 < 0.6

# %%
# 3. The mixture is better than both, because a short context is often seen where a long one is not. On text that chose
#    :math:`\lambda` the loss would be a little too good: it was fitted, if only with one number.
long, short = of_held_out[5], of_held_out[3][2:]  # both from the fifth byte on
half = len(long) // 2
lambdas = np.linspace(0, 1, 21)
choice = [-np.log(m * long[:half] + (1 - m) * short[:half]).mean() for m in lambdas]
m = lambdas[np.argmin(choice)]
mixed = -np.log(m * long[half:] + (1 - m) * short[half:]).mean()
alone = [-np.log(p[half:]).mean() for p in (long, short)]
print(f"λ = {m:.2f}: {mixed:.3f}, and alone {alone[0]:.3f} and {alone[1]:.3f}")
assert mixed < min(alone)

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 2 </lessons/lesson_02_norm_and_swiglu>` builds the two parts of a layer that look at one token
# at a time: the norm, and the block that lesson 6 will have eight of.
