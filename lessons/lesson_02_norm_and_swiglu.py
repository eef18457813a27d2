r"""
Lesson 2 · Norm and SwiGLU: one token at a time
===============================================

**The question.** A layer changes a token's row twice: attention lets it look at others, and a feed-forward block
works on what it has by itself. What is that block made of, why does a norm stand before it, and what are the
gradients of both?

Nearly all of Mixtral's parameters are in such blocks, 45.1 of 46.7 billion, because there are eight in each of 32
layers: the experts. One expert is what we build here, three matrices and one curve. The norm is small and has the
derivative that people get wrong most often.

**You need** matrix products and the chain rule. On paper, with numbers small enough for fractions, the two stand in
:doc:`/math/rmsnorm` and :doc:`/math/experts`.
"""

# %%
# Rows that grow
# --------------
# Every block of the model *adds* its output to the row that it read, :math:`x \leftarrow x + f(x)`, so that a gradient
# always has a straight way down. The sum grows. We look at what that does through 48 blocks, each a random matrix
# that makes a row 1.2 times as long: without the sum, with it, and with a norm in front of the matrix.
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)  # (N,)
N, D, F = len(tokens), 16, 24

rng = np.random.default_rng(0)
x = rng.standard_normal((256, D))[tokens]  # (N, D): the same byte gives the same row


def rms(x):
    return np.sqrt((x**2).mean(axis=1))  # (N,) root mean square: the typical size of an element


matrices = 1.2 * rng.standard_normal((48, D, D)) / D**0.5
sizes = {}
for name in ("x = f(x)", "x = x + f(x)", "x = x + f(norm(x))"):
    row, sizes[name] = x, [rms(x).mean()]
    for w in matrices:
        inside = row / rms(row)[:, None] if "norm" in name else row
        row = inside @ w.T + (row if "+" in name else 0)
        sizes[name].append(rms(row).mean())
    print(f"{name:20s} after 48 blocks: {sizes[name][-1]:10.1f}")
assert sizes["x = x + f(norm(x))"][-1] < 20 < sizes["x = x + f(x)"][-1]

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name, size in sizes.items():
    axes.semilogy(size, label=name)
axes.set(xlabel="blocks", ylabel="typical size of an element")
axes.set_title("With a norm in front of each block a row grows like a root, without it exponentially", fontsize=10)
axes.legend(fontsize=8)
plt.show()

# %%
# With the norm each block adds a row of about the same size, and sums of independent terms of one size grow with the
# root of their number. Without it each block multiplies, and a deep model is a matter of luck.
#
# RMSNorm
# -------
# Divide a row by its root mean square, then give each of the D elements a learned scale:
#
# .. math:: r = \Bigl( \tfrac1D \sum_i x_i^2 + \varepsilon \Bigr)^{-1/2}, \qquad \hat x_i = r \, x_i, \qquad
#           y_i = w_i \, \hat x_i .
#
# That is all. LayerNorm, its predecessor, also subtracts the mean and adds a bias; RMSNorm does without both (Zhang
# and Sennrich 2019). :math:`\varepsilon` is :math:`10^{-5}` in Mixtral and keeps a row of zeros from dividing by zero.
EPS = 1e-5


def rmsnorm(x, weight):
    r = ((x**2).mean(axis=1, keepdims=True) + EPS) ** -0.5  # (N, 1)
    return weight * (x * r), (x * r, r, weight)  # (N, D)


weight = 1 + 0.1 * rng.standard_normal(D)
y, saved = rmsnorm(x, weight)
print(f"y {y.shape}; typical sizes before {rms(x)[:3].round(2)} and after {rms(saved[0])[:3].round(4)}")

# %%
# Its gradient
# ------------
# Let :math:`g_i = dy_i w_i`, the gradient of :math:`\hat x_i`. An element :math:`x_j` acts in two ways. One is direct:
# :math:`\hat x_j = r x_j`, a share :math:`r g_j`. The other goes through r, which stands in *every* :math:`\hat x_i`:
#
# .. math:: \frac{\partial r}{\partial x_j} = -\tfrac12 (\ldots)^{-3/2} \cdot \frac{2 x_j}{D} = -\frac{r^3 x_j}{D},
#           \qquad dr = \sum_i g_i x_i .
#
# Both together, with :math:`\hat x = r x` put in twice:
#
# .. math:: dx_j = r g_j - \frac{r^3 x_j}{D} \sum_i g_i x_i
#           = r \Bigl( g_j - \hat x_j \cdot \tfrac1D \sum_i g_i \hat x_i \Bigr), \qquad
#           dw_i = \sum_n dy_{ni} \, \hat x_{ni} .
#
# The term that is subtracted is the part of g along the row itself. It has to go: a longer row gives the same output,
# so there is nothing to gain in that direction.


def rmsnorm_backward(dy, saved):
    x_hat, r, weight = saved
    g = dy * weight
    dx = r * (g - x_hat * (g * x_hat).mean(axis=1, keepdims=True))
    return dx, (dy * x_hat).sum(axis=0)


def slope(f, z, h=1e-5):
    d = np.zeros_like(z)
    for i in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[i] += h
        down[i] -= h
        d[i] = (f(up) - f(down)) / (2 * h)
    return d


dy = rng.standard_normal((N, D))
dx, dweight = rmsnorm_backward(dy, saved)
measured = slope(lambda z: (dy * rmsnorm(z, weight)[0]).sum(), x)
print("by hand against finite differences:", abs(dx - measured).max())
print(
    "dx along x, first token:", (dx[0] @ x[0]).round(6), "of", (np.linalg.norm(dx[0]) * np.linalg.norm(x[0])).round(2)
)
assert abs(dx - measured).max() < 1e-8
assert np.allclose(dweight, slope(lambda w: (dy * rmsnorm(x, w)[0]).sum(), weight), atol=1e-8)

# %%
# The part along x is not quite zero: :math:`\varepsilon` does see the length, a little. The library has the same
# lines, as :func:`tinymoe.reference.rmsnorm` and :func:`tinymoe.reference.rmsnorm_backward`.
from tinymoe import reference

library_y, library_saved = reference.rmsnorm(x, weight, EPS)
np.testing.assert_allclose(library_y, y, rtol=1e-12)
for found, expected in zip(reference.rmsnorm_backward(dy, library_saved), (dx, dweight)):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
print("the library agrees, forward and backward")

# %%
# A block that multiplies
# -----------------------
# The classical feed-forward block is a matrix, a curve that is applied to each element, and a matrix back. **SwiGLU**
# (Shazeer 2020) has two matrices going up, and multiplies what they give:
#
# .. math:: g = x W_1^\top, \qquad u = x W_3^\top, \qquad h = \mathrm{silu}(g) \odot u, \qquad o = h W_2^\top, \qquad
#           \mathrm{silu}(z) = z \, \sigma(z) = \frac{z}{1 + e^{-z}} .
#
# g is the *gate*: far below zero silu is nearly 0 and nothing of u passes; far above, silu(z) is nearly z. Between
# them is a dip. At 0 the slope is one half, and far below it is small but not zero: a unit is never quite dead, as
# one of ReLU's can be.


def sigmoid(z):
    return 0.5 * (1 + np.tanh(0.5 * z))  # the same as 1 / (1 + exp(−z)), and cannot overflow


def silu(z):
    return z * sigmoid(z)


def silu_slope(z):
    return sigmoid(z) + silu(z) * (1 - sigmoid(z))  # product rule, with σ' = σ (1 − σ)


z = np.linspace(-6, 6, 241)
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(z, silu(z), label="silu")
axes.plot(z, silu_slope(z), "--", label="its slope")
axes.plot(z, np.maximum(z, 0), ":", color="grey", label="ReLU")
axes.axhline(0, color="black", linewidth=0.5)
axes.set(xlabel="z", ylim=(-0.5, 3))
axes.set_title("silu is a soft ReLU that dips below zero; its slope is 1/2 at 0 and passes 1", fontsize=10)
axes.legend()
plt.show()
print(f"lowest value {silu(z).min():.3f} at z = {z[silu(z).argmin()]:.2f}; steepest {silu_slope(z).max():.3f}")

# %%
# What is the product for? A sum of curves of single directions is bad at *and*. Two units of SwiGLU can multiply two
# numbers exactly. Since :math:`\sigma(z) + \sigma(-z) = 1`,
#
# .. math:: \mathrm{silu}(z) - \mathrm{silu}(-z) = z\,\sigma(z) + z\,\sigma(-z) = z
#           \quad\Rightarrow\quad \mathrm{silu}(a) \cdot b + \mathrm{silu}(-a) \cdot (-b) = a\,b .
#
# So gates a and −a, ups b and −b, and a sum: four ones and their signs in three matrices. A ReLU block of any width
# is made of flat pieces and only comes near.


def ffn(x, w1, w2, w3):
    gate, up = x @ w1.T, x @ w3.T  # (N, F)
    hidden = silu(gate) * up  # (N, F)
    return hidden @ w2.T, (x, w1, w2, w3, gate, up, hidden)  # (N, D)


two = rng.standard_normal((5, 2))
product, _ = ffn(two, np.array([[1.0, 0], [-1, 0]]), np.array([[1.0, 1]]), np.array([[0.0, 1], [0, -1]]))
print("a · b by two SwiGLU units:", product[:, 0].round(4), "expected:", (two[:, 0] * two[:, 1]).round(4))
np.testing.assert_allclose(product[:, 0], two[:, 0] * two[:, 1], rtol=1e-12)

# %%
# The block, backward
# -------------------
# From the last line to the first. Each matrix product gives two gradients, of its data and of its weights: for
# :math:`y = x W^\top` they are :math:`dx = dy\,W` and :math:`dW = dy^\top x`, as each weight meets every row.
#
# .. math:: dh = do\,W_2, \quad dW_2 = do^\top h, \qquad du = dh \odot \mathrm{silu}(g), \quad
#           dg = dh \odot u \odot \mathrm{silu}'(g), \\
#           dx = dg\,W_1 + du\,W_3, \quad dW_1 = dg^\top x, \quad dW_3 = du^\top x .
#
# The row was read twice, so its two gradients add. That holds wherever something is used twice: *a copy forward is a
# sum backward*.


def ffn_backward(dout, saved):
    x, w1, w2, w3, gate, up, hidden = saved
    dhidden = dout @ w2  # (N, F)
    dup, dgate = dhidden * silu(gate), dhidden * up * silu_slope(gate)  # (N, F)
    return dgate @ w1 + dup @ w3, dgate.T @ x, dout.T @ hidden, dup.T @ x


w1, w3 = rng.standard_normal((2, F, D)) / D**0.5
w2 = rng.standard_normal((D, F)) / F**0.5
out, ffn_saved = ffn(y, w1, w2, w3)
dout = rng.standard_normal(out.shape)
grads = ffn_backward(dout, ffn_saved)
arrays = {"x": y, "w1": w1, "w2": w2, "w3": w3}
for name, grad in zip(arrays, grads):
    measured = slope(lambda z, name=name: (dout * ffn(*(arrays | {name: z}).values())[0]).sum(), arrays[name])
    print(f"d{name} {grad.shape}: by hand against finite differences {abs(grad - measured).max():.0e}")
    assert abs(grad - measured).max() < 1e-7

library_out, library_saved = reference.ffn(y, w1, w2, w3)
np.testing.assert_allclose(library_out, out, rtol=1e-9, atol=1e-12)
for found, expected in zip(reference.ffn_backward(dout, library_saved), grads):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
print("the library agrees, forward and backward")

# %%
# Put together as in the model, with the norm in front and the sum around both, the order of the backward is the order
# of the forward, reversed. The sum makes a copy of x, so its gradient has two shares: straight, and through the block.


def block_loss(x):
    return (dout * (x + ffn(rmsnorm(x, weight)[0], w1, w2, w3)[0])).sum()


dnormed = grads[0]  # of the norm's output
dblock = dout + rmsnorm_backward(dnormed, saved)[0]
assert np.allclose(dblock, slope(block_loss, x), atol=1e-7)

# %%
# What does it cost? An expert of Mixtral 8x7B has D = 4096 and F = 14336; a norm has D weights. This is where
# parameters go, and why one shares attention and multiplies these.
per_expert = 3 * 4096 * 14336
print(f"one expert {per_expert:,} parameters, times 8 experts and 32 layers: {8 * 32 * per_expert:,}")
print(f"all norms: {(2 * 32 + 1) * 4096:,}")
assert 8 * 32 * per_expert == 45_097_156_608

# %%
# Broken on purpose
# -----------------
# **1. The term through r, forgotten.** ``dx = r * g`` looks right and has the right size. Its error is the part along
# the row, so the gradient pushes rows to become longer or shorter, to no effect on the loss.
wrong = saved[1] * dy * weight
print("without it: off by", (np.linalg.norm(wrong - dx) / np.linalg.norm(dx)).round(3))
along = ((wrong - dx) * x).sum(axis=1) / np.linalg.norm(wrong - dx, axis=1) / np.linalg.norm(x, axis=1)
assert np.allclose(abs(along), 1)  # the error of each row points along x
assert np.linalg.norm(wrong - dx) > 0.1 * np.linalg.norm(dx)

# %%
# **2. Gate and up swapped.** W1 and W3 have the same shape, and libraries name them differently (``gate_proj`` and
# ``up_proj``, or one stacked matrix). Nothing complains when a checkpoint is read the wrong way round. A model that is
# trained from its start in this way is as good as any; one that was trained the right way round writes nonsense.
swapped, _ = ffn(y, w3, w2, w1)
print("swapped: off by", (np.linalg.norm(swapped - out) / np.linalg.norm(out)).round(3))
assert np.linalg.norm(swapped - out) > 0.1 * np.linalg.norm(out)

# %%
# **3. The mean of squares in 16 bits.** bfloat16 has 8 bits of precision, so above 256 it cannot add one. A running sum
# of 4096 ones stops there, the norm believes the row to be four times smaller than it is, and everything after it is
# four times too large. So the sum is in float32, whatever the rows are in.
total = ml_dtypes.bfloat16(0)
for _ in range(4096):
    total += ml_dtypes.bfloat16(1)
print("4096 ones in bfloat16 add up to", total, "; the norm scales by", (float(total) / 4096) ** -0.5)
assert total == 256

# %%
# Remember
# --------
# * Every block adds to the row. The norm in front of it makes what it reads the same size at any depth.
# * RMSNorm's backward has two terms. The second takes away what points along the row:
#   :math:`dx = r (g - \hat x \, \mathrm{mean}(g \hat x))`.
# * SwiGLU is three matrices: silu of the gate (w1) decides how much of up (w3) passes, and w2 brings it back. It can
#   multiply.
# * :math:`y = x W^\top` has :math:`dx = dy\,W` and :math:`dW = dy^\top x`. A copy forward is a sum backward.
#
# **Ask yourself.** (a) A row is multiplied by 10, with :math:`\varepsilon = 0`: what happens to y, and to dx? (b) Why
# does a block with :math:`W_3 = 0` still learn, and one with :math:`W_2 = 0`? (c) What is a row's output when its gate
# is 0 in every unit? (d) Where is the sum over the tokens in :math:`dW = dy^\top x`? (e) Why is :math:`\varepsilon`
# inside the root?
#
# Exercises
# ---------
# 1. Derive and check the backward of LayerNorm without weights, :math:`\hat x = (x - \mu) / s` with :math:`\mu` the
#    mean and s the root of the variance. Which two directions does its dx not have?
# 2. Replace silu by the identity: the block computes :math:`W_2 (W_1 x \odot W_3 x)`. What is :math:`o(2x)`? Why might
#    one not want that, and what does silu change?
# 3. SwiGLU has three matrices where a ReLU block has two. For the same number of parameters as a ReLU block with
#    F = 4D, what is F? Compare with Mixtral's.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) y stays, dx is a tenth; (b) with :math:`W_3 = 0` the ups are 0 and so is o, but
# :math:`dW_3 = du^\top x` is not; with :math:`W_2 = 0` likewise :math:`dW_2` is not, though all else is. With both 0
# nothing would move; (c) 0; (d) in the product's inner dimension: every row adds its :math:`dy_n x_n^\top`; (e) so
# that the derivative stays finite at x = 0, where a root has none.
#
# 1. The mean takes one more term: :math:`dx = \tfrac1s ( g - \bar g - \hat x \, \mathrm{mean}(g \hat x) )`. It has no
#    part along :math:`\hat x`, and none along the row of ones, since adding a constant changes nothing.


def layernorm(x):
    centred = x - x.mean(axis=1, keepdims=True)
    s = np.sqrt((centred**2).mean(axis=1, keepdims=True))
    return centred / s, s


x_hat, s = layernorm(x)
by_hand = (dy - dy.mean(axis=1, keepdims=True) - x_hat * (dy * x_hat).mean(axis=1, keepdims=True)) / s
np.testing.assert_allclose(by_hand, slope(lambda z: (dy * layernorm(z)[0]).sum(), x), atol=1e-8)
assert np.allclose(by_hand.sum(axis=1), 0)
assert np.allclose((by_hand * x_hat).sum(axis=1), 0)

# %%
# 2. It is quadratic: :math:`o(2x) = 4\,o(x)`, and :math:`o(-x) = o(x)`: it cannot tell a row from its opposite. silu
#    breaks the symmetry, since a gate below zero is nearly closed.
bilinear = ((y @ w1.T) * (y @ w3.T)) @ w2.T
np.testing.assert_allclose(((2 * y @ w1.T) * (2 * y @ w3.T)) @ w2.T, 4 * bilinear)
np.testing.assert_allclose(((-y @ w1.T) * (-y @ w3.T)) @ w2.T, bilinear)
assert not np.allclose(ffn(-y, w1, w2, w3)[0], out)

# %%
# 3. :math:`3 F D = 2 \cdot 4D \cdot D` gives :math:`F = 8D/3`, 10,923 for D = 4096. Mixtral's is 14,336 = 3.5 D.
print(8 * 4096 / 3, 14336 / 4096)
assert 14336 == 3.5 * 4096

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** neither block knows where in the text a token stands. :doc:`Lesson 3 </lessons/lesson_03_rotary>` tells it
# to those that compare tokens.
