r"""
Lesson 16 · Backward kernels: two more products, and sums that keep their order
===============================================================================

**The question.** Every product of the forward has two gradients, and every copy of a row becomes a sum of rows. Sums of
floats depend on their order, and threads have none. How can a backward use thousands of them and return the same bits
each time?

We go back through the experts and the combine of a layer: the gradients of a grouped product, of the SwiGLU, and of the
copies that dispatch made; first derived, then as kernels in the emulator, checked by finite differences and against the
reference. On the way we do it the other way too, with atomic additions, and look at what they cost. None of this has
been timed on a GPU.

**You need** the grouped product of :doc:`lesson 15 </lessons/lesson_15_grouped_gemm>` and the plan of
:doc:`lesson 14 </lessons/lesson_14_dispatch_kernels>`. On paper: :doc:`/math/experts`, :doc:`/math/dispatch`.
"""

# %%
# Two gradients of a product
# --------------------------
# For the rows of one expert :math:`y_{sf} = \sum_d x_{sd} W_{fd}`. Both factors are linear, so the gradient of each is
# the sum over what it touches:
#
# .. math:: dx_{sd} = \sum_f dy_{sf} W_{fd} \quad\Rightarrow\quad dx = dy\, W, \qquad\qquad
#           dW_{fd} = \sum_s dy_{sf}\, x_{sd} \quad\Rightarrow\quad dW = dy^\top x .
#
# Forward and **dgrad** are rows times weight: as many output rows as the group has. **wgrad** is another kind: its
# output has the size of the weight, and the group is what it sums over. Each has the FLOPs of the forward, so the
# backward is twice the forward, whatever the routing.
import tempfile
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tinymoe import cuda, reference
from tinymoe.cuda import device
from tinymoe.cuda.emulator import ORDERS, KernelError, compiler, scheduled
from tinymoe.cuda.grouped_gemm import grouped_dw, grouped_dx

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)
N, D, F, E, k = len(tokens), 16, 24, 6, 2
rng = np.random.default_rng(0)
x = rng.standard_normal((256, D))[tokens]  # (N, D): the same byte gives the same row
x[:, 0] = 1
w_gate = rng.standard_normal((E, D)) / D**0.5
w_gate[5, 0] = -30  # so that nobody chooses expert 5
w1, w3 = rng.standard_normal((2, E, F, D)) / D**0.5
w2 = rng.standard_normal((E, D, F)) / F**0.5

routing, _ = reference.route(x, w_gate, k)
plan = reference.dispatch(routing.experts, E)
S, offsets = N * k, plan.offsets
print("rows by expert:", np.diff(offsets).tolist())
assert offsets[5] == offsets[6] == S

# %%
# dgrad is the forward's kernel with W read the other way round. No transposed copy of a weight is ever made: where the
# forward takes row ``column`` of W, dgrad takes row ``i``, and both are one template argument apart:
show = (device.KERNELS / "grouped_gemm/1_naive.cu").read_text().splitlines()
print(next(line for line in show if "TRANSPOSED ? w" in line).strip())

rows, dy = x[plan.tokens], rng.standard_normal((S, F))  # (S, D), (S, F)
with device.using("checked"):
    there = [device.array(a, np.float32) for a in (dy, w1)]
    dx = grouped_dx(*there, device.array(offsets, np.int32))
by_expert = [slice(begin, end) for begin, end in pairwise(offsets)]
np.testing.assert_allclose(dx, np.concatenate([dy[part] @ w1[e] for e, part in enumerate(by_expert)]), atol=1e-5)
print("dgrad", dx.shape, "equals a product per expert")

# %%
# wgrad, a kernel of our own
# --------------------------
# A thread for each element of dW, and a loop over the expert's slots. An expert without rows has an empty sum, and an
# empty sum is zero, exactly.
WGRAD = """#include "prelude.h"

__global__ void wgrad(const float *dy, const float *x, const int *tokens, const int *offsets, float *dw, int F, int D) {
    const int e = blockIdx.y, f = blockIdx.x, d = threadIdx.x;
    float sum = 0;
    for (int s = offsets[e]; s < offsets[e + 1]; s++) sum += dy[s * F + f] * x[tokens[s] * D + d];
    dw[(e * F + f) * D + d] = sum;
}
"""
folder = tempfile.TemporaryDirectory()


def kernels_of(source, name):
    path = Path(folder.name, f"lesson_{name}.cu")
    path.write_text(source)
    kernels = device.Kernels(str(path), name)
    device.ALL.remove(kernels)  # the list is of tinymoe's own
    return kernels


def wgrad(source=WGRAD):
    with device.using("checked"):
        there = [device.array(dy, np.float32), device.array(x, np.float32)]
        integers = [device.array(a, np.int32) for a in (plan.tokens, offsets)]
        dw = device.empty((E, F, D), np.float32)  # which the emulator fills with NaN
        kernels_of(source, "wgrad").launch("wgrad", (F, E), D, *there, *integers, dw, F, D)
        library = grouped_dw(*there, integers[1], integers[0])
    return dw, library


dw, library = wgrad()
np.testing.assert_allclose(dw, [dy[part].T @ rows[part] for part in by_expert], atol=1e-5)
np.testing.assert_allclose(library, dw, atol=1e-5)
assert not dw[5].any()
assert not library[5].any()
print("wgrad", dw.shape, "equals the library's; the unchosen expert has exactly zero")

# %%
# The token rows are gathered while they are loaded, ``x[tokens[s]]``: nobody has made the copy ``rows`` on the device.
# And each element of dW has *one* thread, which adds its slots in the order of the text. That is all it takes to have
# the same bits each time.
#
# The tiled rungs do the same with a tile of dW to a block. There is no lack of blocks, so the sum need not be cut:
# 8x7B's w1 has 14,336 · 4096 / 128² = 3584 tiles for each expert.
#
# SwiGLU
# ------
# :math:`h = \mathrm{silu}(g) \odot u` with :math:`\mathrm{silu}(z) = z\,\sigma(z)`. By the product rule, and
# :math:`\sigma' = \sigma (1 - \sigma)`:
#
# .. math:: du = dh \odot \mathrm{silu}(g), \qquad
#           dg = dh \odot u \odot \bigl(\sigma + g\,\sigma\,(1 - \sigma)\bigr) .
#
# An element of the result needs nothing but the same element of three arrays, so it is bound by loading them. The
# library's kernel keeps g and u from the forward and computes the sigmoid again, which is one array less to keep:
source = (device.KERNELS / "experts.cu").read_text()
start = source.index("template <class T>\n__global__ void swiglu_backward")
print(source[start : source.index("}\n}\n", start) + 4])


def swiglu(g, u):
    return g / (1 + np.exp(-g)) * u


gate, up, dhidden = rng.standard_normal((3, S, F))
h = 1e-6
slopes = [(swiglu(gate + h, up) - swiglu(gate - h, up)) / (2 * h) * dhidden]
slopes += [(swiglu(gate, up + h) - swiglu(gate, up - h)) / (2 * h) * dhidden]
with device.using("checked"):
    _, saved = cuda.swiglu(*(device.array(a, np.float32) for a in (gate, up)))
    gradients = cuda.swiglu_backward(device.array(dhidden, np.float32), saved)
for name, by_kernel, measured in zip(("dgate", "dup"), gradients, slopes):
    error = np.linalg.norm(by_kernel - measured) / np.linalg.norm(measured)
    print(f"{name}: kernel in float32 against finite differences in float64, relative {error:.1e}")
    assert error < 1e-6

# %%
# A copy becomes a sum
# --------------------
# Dispatch copied each token's row to k slots. Backward, the token's gradient is the sum over these slots; combine,
# forward, is the same sum with weights. There are two ways to write it.
#
# **Scatter**: a thread for each slot adds its number to the token's. Two slots may hit the same token at the same time,
# so the addition must be atomic. **Gather**: a thread for each token fetches its k slots, in the order of its choices.
# Nobody else writes there. On paper they are the same sum. Let us take the first, for k = 2 and for k = 4, into zeros
# and into the residual stream, in twelve random schedules:
SCATTER = """#include "prelude.h"

__global__ void scatter(const float *out, const float *weights, const int *pairs, float *y, int k, int D) {
    const int s = blockIdx.x, d = threadIdx.x, pair = pairs[s];  // the pair that fills slot s
    atomicAdd(&y[pair / k * D + d], weights[pair] * out[s * D + d]);
}
"""


def scatter(out, weights, plan, begin, seed, source=SCATTER):
    """Mix rows by atomic additions, blocks in random order."""
    N, k = weights.shape
    with device.using("checked"), scheduled("shuffled", seed):
        there = [device.array(a, np.float32) for a in (out, weights)]
        pairs = device.array(np.argsort(plan.slots.ravel()), np.int32)
        y = device.empty((N, D), np.float32)
        y[...] = begin
        kernels_of(source, "scatter").launch("scatter", N * k, D, *there, pairs, y, k, D)
    return y


for choices in (2, 4):
    routed, _ = reference.route(x, w_gate, choices)
    their_plan = reference.dispatch(routed.experts, E)
    out = rng.standard_normal((N * choices, D))
    for name, begin in (("zeros", 0), ("the residual", x)):
        results = {scatter(out, routed.weights, their_plan, begin, seed).tobytes() for seed in range(12)}
        print(f"k = {choices}, atomics into {name:12}: {len(results):2} different results")
        assert (len(results) == 1) == (choices == 2 and name == "zeros")
    gathered = set()
    for seed in range(12):
        with device.using("checked"), scheduled("shuffled", seed):
            there = [device.array(a, np.float32) for a in (out, routed.weights)]
            on_device = cuda.dispatch(device.array(routed.experts, np.int32), E)
            gathered.add(cuda.combine(*there, on_device)[0].tobytes())
    print(f"k = {choices}, gathered in order        : {len(gathered):2}")
    assert len(gathered) == 1

# %%
# One of these lines surprises. With k = 2 into zeros even the atomics cannot disagree: float addition *commutes*,
# :math:`a + b = b + a` to the last bit. What it lacks is *associativity*, :math:`(a + b) + c \ne a + (b + c)`, and that
# takes three terms. (The zero is no third: 0 + a is exactly a.) Add the same two rows into the residual stream, and
# the schedule shows. Two terms into zeros is the most that a scatter can do safely, and a kernel that relies on it
# breaks with the next change.
#
# The library gathers, always: ``sum_slots`` in ``dispatch.cu`` is the combine, and with all weights 1 it is the
# backward of dispatch's copy.
#
# What an order costs
# -------------------
# An element of dW sums over hundreds or thousands of slots. Take 4096 terms, as a large batch would have, and add them
# in float32 in two thousand orders. In which would an atomic sum have added them? In any.
terms = (rng.standard_normal(4096) * rng.standard_normal(4096)).astype(np.float32)  # dy · x, slot by slot
exact = terms.astype(np.float64).sum()
shuffled = np.stack([rng.permutation(terms) for _ in range(2000)])
sums = np.add.accumulate(shuffled, axis=1)[:, -1]  # in the order of the row, one after the other
in_order = np.add.accumulate(terms)[-1]
last_place = np.spacing(np.float32(abs(exact)))
distinct = len(set(sums.tolist()))
print(f"in the order of the text {in_order:.6f}, exact {exact:.6f}")
assert distinct > 10

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.hist((sums - exact) / last_place, bins=60, color="C0")
axes.axvline((in_order - exact) / last_place, color="black", linewidth=1, label="in the order of the text")
axes.axvline((np.sum(terms) - exact) / last_place, color="C1", linestyle="--", label="np.sum, pairwise")
axes.set(xlabel="error in units of the last place of a float32", ylabel="of 2000 orders")
axes.legend()
axes.set_title(f"The same 4096 numbers added in 2000 orders: {distinct} different sums, none of them wrong")
plt.show()

# %%
# The fixed order is not more accurate. It is one of these, and the *same one each time*. What that buys: a run that is
# killed and resumed has the same bits as one that was not; a change that should not change results can be tested by
# comparing bits; and when a loss diverges, it diverges again. With atomics each of these needs a tolerance, and a
# router makes tolerances treacherous: where two experts are nearly equal, one last bit sends a token elsewhere.
#
# Sums over all rows, in two launches
# -----------------------------------
# A gain of RMSNorm, or the gate's gradient, sums over *all* rows, and has too few elements for a thread each to keep a
# GPU busy. Then the rows are cut into slices: first each (slice, element) has a thread, then a second launch adds the
# slices in order. The tree has a fixed shape, which depends on nothing but the sizes.
dlogits = rng.standard_normal((1000, E)).astype(np.float32)
many = rng.standard_normal((1000, D)).astype(np.float32)


def gate_gradient(slices):
    """dw_gate = dlogitsᵀ x: slices of rows, each in order, then the slices in order."""
    total = np.zeros((E, D), np.float32)
    for part in np.array_split(np.arange(1000), slices):
        partial = np.zeros((E, D), np.float32)
        for n in part:
            partial += dlogits[n][:, None] * many[n]
        total += partial
    return total


reference_gradient = dlogits.T.astype(np.float64) @ many
for slices in (1, 4, 16):
    error = np.linalg.norm(gate_gradient(slices) - reference_gradient) / np.linalg.norm(reference_gradient)
    print(f"{slices:2} slices: relative error {error:.1e}")
assert gate_gradient(4).tobytes() != gate_gradient(16).tobytes()
with device.using("checked"):
    arrays = [device.array(a) for a in (many, rng.standard_normal((E, D)).astype(np.float32))]
    _, route_saved = cuda.route(*arrays, k)
    nothing = device.zeros((1000, k), np.float32)
    by_order = []
    for order in ORDERS:
        with scheduled(order, 1):
            by_order.append(cuda.route_backward(nothing, device.array(dlogits), route_saved)[1])
np.testing.assert_allclose(by_order[0], reference_gradient, rtol=1e-4, atol=1e-4)
assert len({gradient.tobytes() for gradient in by_order}) == 1
print("the library's gate gradient: the same bits in", len(ORDERS), "schedules")

# %%
# More slices make shorter chains of additions, hence smaller errors, and other bits; a different schedule changes
# neither. So their number may depend on N, and not on the machine.
#
# Checked: the whole layer
# ------------------------
# First the reference against finite differences, along a random direction v of all parameters at once: with
# :math:`L = \sum dy \odot y` for a random dy and :math:`\theta` the input and every weight,
# :math:`(L(\theta + hv) - L(\theta - hv)) / 2h` must be :math:`dL \cdot v`. Then the kernels against the reference, in
# every schedule.
arrays = [x, w_gate, w1, w2, w3]
dtokens = rng.standard_normal((N, D))  # the gradient of the layer's result
_, saved = reference.moe(*arrays, k)
gradients = reference.moe_backward(dtokens, None, saved)
direction = [rng.standard_normal(a.shape) for a in arrays]
ahead, behind = (
    (reference.moe(*(a + sign * 1e-6 * v for a, v in zip(arrays, direction)), k)[0] * dtokens).sum() for sign in (1, -1)
)
measured, by_gradient = (ahead - behind) / 2e-6, sum((g * v).sum() for g, v in zip(gradients, direction))
print(f"slope along a random direction: {measured:.6f} measured, {by_gradient:.6f} by the gradients")
assert abs(measured - by_gradient) < 1e-6 * abs(measured)

results = []
for build, order in [("emulated", "forward"), *(("checked", order) for order in ORDERS)]:
    with device.using(build), scheduled(order, 2):
        _, saved = cuda.moe(*(device.array(a, np.float32) for a in arrays), k)
        results.append(cuda.moe_backward(device.array(dtokens, np.float32), None, saved))
for name, found, wanted in zip(("dx", "dw_gate", "dw1", "dw2", "dw3"), results[0], gradients):
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    print(f"{name:8} kernels against reference: {error:.1e}")
    assert error < 1e-5
assert len({b"".join(g.tobytes() for g in result) for result in results}) == 1
print("the same bits in both builds and all schedules")

# %%
# Broken on purpose
# -----------------
# **1. Nothing to do, so return.** A block that sees no rows for its expert leaves early, and dW keeps whatever was in
# memory. On a GPU that is often zeros, until it is an old gradient. The emulator fills what nobody has set with NaN:
lazy = WGRAD.replace("    float sum = 0;\n", "    if (offsets[e] == offsets[e + 1]) return;\n    float sum = 0;\n")
print("gradient of the unchosen expert:", wgrad(lazy)[0][5, 0, :4])
assert np.isnan(wgrad(lazy)[0][5]).all()

# %%
# **2. The scatter without atomics.** The fast build, in which each addition is whole, computes the right result. The
# checker finds the two blocks that share a token; NumPy's fancy index loses all additions but the last.
lost = SCATTER.replace("atomicAdd(&y[pair / k * D + d], ", "y[pair / k * D + d] += (")
out = rng.standard_normal((S, D))
try:
    scatter(out, routing.weights, plan, 0, 0, lost)
    raise AssertionError("nobody noticed")
except KernelError as error:
    caught = error
print(caught)
assert caught.kind == "race"

drows = rng.standard_normal((S, D))
right, wrong = np.zeros((N, D)), np.zeros((N, D))
np.add.at(right, plan.tokens, drows)
wrong[plan.tokens] += drows
print(
    "dx[tokens] += drows loses",
    f"{np.linalg.norm(wrong - right) / np.linalg.norm(right):.0%}",
    "of the gradient's norm",
)
np.testing.assert_allclose(reference.gather_backward(drows, reference.gather(x, plan)[1]), right, atol=1e-12)

# %%
# **3. The weight forgotten.** :math:`do_s = w_{nj}\, dy_n`: each slot's gradient has its token's mixing weight. Without
# it each token's part of dW is too large by 1/w, another factor for each token and expert; the loss falls all the same,
# and nothing but a comparison of gradients tells.
dout, _ = reference.combine_backward(dtokens, reference.combine(out, routing.weights, plan)[1])
without = dtokens[plan.tokens]
print(f"norm of the slots' gradients: {np.linalg.norm(dout):.2f}, without weights {np.linalg.norm(without):.2f}")
assert np.linalg.norm(dout) < np.linalg.norm(without)

# %%
# Remember
# --------
# * A product's gradients are two products: :math:`dx = dy\, W` and :math:`dW = dy^\top x`. wgrad is ragged in what it
#   sums over, and an expert without rows must *write* zeros.
# * A copy forward is a sum backward. Let the reader of the sum fetch its terms, and there is one writer and one order.
# * Float addition commutes but does not associate: two terms are safe in any order, three are not.
# * Large sums: slices in order, then the slices in order. Same sizes, same bits, whatever ran first.
#
# **Ask yourself.** (a) Why can dgrad run on the forward's kernel and wgrad not? (b) How many FLOPs has the experts'
# backward, with S slots? (c) What is dW of an expert with one row? (d) Why are atomics on *integers* repeatable?
# (e) Which of the layer's gradients read the mixing weights?
#
# Exercises
# ---------
# 1. The gradient of a mixing weight is :math:`o_s \cdot dy_n`, for which the layer keeps o. Show that
#    :math:`h_s \cdot (W_2^\top dy_n)` is the same number, so that o need not be kept.
# 2. How many bytes of activations does a layer of 8x7B keep for the experts' backward at 4096 tokens in bfloat16, if it
#    keeps gate, up and hidden? And if hidden is computed again?
# 3. Make an atomic sum repeatable: add *integers*. Scale the 4096 terms by 2⁴⁰, round them to int64, and add them in
#    several orders. How large is the error?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) both of the first have a row of output for each slot and a sum of fixed length; wgrad has an output
# of fixed size and a sum of ragged length; (b) six products of 2 S D F: 12 S D F; (c) the outer product of its dy and
# its x, a matrix of rank one; (d) integer addition is associative, also when it wraps around; (e) all of them: do
# has the weight as a factor, and through it dW and dx; the gate's :math:`d\ell = w (dw - \sum w\,dw)` has it, too. Only
# dw itself reads o and dy alone.
#
# 1. A scalar is its own transpose: :math:`o_s \cdot dy = (W_2 h_s) \cdot dy = h_s \cdot (W_2^\top dy)`.
h_s, dy_n = rng.standard_normal(F), rng.standard_normal(D)
assert np.isclose((w2[0] @ h_s) @ dy_n, h_s @ (w2[0].T @ dy_n))

# %%
# 2. Three arrays (S, F) of 2 bytes with S = 8192, F = 14336: 705 MB; two of them: 470 MB.
kept = [arrays_ * 8192 * 14336 * 2 / 1e6 for arrays_ in (3, 2)]
print([f"{megabytes:.0f} MB" for megabytes in kept])
assert [round(megabytes) for megabytes in kept] == [705, 470]

# %%
# 3. Every order gives the same integer. Its error is that of rounding each term to :math:`2^{-40}`, far below
#    float32's; the price is a range that must be known beforehand: here up to :math:`2^{23}`.
fixed = np.round(terms.astype(np.float64) * 2**40).astype(np.int64)
sums_of_integers = {int(rng.permutation(fixed).sum()) for _ in range(50)}
assert len(sums_of_integers) == 1
print("error:", abs(sums_of_integers.pop() / 2**40 - exact), "against", abs(float(in_order) - exact))

# %%
# .. raw:: html
#
#    </details>

# %%
# What the lesson has compiled for itself goes again.
folder.cleanup()
for name in ("wgrad", "scatter"):
    for library in compiler.cache().glob(f"lesson_{name}-*.so"):
        library.unlink(missing_ok=True)

# %%
# **Next:** :doc:`lesson 17 </lessons/lesson_17_checkpoints>` opens checkpoints that others have trained.
