r"""
Lesson 4 · Attention: looking back without a matrix
===================================================

**The question.** Everything else in the model looks at one token at a time. How does a token take something from those
before it, which ones may it see, and how can that work for 32,768 tokens, when a matrix of all pairs would have a
billion entries for each head?

Three parts answer it. A softmax over scores, as in the router, but over the past. Two savings of the Mistral family:
query heads that share keys, and a window. And an identity that takes a softmax apart, so that the matrix is never
there. Then we turn the window's mask round, as published code does, and watch a model become clairvoyant.

**You need** softmax and its backward from :doc:`lesson 1 </lessons/lesson_01_bytes>` and rotations from
:doc:`lesson 3 </lessons/lesson_03_rotary>`. On paper, with numbers for three tokens: :doc:`/math/attention`.
"""

# %%
# Question, answer, content
# -------------------------
# Three matrices make three rows of each token: a **query**, what it looks for; a **key**, what it offers to be found
# by; a **value**, what it hands over. The *score* of a query t and a key s is their dot product over
# :math:`\sqrt K`. A softmax over the keys that t may see makes weights of a row of scores, and the output is the mean
# of the values in these weights:
#
# .. math:: P_{ts} = \frac{e^{s_{ts}}}{\sum_{s' \text{ seen by } t} e^{s_{ts'}}}, \qquad
#           s_{ts} = \frac{q_t \cdot k_s}{\sqrt K}, \qquad o_t = \sum_s P_{ts} \, v_s .
#
# **Causal** means that t sees itself and what came before. A hidden score becomes −∞, whose exponential is exactly 0.
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np

from tinymoe import reference

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)  # (T,)
T, D, K = len(tokens), 32, 16

rng = np.random.default_rng(0)
x = rng.standard_normal((256, D))[tokens]  # (T, D)
rotation = reference.rope_table(np.arange(T), K, 1e4, np.float64)


def projected(heads, rotated):
    rows = (x @ (rng.standard_normal((heads * K, D)) / D**0.5).T).reshape(1, T, heads, K)
    return (reference.rope(rows, rotation)[0] if rotated else rows)[0]  # (T, heads, K)


back = np.arange(T)[:, None] - np.arange(T)  # (T, T) how far the key lies before the query
causal = back >= 0


def attend_one(q, k, v, seen):
    """One head: q, k, v are (T, K), seen is (T, T)."""
    scores = np.where(seen, q @ k.T / np.sqrt(q.shape[1]), -np.inf)  # (T, T)
    p = reference.softmax(scores)
    return p @ v, p  # (T, K), (T, T)


q, k, v = projected(1, True), projected(1, True), projected(1, False)
o, p = attend_one(q[:, 0], k[:, 0], v[:, 0], causal)
print(f"q {q.shape}, scores and weights {p.shape}, o {o.shape}")
print("weights of token 3:", p[3, :5].round(3), "and they sum to", p[3].sum().round(12))
assert np.allclose(o[0], v[0, 0])  # the first token sees only itself

# %%
# Each row of the weights is one token looking back. Nothing has been trained, so what it likes is chance; a trained
# head may look at the byte before, at the last opening bracket, or at the same name further up.
figure, axes = plt.subplots(figsize=(5.4, 4.8), layout="constrained")
image = axes.imshow(p, cmap="Blues", vmin=0)
names = [c if c != " " else "␣" for c in LINE]
axes.set_xticks(range(T), names, family="monospace", fontsize=7)
axes.set_yticks(range(T), names, family="monospace", fontsize=7)
axes.set(xlabel="key", ylabel="query")
axes.set_title("Each token spreads a weight of one over itself and those before it", fontsize=10)
figure.colorbar(image, shrink=0.8)
plt.show()

# %%
# Why the root of K
# -----------------
# If the elements of q and k have variance 1 and know nothing of each other, each of the K products has variance 1 and
# their sum K. Scores that are large make a softmax that is nearly a choice, with hardly any gradient. Division by
# :math:`\sqrt K` gives variance 1 back. K is the size of a *head*, over which the sum runs, and not of the model.
for size in (16, 128, 1024):
    scores = (rng.standard_normal((4000, size)) * rng.standard_normal((4000, size))).sum(axis=1)
    print(f"K = {size:4d}: variance of the product {scores.var():7.1f}, of the score {(scores / size**0.5).var():.2f}")

# %%
# Heads that share keys
# ---------------------
# A layer has H heads, each with its own query, and their outputs side by side. When the model writes, keys and values
# of all earlier tokens are kept, and reading them takes a growing part of its time. So R = H/G query heads share one
# key/value head: *grouped queries*. Head h uses key/value head :math:`\lfloor h / R \rfloor`.
H, G = 4, 2
R = H // G
q, k, v = projected(H, True), projected(G, True), projected(G, False)  # (T, H, K), (T, G, K), (T, G, K)


def attend(q, k, v, seen):
    heads = [attend_one(q[:, h], k[:, h // R], v[:, h // R], seen) for h in range(q.shape[1])]
    return np.stack([o for o, _ in heads], axis=1), np.stack([p for _, p in heads])  # (T, H, K), (H, T, T)


o, p = attend(q, k, v, causal)
print(f"q {q.shape}, k and v {k.shape}, o {o.shape}")
kept = 2 * 32 * 8 * 128 * 2  # k and v, layers, G, K, bytes of bfloat16
print(f"Mixtral 8x7B keeps {kept:,} bytes a token, {kept * 32768 / 1e9:.2f} GB for 32,768; 4 times that with G = H")
assert kept == 131_072

# %%
# A window
# --------
# Mistral 7B goes further: a token sees itself and the W − 1 before it. That is not as short-sighted as it seems. In
# the next layer those W − 1 have themselves looked back by W − 1, so through L layers something can travel
# :math:`L (W - 1)` tokens: about 131,000 for its 32 layers and W = 4096. Mixtral has no window.
W = 6
window = (back >= 0) & (back < W)
windowed, _ = attend(q, k, v, window)
print("keys seen, causal:", causal.sum(axis=1)[[0, 5, 26]], "with a window of 6:", window.sum(axis=1)[[0, 5, 26]])
assert np.allclose(windowed[:W], o[:W])

# %%
# A softmax in pieces
# -------------------
# The weights of one head at T = 32,768 are 4.3 GB in float32. They would have to go to memory and
# come back. But nobody wants them, only their products with the values. Can the sum be taken piece by piece, when its
# denominator needs all keys?
#
# Keep three things of the keys that were seen so far: the largest score m, and two sums in its unit,
#
# .. math:: \ell = \sum_s e^{s_s - m}, \qquad a = \sum_s e^{s_s - m} v_s, \qquad \text{and the output is } a / \ell .
#
# When more keys come and the largest score rises to :math:`m'`, every term must be multiplied by :math:`e^{m - m'}`,
# which is one factor for both sums, however many terms they have. So add the new keys after rescaling the old. That is
# exact: m is only a unit, and cancels in :math:`a / \ell`. It is there so that no exponential exceeds 1 (Milakov and
# Gimelshein 2018; FlashAttention, Dao et al. 2022, made kernels of it).


def attend_in_tiles(q, k, v, seen, tile):
    """One head, as `attend_one`, but with (T, tile) numbers at a time."""
    m = np.full((len(q), 1), np.finfo(q.dtype).min)  # the lowest finite number, see below
    total, out = np.zeros((len(q), 1)), np.zeros(v.shape)
    for start in range(0, len(k), tile):
        keys = slice(start, start + tile)
        scores = np.where(seen[:, keys], q @ k[keys].T / np.sqrt(q.shape[1]), -np.inf)  # (T, tile)
        higher = np.maximum(m, scores.max(axis=1, keepdims=True))
        rescale, terms = np.exp(m - higher), np.exp(scores - higher)
        total = total * rescale + terms.sum(axis=1, keepdims=True)
        out = out * rescale + terms @ v[keys]
        m = higher
    return out / total, m + np.log(total)  # (T, K), and ln Σ exp(score), which the backward will want


for tile in (1, 4, 100):
    pieces, _ = attend_in_tiles(q[:, 0], k[:, 0], v[:, 0], causal, tile)
    print(f"tiles of {tile:3d}: largest difference {abs(pieces - o[:, 0]).max():.0e}")
    assert np.allclose(pieces, o[:, 0], rtol=1e-12, atol=1e-14)

# %%
# The library's :func:`tinymoe.reference.attention` takes blocks of queries and tiles of keys in this way, leaves out
# the tiles that nobody sees, and serves all heads of a group with one product. Its
# :func:`~tinymoe.reference.attention_plain` is the formula. We let Python count the bytes that either needs at once.
library_o, saved = reference.attention(q[None], k[None], v[None])
np.testing.assert_allclose(library_o[0], o, rtol=1e-9, atol=1e-12)
np.testing.assert_allclose(reference.attention(q[None], k[None], v[None], window=W)[0][0], windowed, atol=1e-12)


def peak(function, length):
    rows = [rng.standard_normal((1, length, heads, K), np.float32) for heads in (H, G, G)]
    tracemalloc.start()
    function(*rows)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest / 2**20


lengths = [600, 1200, 2400]
peaks = {f.__name__: [peak(f, n) for n in lengths] for f in (reference.attention_plain, reference.attention)}
for name, sizes in peaks.items():
    print(f"{name:16s}", ", ".join(f"T = {n}: {size:6.1f} MiB" for n, size in zip(lengths, sizes)))
growth = {name: sizes[-1] / sizes[-2] for name, sizes in peaks.items()}
print("twice the tokens need", {name: round(factor, 1) for name, factor in growth.items()}, "times the memory")
assert growth["attention_plain"] > 3.5
assert growth["attention"] < 2.1

# %%
# The gradient
# ------------
# Given do, for one query. The output is linear in the values and in the weights, and the weights are a softmax:
#
# .. math:: dv_s = \sum_t P_{ts} \, do_t, \qquad dP_{ts} = do_t \cdot v_s, \qquad
#           ds_{ts} = P_{ts} \Bigl( dP_{ts} - \sum_r P_{tr} \, dP_{tr} \Bigr),
#
# and scores are linear in both: :math:`dq_t = \sum_s ds_{ts} k_s / \sqrt K`, :math:`dk_s = \sum_t ds_{ts} q_t /
# \sqrt K`. The inner sum seems to need a whole row once more before anything else can start. It does not:
#
# .. math:: \sum_r P_{tr} \, dP_{tr} = \sum_r P_{tr} \, (do_t \cdot v_r) = do_t \cdot \sum_r P_{tr} v_r = do_t \cdot
#           o_t .
#
# One number per query, from two rows that we have. And :math:`P_{ts} = e^{s_{ts} - \ln \sum \exp}` can be made again,
# tile by tile, from the one number per query that the forward left. So the backward needs no matrix either, at the
# price of computing the scores twice.


def attend_one_backward(do, q, k, v, seen, tile):
    o, log_sum = attend_in_tiles(q, k, v, seen, tile)
    delta = (do * o).sum(axis=1, keepdims=True)  # (T, 1)
    dq, dk, dv, scale = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), q.shape[1] ** -0.5
    for start in range(0, len(k), tile):
        keys = slice(start, start + tile)
        p = np.exp(np.where(seen[:, keys], q @ k[keys].T * scale, -np.inf) - log_sum)  # (T, tile)
        ds = p * (do @ v[keys].T - delta)
        dv[keys] = p.T @ do
        dk[keys] = ds.T @ q * scale
        dq += ds @ k[keys] * scale
    return dq, dk, dv


def attend_backward(do, q, k, v, seen):
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(H):
        dq[:, h], dkh, dvh = attend_one_backward(do[:, h], q[:, h], k[:, h // R], v[:, h // R], seen, tile=8)
        dk[:, h // R] += dkh  # a key that serves R heads gets R gradients
        dv[:, h // R] += dvh
    return dq, dk, dv


def slope(f, z, where, h=1e-5):
    up, down = z.copy(), z.copy()
    up[where] += h
    down[where] -= h
    return (f(up) - f(down)) / (2 * h)


do = rng.standard_normal(o.shape)
grads = attend_backward(do, q, k, v, window)
arrays = {"q": q, "k": k, "v": v}
for name, grad in zip(arrays, grads):
    some = [tuple(rng.integers(grad.shape)) for _ in range(40)]

    def loss(z, name=name):
        return (do * attend(**(arrays | {name: z}), seen=window)[0]).sum()

    worst = max(abs(grad[i] - slope(loss, arrays[name], i)) for i in some)
    print(f"d{name} {grad.shape}: by hand against finite differences {worst:.0e}")
    assert worst < 1e-7

_, saved = reference.attention(q[None], k[None], v[None], window=W)
for found, expected in zip(reference.attention_backward(do[None], saved), grads):
    np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-12)
print("the library agrees, forward and backward")

# %%
# Broken on purpose
# -----------------
# **1. The window turned round.** This mask is in circulation. Which keys does it show?
distances = np.arange(T)[:, None] - np.arange(T)  # i − j, query minus key
wrong = (distances <= 0) & (distances >= -W)

figure, axes = plt.subplots(1, 2, figsize=(7, 3.3), layout="constrained", sharey=True)
for ax, mask, name in zip(axes, (window, wrong), ("itself and W − 1 before", "itself and W after")):
    ax.imshow(mask, cmap="Blues", vmax=1.5)
    ax.set(xlabel="key", title=name)
axes[0].set_ylabel("query")
figure.suptitle("The mask in circulation looks into the future, at one key too many", fontsize=10)
plt.show()

print("keys that a token in the middle sees:", window[13].sum(), "and", wrong[13].sum())
assert not (wrong & (distances > 0)).any()
assert wrong[13].sum() == W + 1

# %%
# ``i − j`` is positive for keys in the past, so ``<= 0`` is the future. In training that is the answer. A head needs
# no more than to look one token ahead, and rotary positions make it easy: with :math:`\bar k_j = e^{i\varphi_j}` all
# pairs agree where :math:`m - n = -1`. We build such a head by hand, let its value be the byte itself, and ask for the
# next byte.
ahead = np.ones((1, T, 1, K)) * np.tile([1.0, 0.0], K // 2)  # q: every pair is 1
look = np.conj(rotation[1]).view(np.float64) * np.ones((1, T, 1, K))  # k: every pair is exp(−iφ)
hand_q, hand_k = (reference.rope(rows, rotation)[0][0, :, 0] for rows in (ahead, look))
bytes_seen = np.eye(256)[tokens]  # (T, V) the value of a token is its own one-hot


def next_byte_loss(mask):
    found, _ = attend_one(60 * hand_q, hand_k, bytes_seen, mask)  # 60: certain of itself
    return reference.cross_entropy(20 * found[:-1], tokens[1:])[0]


print(f"loss with the right mask {next_byte_loss(window):.2f}, with the wrong one {next_byte_loss(wrong):.6f} nats")
assert next_byte_loss(wrong) < 0.01 < 1 < next_byte_loss(window)

# %%
# Gradient descent has every reason to find such a head. The loss is wonderful, and the model cannot write, because
# then there is no future to look at. The test takes two lines and belongs in every implementation: **change the last
# token, and no earlier output may change.**
for name, mask in (("right", window), ("wrong", wrong)):
    other_k, other_v = k.copy(), v.copy()
    other_k[-1], other_v[-1] = rng.standard_normal((2, G, K))
    change = abs(attend(q, other_k, other_v, mask)[0] - attend(q, k, v, mask)[0])[:-1].max()
    print(f"{name} mask: earlier outputs change by {change:.2f}")
    assert (change == 0) == (name == "right")

# %%
# **2. A tile in which a query sees nothing.** With m = −∞ to begin with, the first tile of a window that starts later
# has only hidden keys: m stays −∞, and −∞ − (−∞) is NaN. It shows only for sequences longer than window and tile
# together, which no small test has. Our tiles began with the lowest finite number, which makes :math:`e^{-\infty} = 0`.
with np.errstate(invalid="ignore"):
    print("exp(−∞ − (−∞)) =", np.exp(np.float64(-np.inf) - np.float64(-np.inf)))
assert np.allclose(attend_in_tiles(q[:, 0], k[:, 0], v[:, 0], window, tile=4)[0], windowed[:, 0])

# %%
# **3. Heads dealt out in turn.** Head h belongs to key/value head :math:`\lfloor h / R \rfloor`, not h mod G. With
# G = H and with G = 1 both are the same, so tests with either pass.
dealt = [attend_one(q[:, h], k[:, h % G], v[:, h % G], causal)[0] for h in range(H)]
off = [np.linalg.norm(dealt[h] - o[:, h]) / np.linalg.norm(o[:, h]) for h in range(H)]
print("dealt out in turn, each head is off by", np.round(off, 2))
assert off[0] == 0
assert off[1] > 0.1

# %%
# Remember
# --------
# * Output = mean of values, in the weights of a softmax over scores :math:`q \cdot k / \sqrt K` with K of the head.
# * A query at t sees :math:`t - W < s \le t`: itself and W − 1 before. Test it by changing the last token.
# * A softmax can be taken in pieces: (m, ℓ, a), rescaled by :math:`e^{m - m'}`. So memory is O(T).
# * Backward: :math:`ds = P (dP - \delta)` with :math:`\delta = do \cdot o`, one number per query.
# * R query heads share a key/value head, whose gradient is the sum of theirs.
#
# **Ask yourself.** (a) What is the output of the first token? (b) With W = 1, what is dq? (c) Why does a row of ds sum
# to zero? (d) How many numbers per head and query does the backward need from the forward besides q, k, v and o?
# (e) Which of causal, window and grouped queries save memory when the model writes, and which only time?
#
# Exercises
# ---------
# 1. A model that writes has one query at a time, the newest. Show that a plain softmax over all keys gives the last
#    row of the outputs, and that shuffling keys together with their values changes nothing. Why may it not be so in
#    training?
# 2. How many scores does a head need for T = 32,768, causal, and with W = 4096? Give formulas, and check them by
#    counting a mask.
# 3. Add one vector c to all keys, after their rotation. What happens to the output? What follows for the sum of dk
#    over all keys? Check both.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) its own value; (b) 0, its weight is 1 whatever the score; (c) adding a number to a row of scores
# changes nothing; :math:`\sum_s P_s (dP_s - \delta) = \delta - \delta`; (d) one, :math:`\ln \sum \exp`, with
# :math:`\delta` made from do and o; (e) the window, which lets old keys be forgotten, and grouped queries, which have
# fewer of them. Causal is what makes keeping them possible at all.
#
# 1. The newest token sees everything, so there is nothing to hide, and a sum has no order; the positions are in the
#    rotations already. In training every row but the last must be kept from seeing what follows it.
shuffle = rng.permutation(T)
newest = reference.attention_decode(q[None, -1:], k[None, shuffle], v[None, shuffle])
np.testing.assert_allclose(newest[0, 0], o[-1], rtol=1e-9, atol=1e-12)

# %%
# 2. Causal T (T + 1)/2. With a window, the first W rows have 1, 2, …, W and all others W:
#    :math:`W (W + 1)/2 + (T - W) W`.


def scores_needed(length, width):
    return width * (width + 1) // 2 + (length - width) * width


print(f"{scores_needed(32768, 32768):,} and {scores_needed(32768, 4096):,}")
assert scores_needed(T, W) == window.sum()
assert scores_needed(T, T) == causal.sum()

# %%
# 3. Every score of a query rises by :math:`q \cdot c / \sqrt K`, and a softmax does not see that. The loss stays for
#    every c, so its derivative by c, which is the sum of dk over the keys, is 0.
c = rng.standard_normal((1, G, K))
np.testing.assert_allclose(attend(q, k + c, v, window)[0], windowed, rtol=1e-9, atol=1e-12)
assert np.allclose(grads[1].sum(axis=0), 0)

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** the parts around the mixture are built. :doc:`Lesson 5 </lessons/lesson_05_router>` is about who decides
# which experts a token uses.
