r"""
Lesson 3 · Rotary positions: how far, not where
===============================================

**The question.** Attention compares tokens by dot products, and a dot product does not know where its two rows stand.
How can the order of a text get into it, so that a pattern learned at position 10 also holds at position 10,000?

The answer is a rotation: each query and key is turned by an angle that grows with its position, and in the product of
both only the difference of their angles is left. It has no weights. We derive it from what we want, build it with
complex numbers, look at what its one constant θ does, and then at the two ways in which the same rotation lies in
files, which is where a loader of checkpoints fails without a word.

**You need** complex numbers as far as :math:`e^{i\alpha} = \cos\alpha + i \sin\alpha`. On paper: :doc:`/math/rope`.
"""

# %%
# A product that cannot count
# ---------------------------
# Queries and keys are rows that a matrix made from tokens; the query of a token asks, the key of another answers, and
# their dot product, the *score*, says how well they fit. In our line the byte ``a`` stands at three places. Its key
# is the same each time, so the last token cannot tell them apart.
import matplotlib.pyplot as plt
import numpy as np

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)  # (T,)
T, K = len(tokens), 16  # K: head_dim

rng = np.random.default_rng(0)
q = rng.standard_normal((256, K))[tokens]  # (T, K): the same byte has the same query and the same key
k = rng.standard_normal((256, K))[tokens]  # (T, K)
places = np.flatnonzero(tokens == ord("a"))
print("a stands at", places, "; scores of the last token with them:", (q[-1] @ k[places].T).round(4))
assert np.ptp(q[-1] @ k[places].T) < 1e-12

# %%
# What we want
# ------------
# Linear maps that put a position into a row, :math:`q \mapsto R_m q` and :math:`k \mapsto R_n k`, with
# :math:`R_0 = 1`, such that the score :math:`(R_m q) \cdot (R_n k)` depends on q, k and :math:`m - n` alone. Shift
# both by the same amount, and nothing changes. Then
#
# * with m = n the score is what it was at 0: :math:`(R_m q) \cdot (R_m k) = q \cdot k` for all q and k. So each
#   :math:`R_m` keeps lengths and angles, and its inverse is its transpose.
# * :math:`(R_m q) \cdot (R_n k) = (R_n^\top R_m \, q) \cdot k`, so :math:`R_n^\top R_m` depends on :math:`m - n` alone.
#   With n = 0 it is :math:`R_m`. Hence :math:`R_n^{-1} R_m = R_{m-n}`: turning by m and back by n is turning by the
#   difference, and :math:`R_m = R_1 R_1 \cdots R_1`, m times.
#
# So positions are powers of one rotation. Any rotation of K dimensions, K even, is K/2 rotations of a plane each, in
# suitable axes. Which axes does not matter, since a trained matrix stands in front: we take neighbours. Two numbers
# are then a point of a plane, :math:`z = x_{2j} + i\,x_{2j+1}`, and a rotation is a product with
# :math:`e^{i\varphi_j}`. All that is left to choose is the K/2 speeds :math:`\varphi_j`.
#
# That it does what we want is one line, with :math:`\mathrm{Re}(q \bar k)` the dot product of two points of a plane:
#
# .. math:: \mathrm{Re}\bigl( q e^{im\varphi} \; \overline{k e^{in\varphi}} \bigr)
#           = \mathrm{Re}\bigl( q \bar k \; e^{i(m-n)\varphi} \bigr).
#
# In code
# -------
# The speeds are a geometric series from 1 downwards, :math:`\varphi_j = \theta^{-2j/K}` (Su et al. 2021). A view makes
# K numbers K/2 complex ones; no element is moved.


def table(positions, head_dim, theta):
    speeds = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (K/2,)
    return np.exp(1j * np.multiply.outer(positions, speeds))  # (T, K/2)


def rotate(x, rotation):
    return (x.view(np.complex128) * rotation).view(np.float64)  # (T, K)


theta = 1e4
rotation = table(np.arange(T), K, theta)
print(f"q {q.shape}, as complex {q.view(np.complex128).shape}, rotations {rotation.shape}")

turned_q, turned_k = rotate(q, rotation), rotate(k, rotation)
print("scores of the last token with each a:", (turned_q[-1] @ turned_k[places].T).round(4))
assert np.ptp(turned_q[-1] @ turned_k[places].T) > 0.1

# %%
# The three differ now. And if the whole line stands 5000 tokens further on, no score changes:
far = table(np.arange(5000, 5000 + T), K, theta)
scores, scores_far = turned_q @ turned_k.T, rotate(q, far) @ rotate(k, far).T  # (T, T)
print("largest difference:", abs(scores - scores_far).max())
assert abs(scores - scores_far).max() < 1e-9
assert np.allclose(np.linalg.norm(turned_q, axis=1), np.linalg.norm(q, axis=1))

# %%
# In one plane it can be drawn. A query and a key, at three pairs of positions that are two apart: both turn, and the
# angle between them stays.
figure, axes = plt.subplots(1, 3, figsize=(8, 2.9), layout="constrained", sharex=True, sharey=True)
for ax, m in zip(axes, (2, 3, 5)):
    point_q, point_k = (1 + 0.3j) * np.exp(0.5j * m), (0.7 - 0.4j) * np.exp(0.5j * (m - 2))
    for point, name, colour in ((point_q, "q", "C0"), (point_k, "k", "C1")):
        ax.annotate("", (point.real, point.imag), (0, 0), arrowprops=dict(arrowstyle="->", color=colour, lw=2))
        ax.text(1.15 * point.real, 1.15 * point.imag, name, color=colour, ha="center", va="center")
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xlabel=f"q at {m}, k at {m - 2}")
    ax.text(-1.3, -1.3, f"q · k = {(point_q * point_k.conjugate()).real:.3f}", fontsize=9)
figure.suptitle("Both turn with their position; two apart, the angle between them is always the same", fontsize=10)
plt.show()

# %%
# The gradient
# ------------
# A rotation is linear, so its backward is its transpose, and the transpose of a rotation is the rotation back:
# multiply by the conjugate. Nothing needs to be saved but the table.
dy = rng.standard_normal((T, K))
dx = rotate(dy, rotation.conj())


def slope(f, z, h=1e-5):
    d = np.zeros_like(z)
    for i in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[i] += h
        down[i] -= h
        d[i] = (f(up) - f(down)) / (2 * h)
    return d


measured = slope(lambda z: (dy * rotate(z, rotation)).sum(), q)
print("by hand against finite differences:", abs(dx - measured).max())
assert abs(dx - measured).max() < 1e-8

# %%
# The library does the same to (B, T, H, K), all heads with one table: :func:`tinymoe.reference.rope_table`,
# :func:`tinymoe.reference.rope` and :func:`tinymoe.reference.rope_backward`.
from tinymoe import reference

library_table = reference.rope_table(np.arange(T), K, theta, np.float64)
library_y, saved = reference.rope(q[None, :, None, :], library_table)
np.testing.assert_allclose(library_y[0, :, 0], turned_q, rtol=1e-12)
np.testing.assert_allclose(reference.rope_backward(dy[None, :, None, :], saved)[0, :, 0], dx, rtol=1e-12)
print("the library agrees, forward and backward")

# %%
# What θ does
# -----------
# Pair j comes round after :math:`2\pi / \varphi_j` tokens: the fastest after 6.28, whatever θ is, the slowest after
# nearly :math:`2\pi\theta`. Fast pairs tell neighbours apart, and repeat; slow ones hardly move within a sentence, and
# tell near from far. Within a context, only the pairs that do *not* come round say without doubt how far away a key
# is. Mistral 7B has :math:`\theta = 10^4`, Mixtral :math:`10^6` for its 32,768 tokens, both with K = 128:
for theta_of, name in ((1e4, "Mistral 7B"), (1e6, "Mixtral")):
    turn = 2 * np.pi * theta_of ** (np.arange(0, 128, 2) / 128)  # (K/2,) tokens to come round
    print(f"{name:10s} slowest pair: {turn[-1]:9,.0f} tokens; slower than 32,768: {(turn > 32768).sum()} of 64 pairs")

# %%
# Let all pairs of q and k agree, :math:`q_j \bar k_j = 1`. The score at a distance d is then
# :math:`\sum_j \cos(d \varphi_j)`: highest at the same place, falling with distance, and with a large θ more slowly.
# A trained model turns its q and k as it likes; this is only what it starts from.
distance = np.arange(32768)
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for theta_of in (1e4, 1e6):
    speeds = theta_of ** (-np.arange(0, 128, 2) / 128)
    agree = sum(np.cos(distance * speed) for speed in speeds) / 64
    axes.semilogx(distance[1:], agree[1:], label=f"θ = {theta_of:,.0f}", linewidth=1)
axes.set(xlabel="distance in tokens", ylabel="score / 64, if all pairs agree")
axes.set_title("The score of agreeing pairs falls with distance; with a larger θ it reaches further", fontsize=10)
axes.legend()
plt.show()

# %%
# Two layouts
# -----------
# Which two elements are a pair? Mistral's own files, the paper and this library take **neighbours**, (2j, 2j + 1).
# transformers takes **halves**, (j, j + K/2), and writes the rotation without complex numbers:
#
# .. math:: y = x \odot \cos + \mathrm{rotate\_half}(x) \odot \sin, \qquad
#           \mathrm{rotate\_half}(a, b) = (-b, a).
#
# Neither is better. But the rows of :math:`W_q` make the elements of q, so a matrix in one layout has its rows in
# another order than in the other. To go from halves to neighbours, reorder the rows of each head from
# (Re₀, Re₁, …, Im₀, Im₁, …) to (Re₀, Im₀, Re₁, Im₁, …): the transpose of a (2, K/2) array of rows. Both :math:`W_q`
# and :math:`W_k`, and only those.


def rotate_halves(x, positions, theta):
    angles = np.multiply.outer(positions, theta ** (-np.arange(0, K, 2) / K))  # (T, K/2)
    cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)  # (T, K)
    a, b = np.split(x, 2, axis=1)
    return x * cos + np.concatenate([-b, a], axis=1) * sin


def neighbours_from_halves(w):
    return w.reshape(2, K // 2, -1).swapaxes(0, 1).reshape(w.shape)  # one head: (K, D)


D = 24
x = rng.standard_normal((T, D))
wq, wk = rng.standard_normal((2, K, D)) / D**0.5  # as in a file of transformers
theirs = rotate_halves(x @ wq.T, np.arange(T), theta) @ rotate_halves(x @ wk.T, np.arange(T), theta).T
ours = [rotate(x @ neighbours_from_halves(w).T, rotation) for w in (wq, wk)]
print("the order of a head of 8 rows:", np.arange(8).reshape(2, 4).T.ravel())
print("scores of both layouts, largest difference:", abs(ours[0] @ ours[1].T - theirs).max())
np.testing.assert_allclose(ours[0] @ ours[1].T, theirs, atol=1e-12)

from tinymoe.checkpoint import neighbours_from_halves as library_reorder

assert (library_reorder(wq, heads=1) == neighbours_from_halves(wq)).all()

# %%
# Broken on purpose
# -----------------
# **1. The other layout.** Leave the reordering out. All shapes fit, no error is raised, and all is well as long as
# query and key stand at the *same* place, since both are then turned alike. At any other distance it is not.
mixed = [rotate(x @ w.T, rotation) for w in (wq, wk)]
error = abs(mixed[0] @ mixed[1].T - theirs)  # (T, T)
print(f"error at distance 0: {error.diagonal().max():.0e}; elsewhere up to {error.max():.2f}")
assert error.diagonal().max() < 1e-12
assert error.max() > 1

# %%
# So a test with a prompt of one token passes. Reordering :math:`W_q` alone is wrong even at distance 0.
half_done = rotate(x @ neighbours_from_halves(wq).T, rotation) @ rotate(x @ wk.T, rotation).T
assert abs(half_done - theirs).diagonal().max() > 0.1

# %%
# **2. Positions that start again.** When a model writes, it computes one token at a time, against keys that were
# turned when they were made. If the new token is turned as if it stood at position 0, every distance is wrong, and
# the keys seem to lie in its future.
restarted = rotate(q[-1:], table(np.array([0]), K, theta)) @ turned_k.T
off = np.linalg.norm(restarted - scores[-1]) / np.linalg.norm(scores[-1])
print(f"restarted: off by {off:.2f}")
assert off > 0.1

# %%
# **3. Angles in few bits.** The angle of the fastest pair at position t is t radians. bfloat16 has 8 bits: above 256 it
# cannot tell neighbours apart, so that whole runs of tokens share a position. float32 is off by up to 0.002
# radians at 32,768. The library computes angles in float64, then rounds cosine and sine.
import ml_dtypes

positions = np.arange(1024)
rounded = positions.astype(ml_dtypes.bfloat16).astype(int)
print("positions 1000 to 1007 in bfloat16:", rounded[1000:1008], f"; {len(set(rounded))} of 1024 are distinct")
print("spacing of float32 at 32,768:", np.spacing(np.float32(32768)))
assert len(set(rounded)) < 1024

# %%
# Remember
# --------
# * A dot product has no order. A rotation by position puts it in, and only the distance is left in the score.
# * It follows from the wish: linear maps whose score sees the difference of positions alone are powers of one rotation.
# * Two neighbours are one complex number; forward multiplies by :math:`e^{it\varphi_j}`, backward by its conjugate.
# * θ sets how slowly the slowest pair turns. It belongs to the weights: a model trained with one is wrong with another.
# * transformers pairs halves. Reorder the rows of :math:`W_q` and :math:`W_k`, both or none.
#
# **Ask yourself.** (a) Why are values not rotated? (b) What are the scores if q and k are rotated by the same angle at
# all positions? (c) Which positions give the same score as (7, 3)? (d) What happens to the rotation as θ grows without
# bound? (e) Why may the axes of the planes be chosen freely?
#
# Exercises
# ---------
# 1. Write the rotation of a pair as a 2 × 2 matrix and show that its transpose is the rotation by −α. Check with the
#    table.
# 2. Stretch a context: a model was trained up to 2048 positions. Divide all positions by 4, as "position
#    interpolation" does. What does a score at distance 400 become? What is lost?
# 3. Show that turning q by :math:`m - n` and leaving k alone gives the same score. Why is it not done so?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) a value is what is taken over, not compared: rotated, the sum would depend on where it was read;
# (b) as without rotation; (c) all with distance 4, such as (4, 0); (d) all pairs but the first stand still; (e) a
# trained matrix stands in front and can put its outputs along any axes.
#
# 1. :math:`R = \begin{pmatrix} \cos\alpha & -\sin\alpha \\ \sin\alpha & \cos\alpha \end{pmatrix}`; cosine is even and
#    sine odd, so that the transpose is R with −α.
alpha = np.angle(rotation[3, 1])
R = np.array([[np.cos(alpha), -np.sin(alpha)], [np.sin(alpha), np.cos(alpha)]])
np.testing.assert_allclose(R @ q[3, 2:4], turned_q[3, 2:4], rtol=1e-12)
np.testing.assert_allclose(R.T @ R, np.eye(2), atol=1e-12)

# %%
# 2. What a distance of 100 was: all angles are a quarter. The model knows every angle that it sees, but neighbours are
#    now a quarter of a step apart, and the fast pairs, which tell them from each other, say less.
slow = table(np.arange(8192) / 4, K, theta)
stretched = (rotate(q[:1], slow[400:401]) @ rotate(k[1:2], slow[:1]).T).item()
known = (rotate(q[:1], table(np.array([100]), K, theta)) @ rotate(k[1:2], slow[:1]).T).item()
print(f"{stretched:.6f} and {known:.6f}")
assert np.isclose(stretched, known)

# %%
# 3. :math:`\mathrm{Re}(q e^{i(m-n)\varphi} \, \bar k)` is the same number. But then each query must be turned anew
#    for every key, T² rotations in place of 2T.
one = rotate(q[20:21], table(np.array([20 - 4]), K, theta)) @ k[4]
assert np.isclose(one.item(), scores[20, 4])

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** scores that know distances are what :doc:`lesson 4 </lessons/lesson_04_attention>` needs to let each token
# look back at those before it.
