r"""
Lesson 6 · The MoE layer: three ways to the same numbers
========================================================

**The question.** The router has given each token two experts. How do the tokens get there and back, and why does
nobody who trains a mixture write the three lines that the formula suggests?

The formula is short: :math:`y_n = \sum_j w_{nj} \, \mathrm{expert}_{e(n,j)}(x_n)`. We compute it as it stands, token
by token; then expert by expert with a mask, in two variants; then sorted, so that each expert finds its tokens side by
side. All give the same numbers, and what they cost is counted: FLOPs, matrix products, bytes of weights. The third is
what the library does, here and on a GPU. We derive its backward, and break the way from experts to tokens.

**You need** the router of :doc:`lesson 5 </lessons/lesson_05_router>` and SwiGLU from
:doc:`lesson 2 </lessons/lesson_02_norm_and_swiglu>`; both are imported here. On paper: :doc:`/math/dispatch`,
:doc:`/math/experts` and :doc:`/math/moe`.
"""

# %%
# A layer and a counter
# ---------------------
# An expert is a SwiGLU block, :math:`W_2 (\mathrm{silu}(W_1 x) \odot W_3 x)`: three matrix products. The experts'
# weights are stacks with the expert in front. So that costs are not claimed but counted, every product with a weight
# goes through one function that keeps the books.
import time

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinymoe.reference import dispatch as library_dispatch
from tinymoe.reference import moe as library_moe
from tinymoe.reference import moe_backward as library_moe_backward
from tinymoe.reference import route, route_backward, swiglu, swiglu_backward
from tinymoe.workers import kept_memory

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)
N, D, F, E, k = len(tokens), 16, 24, 4, 2

rng = np.random.default_rng(0)
x = rng.standard_normal((256, D))[tokens]  # (N, D)
w_gate = rng.standard_normal((E, D)) / D**0.5  # (E, D)
w1, w3 = (rng.standard_normal((E, F, D)) / D**0.5 for _ in range(2))  # (E, F, D)
w2 = rng.standard_normal((E, D, F)) / F**0.5  # (E, D, F)

books = {}


def times(x, w):
    """x wᵀ, and what it costs: (rows, in) and (out, in) -> (rows, out)."""
    books["products"] = books.get("products", 0) + 1
    books["FLOPs"] = books.get("FLOPs", 0) + 2 * len(x) * w.size
    books["weight bytes"] = books.get("weight bytes", 0) + w.nbytes
    return x @ w.T


def expert(e, rows, w1, w2, w3):
    return times(swiglu(times(rows, w1[e]), times(rows, w3[e]))[0], w2[e])  # (rows, D)


(weights, experts, _), _ = route(x, w_gate, k)
print("x", x.shape, "w1", w1.shape, "w2", w2.shape)
print("first tokens:", [(c, e.tolist()) for c, e in zip(LINE[:4], experts)])


# %%
# The first way: the formula
# --------------------------
# A loop over tokens, and for each over its choices. Nothing can be misunderstood, so this is the oracle that the
# others are held against; the library keeps it for the same purpose as :func:`tinymoe.reference.moe_naive`.
def by_token(x, weights, experts, w1, w2, w3):
    y = np.zeros_like(x)
    for n in range(len(x)):
        for j in range(weights.shape[1]):
            y[n] += weights[n, j] * expert(experts[n, j], x[n : n + 1], w1, w2, w3)[0]
    return y


# %%
# The second way: a mask per expert
# ---------------------------------
# A product with one row is a poor use of a matrix: each weight is read from memory for one multiplication. So turn the
# loops around and let each expert take many rows at once. The mask may be a *multiplication*, with a weight of zero for
# the tokens that did not choose the expert, which computes all that nobody asked for. Or it may be a *selection* of the
# rows that did choose it.
def masked_by_zero(x, weights, experts, w1, w2, w3):
    dense = np.zeros((len(x), len(w1)))
    np.put_along_axis(dense, experts, weights, axis=1)  # (N, E)
    return sum(dense[:, e : e + 1] * expert(e, x, w1, w2, w3) for e in range(len(w1)))


def masked_by_selection(x, weights, experts, w1, w2, w3):
    y = np.zeros_like(x)
    for e in range(len(w1)):
        token, choice = np.nonzero(experts == e)  # looks at all N·k choices, for every expert
        if len(token):
            y[token] += weights[token, choice, None] * expert(e, x[token], w1, w2, w3)
    return y


# %%
# The third way: sort once
# ------------------------
# Selection asks the same question E times: who chose e? One stable sort answers it for all. A **pair** (n, j), token n
# and its j-th choice, has the number :math:`q = nk + j`; sorted by expert, the S pairs fill **slots**. The counts per
# expert, summed up, are the **offsets** between which an expert's slots lie. The sort is *stable*: an expert's tokens
# keep the order of the text, so that the same input gives the same bits. With three tokens, four experts, top-2:
small = np.array([[0, 1], [1, 0], [0, 2]])  # (3, 2)


def dispatch(experts, num_experts):
    chosen = experts.ravel()  # (N·k,) expert of pair q
    order = np.argsort(chosen, kind="stable")  # (S,) pair that fills slot s
    offsets = np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=num_experts))])  # (E + 1,)
    slots = np.empty_like(order)
    slots[order] = np.arange(len(order))  # the inverse permutation: slot of pair q
    return order // experts.shape[1], offsets, slots.reshape(experts.shape)


tokens_of, offsets, slots = dispatch(small, 4)
print("token in each slot:", tokens_of, " offsets:", offsets, " slots of each token:", slots.tolist())
plan = library_dispatch(small, 4)
assert [plan.tokens.tolist(), plan.offsets, plan.slots.tolist()] == [a.tolist() for a in (tokens_of, offsets, slots)]

# %%
# Expert 0 owns slots 0, 1 and 2, expert 1 slots 3 and 4, expert 2 slot 5, and expert 3 none: its offsets are 6 and 6.
# ``tokens_of`` leads from slots to tokens, ``slots`` from tokens to slots; they are inverse. For the line:
tokens_of, offsets, slots = dispatch(experts, E)
S = len(tokens_of)

figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
colours = plt.cm.tab10(experts.ravel())
for q, s in enumerate(slots.ravel()):
    axis.plot([q, s], [0.86, 0.14], color=colours[q], linewidth=0.8, alpha=0.7)
axis.scatter(np.arange(S), np.ones(S), marker="s", s=60, c=colours)
axis.scatter(slots.ravel(), np.zeros(S), marker="s", s=60, c=colours)
for n, c in enumerate(LINE):
    axis.text(k * n + 0.5, 1.2, c if c != " " else "␣", family="monospace", ha="center")
for e in range(E):
    middle = (offsets[e] + offsets[e + 1] - 1) / 2
    axis.text(middle, -0.42, f"expert {e}: {offsets[e + 1] - offsets[e]}", ha="center", fontsize=8)
axis.set(yticks=[0, 1], yticklabels=["slots", "pairs"], xticks=[], ylim=(-0.6, 1.5))
axis.set_title("A stable sort brings each expert's pairs side by side; a colour is an expert")
plt.show()


# %%
# Then the rows travel. **Gather** copies each token's row to its slots; the experts run over their stretches of one
# array, which is a *grouped* GEMM (GEMM is what libraries call a product of matrices): several matrix products of
# unequal height, each with its own weight. **Combine** fetches for each token its k results, and adds them with their
# weights. What is done element by element, SwiGLU, is done to all slots at once.
def grouped(rows, w, offsets):
    out = np.empty((len(rows), w.shape[1]))
    for e in range(len(w)):
        mine = slice(offsets[e], offsets[e + 1])
        if offsets[e + 1] > offsets[e]:
            out[mine] = times(rows[mine], w[e])
    return out


def by_sorting(x, weights, experts, w1, w2, w3):
    tokens_of, offsets, slots = dispatch(experts, len(w1))
    rows = x[tokens_of]  # (S, D) gather
    hidden, saved = swiglu(grouped(rows, w1, offsets), grouped(rows, w3, offsets))  # (S, F)
    out = grouped(hidden, w2, offsets)  # (S, D)
    y = (weights[:, :, None] * out[slots]).sum(axis=1)  # (N, D) combine
    return y, (rows, hidden, saved, out, offsets, slots)


ways = {
    "loop over tokens": by_token,
    "mask, multiplied": masked_by_zero,
    "mask, selected": masked_by_selection,
    "sorted": lambda *arguments: by_sorting(*arguments)[0],
}
oracle = by_token(x, weights, experts, w1, w2, w3)
for name, way in ways.items():
    error = abs(way(x, weights, experts, w1, w2, w3) - oracle).max()
    print(f"{name:18} differs from the formula by {error:.1e}")
    assert error < 1e-13
assert abs(library_moe(x, w_gate, w1, w2, w3, k)[0] - oracle).max() < 1e-13

# %%
# What each costs
# ---------------
# Per token an expert takes :math:`6FD` FLOPs, three products of 2FD each. What is needed is k experts per token, so
# :math:`6NkFD`. The multiplied mask computes all E, which is :math:`E/k` times as much: the dense layer's work with a
# mixture's result. The loop computes no more than needed, but reads an expert's weights again for each pair, S times
# in all, where the others read each expert once. Counted, at a size where it matters:
N_large, D_large, F_large, E_large = 384, 64, 128, 8
x_large = rng.standard_normal((N_large, D_large))
large = (
    rng.standard_normal((E_large, F_large, D_large)) / 8,
    rng.standard_normal((E_large, D_large, F_large)) / 8,
    rng.standard_normal((E_large, F_large, D_large)) / 8,
)
(weights_large, experts_large, _), _ = route(x_large, rng.standard_normal((E_large, D_large)) / 8, k)

seconds, cost = {name: [] for name in ways}, {}
with threadpool_limits(1), kept_memory():  # one core and its clock; memory is used again, as in a training step
    for _ in range(7):
        for name, way in ways.items():
            books.clear()
            start = time.thread_time()
            way(x_large, weights_large, experts_large, *large)
            seconds[name].append(time.thread_time() - start)
            cost[name] = dict(books)
best = min(map(min, seconds.values()))

print(f"{'':18} {'FLOPs':>12} {'products':>9} {'weight MB':>10} {'looks at':>9} {'time, ratio':>12}")
for name, of_way in cost.items():
    scans = f"{E_large if name == 'mask, selected' else 1} x N·k"
    megabytes, ratio = of_way["weight bytes"] / 1e6, min(seconds[name]) / best
    print(f"{name:18} {of_way['FLOPs']:12,} {of_way['products']:9,} {megabytes:10.1f} {scans:>9} {ratio:12.1f}")
needed = 6 * N_large * k * F_large * D_large
assert cost["sorted"]["FLOPs"] == cost["loop over tokens"]["FLOPs"] == cost["mask, selected"]["FLOPs"] == needed
assert cost["mask, multiplied"]["FLOPs"] == needed * E_large // k
assert cost["loop over tokens"]["products"] == 3 * N_large * k
assert cost["sorted"]["products"] == 3 * E_large
assert min(seconds["loop over tokens"]) > min(seconds["sorted"])


# %%
# The time is that of one core, as a ratio, on whatever machine made this page; the other columns are the same
# everywhere. On a CPU and with eight experts the selected mask is no worse than the sort, and may be a little better,
# since one expert's arrays stay in the cache. It falls behind with many experts, E scans over all choices, and on a
# GPU, where the host must learn how many rows each mask has before it can launch the product: a wait for the device
# at each expert. Sorted, the offsets are all that a kernel needs, and one launch serves all experts
# (:doc:`lesson 15 </lessons/lesson_15_grouped_gemm>`). And the combine gives each row of y a single writer.
#
# What it pays is two copies of the rows: gather writes S rows of D numbers, the products write S rows, combine reads
# them. The kernels of :doc:`lesson 14 </lessons/lesson_14_dispatch_kernels>` fuse the first into the product's load.
#
# The backward
# ------------
# The plan is integers and has no gradient. The rest, in reverse order:
#
# * **Combine**, :math:`y_n = \sum_j w_{nj} o_{s(n,j)}`, with s(n, j) from ``slots``. By the product rule
#   :math:`do_s = w_{nj} \, dy_n` and :math:`dw_{nj} = o_s \cdot dy_n`, for each slot with its own token: a *gather* of
#   dy.
# * **The experts**, group by group: for :math:`y = x W^\top` it is :math:`dx = dy \, W` and :math:`dW = dy^\top x`. An
#   expert without rows has :math:`dW = 0`, exactly.
# * **Gather**, :math:`r_s = x_{n(s)}`, with n(s) from ``tokens_of``. A copy forward is a sum backward:
#   :math:`dx_n = \sum_j dr_{s(n,j)}`, which is a
#   *combine* with weights of one. Each is the other's transpose.
# * **The router** takes dw (lesson 5). x has two readers, the experts and the router, so its gradients add.
def grouped_backward(dout, rows, w, offsets):
    drows, dw = np.zeros_like(rows), np.zeros_like(w)
    for e in range(len(w)):
        mine = slice(offsets[e], offsets[e + 1])
        drows[mine], dw[e] = dout[mine] @ w[e], dout[mine].T @ rows[mine]
    return drows, dw


def layer_backward(dy, weights, saved, route_saved):
    rows, hidden, of_swiglu, out, offsets, slots = saved
    dout, dweights = np.empty_like(out), (dy[:, None, :] * out[slots]).sum(axis=2)  # (S, D), (N, k)
    dout[slots] = weights[:, :, None] * dy[:, None, :]  # each slot once: a permutation, so nothing is lost
    dhidden, dw2 = grouped_backward(dout, hidden, w2, offsets)
    dgate, dup = swiglu_backward(dhidden, of_swiglu)
    (dr1, dw1), (dr3, dw3) = grouped_backward(dgate, rows, w1, offsets), grouped_backward(dup, rows, w3, offsets)
    dx_router, dw_gate = route_backward(dweights, None, route_saved)
    return (dr1 + dr3)[slots].sum(axis=1) + dx_router, dw_gate, dw1, dw2, dw3


def layer(x, w_gate, w1, w2, w3):
    (weights, experts, _), route_saved = route(x, w_gate, k)
    y, saved = by_sorting(x, weights, experts, w1, w2, w3)
    return y, (weights, saved, route_saved)


goal = rng.standard_normal((N, D))
y, saved = layer(x, w_gate, w1, w2, w3)
dy = y - goal  # of the loss Σ (y − goal)² / 2
grads = dict(zip(("x", "w_gate", "w1", "w2", "w3"), layer_backward(dy, *saved)))

# %%
# Checked
# -------
# By finite differences, against the *formula*, not against the sorted form: then a mistake that both of its directions
# share would show, too. For each array, move it along a random direction d and compare the slope with
# :math:`\sum d \cdot \text{gradient}`. A random direction has a part along every element, so one that is wrong shows.
arrays = {"x": x, "w_gate": w_gate, "w1": w1, "w2": w2, "w3": w3}


def loss_of(x, w_gate, w1, w2, w3):
    (weights, experts, _), _ = route(x, w_gate, k)
    return 0.5 * ((by_token(x, weights, experts, w1, w2, w3) - goal) ** 2).sum()


def check(grads, h=1e-6):
    errors = {}
    for name, array in arrays.items():
        d = rng.standard_normal(array.shape)
        up, down = (loss_of(**{**arrays, name: array + way * h * d}) for way in (1, -1))
        errors[name] = abs((up - down) / (2 * h) - (d * grads[name]).sum()) / np.linalg.norm(grads[name])
    return errors


for name, error in check(grads).items():
    print(f"d{name:7} {grads[name].shape!s:13} off by {error:.1e} of its length")
    assert error < 1e-6
_, library_saved = library_moe(x, w_gate, w1, w2, w3, k)
for by_hand, of_library in zip(grads.values(), library_moe_backward(dy, None, library_saved)):
    np.testing.assert_allclose(by_hand, of_library, rtol=1e-10, atol=1e-11)
print("the library agrees")

# %%
# Broken on purpose
# -----------------
# The mistakes live where experts and tokens meet. All have the right shapes, and none raises an error here.
#
# **1. The inverse permutation forgotten.** The experts' outputs lie in expert order; reshaped to (N, k, D) they *look*
# like the outputs of each token's choices. Every token then gets what was computed for others. **2. The weights in
# the wrong order.** Each output goes home, but the weights are left in pair order while the outputs are in slot order.
_, (rows, hidden, of_swiglu, out, offsets, slots) = by_sorting(x, weights, experts, w1, w2, w3)
forgotten = (weights[:, :, None] * out.reshape(N, k, D)).sum(axis=1)
misweighted = ((weights.ravel()[:, None] * out)[slots]).sum(axis=1)


def off(y):
    return np.linalg.norm(y - oracle) / np.linalg.norm(oracle)


print(f"right: {off((weights[:, :, None] * out[slots]).sum(axis=1)):.1e}")
print(f"inverse permutation forgotten: off by {off(forgotten):.2f} of y's length")
print(f"weights in the wrong order:    off by {off(misweighted):.2f}")
assert off(forgotten) > off(misweighted) > 0.1

# %%
# The second is the more dangerous. The right experts, each token its own outputs, weights between 0 and 1: it trains.
# And it cannot be seen where a test has only equal weights, or one expert, or k = 1 with a weight of one.
#
# **3. An expert without tokens.** Let expert 2 have none, and sum something over each expert's slots, such as the
# gradient of a bias, had it one. ``np.add.reduceat`` is made for such sums, and has a rule for empty stretches that is
# not ours (and raises an error only if the *last* expert is idle).
idle = experts.copy()
idle[idle == 2] = 3
_, gaps, _ = dispatch(idle, E)
ones = np.ones(S)
print("rows by expert:       ", np.diff(gaps))
print("counted with reduceat:", np.add.reduceat(ones, gaps[:-1]).astype(int), " expert 2 got one of expert 3's rows")
assert (np.diff(gaps)[2], np.add.reduceat(ones, gaps[:-1])[2]) == (0, 1)

# %%
# A mean over no rows is 0/0, and spreads as NaN; a gradient array made by ``np.empty`` and filled expert by expert
# keeps whatever memory held before. Each works until an expert is idle, hours into a run. So the tests draw routings
# with empty experts on purpose, and demand zeros that are exact.
#
# Remember
# --------
# * Three ways, one result. The loop reads an expert's weights for each of S pairs; the multiplied mask computes E/k
#   times too much; the sort computes what is needed and reads each used expert once.
# * A plan is three integer arrays: the token of each slot, the offsets of each expert, the slots of each token.
# * Gather and combine are each other's transposes: a copy forward is a sum backward.
# * An expert may have no token, one, or all. Without a token its gradient is exactly zero.
#
# **Ask yourself.** (a) What is S, and when is it not N·k? (b) Why must the sort be stable? (c) The offsets are (0, 3,
# 3, 8): how many tokens has expert 1? (d) Which array leads from a slot to its token, and which back? (e) Why is the
# mixing weight applied to an expert's output and not to its input? (f) How many FLOPs has the multiplied mask for
# E = 64, k = 2, in units of what is needed? (g) Which writes could collide if gather's backward added S rows to their
# tokens at once? (h) Which gradient changes if the order of an expert's rows does, and why only a little? (i) With
# top-1 and the inverse permutation forgotten, what does each token get? (j) Why check the gradient against the loop
# and not against the sorted forward?
#
# Exercises
# ---------
# 1. Give all experts the weights of expert 0. What is y, and what is the gradient of the gate? Say it first, then run
#    it.
# 2. N tokens choose k of E experts evenly and independently. How many experts have work, on average? Derive it, and
#    compare with a simulation for E = 8, k = 2, N = 1 … 16. What does it say of decoding one text, and of many at once?
# 3. Write gather's backward as ``dx[tokens_of] += drows``. Why is it wrong, and with which k does it happen to be
#    right?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) the number of slots, fewer than N·k where pairs were dropped; (b) so that the same input gives the
# same order and hence the same bits; (c) none; (d) ``tokens``, ``slots``; (e) SwiGLU is not linear; (f) 32; (g) those
# of the k slots that hold the same token; (h) dW, a sum over rows whose rounding depends on their order; (i) the
# output for another token, in all but a few places; (j) the loop is the definition: a mistake in the plan would be in
# both directions of the sorted form.
#
# 1. All outputs are alike, so their weighted mean is that output, whatever the router says. No choice is better than
#    another: the router's gradient is zero.
alike = [np.repeat(w[:1], E, axis=0) for w in (w1, w2, w3)]
y_alike, saved_alike = library_moe(x, w_gate, *alike, k)
assert abs(y_alike - expert(0, x, w1, w2, w3)).max() < 1e-13
assert abs(library_moe_backward(dy, None, saved_alike)[1]).max() < 1e-12

# %%
# 2. A token leaves an expert idle with probability :math:`1 - k/E`, N tokens with :math:`(1 - k/E)^N`, so on average
#    :math:`E \, (1 - (1 - k/E)^N)` have work. One text decoded alone reads two of eight experts per layer; at a batch
#    of 16 nearly all are read, but each reading serves several tokens. So a mixture gains more from batching than a
#    dense model of the same cost.
for count in (1, 2, 4, 8, 16):
    choices = rng.random((2000, count, 8)).argsort(axis=2)[:, :, :k].reshape(2000, -1)
    touched = np.mean([len(np.unique(row)) for row in choices])
    expected = 8 * (1 - (1 - k / 8) ** count)
    print(f"{count:2} tokens: {touched:.2f} experts, by the formula {expected:.2f}")
    assert abs(touched - expected) < 0.1

# %%
# 3. NumPy reads ``dx[tokens_of]`` once, adds, and writes: of the k slots of a token only the last stays. With k = 1 no
#    token stands twice, and it is right. ``np.add.at`` adds them all; combine does it without colliding writes.
drows = rng.standard_normal((S, D))
lost, added = np.zeros((N, D)), np.zeros((N, D))
lost[tokens_of] += drows
np.add.at(added, tokens_of, drows)
np.testing.assert_allclose(added, drows[slots].sum(axis=1), atol=1e-13)
assert abs(lost - added).max() > 0.1

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 7 </lessons/lesson_07_balance>` lets a router fall in love with two experts, and shows what
# brings it back.
