r"""
Lesson 14 · Dispatch kernels: 32 lanes that choose, vote and sort
=================================================================

**The question.** Every token has chosen two experts, and the experts' products want the tokens sorted by expert, in the
order of the text. On a CPU that is one stable ``argsort``. How do thousands of threads sort, none of them knowing how
many come before it, without asking the host, and with the same result whatever runs first?

The tools are those of a **warp**: 32 threads, its *lanes*, that are scheduled together and can hand each other
registers without any memory between them. With them we choose each token's two experts, rank pairs that want the same
expert, and place them. No kernel of this lesson has been timed on a GPU; what is checked is that they are right, in any
order.

**You need** kernels and barriers from :doc:`lesson 13 </lessons/lesson_13_cuda_model>`, the choice and its ties from
:doc:`lesson 5 </lessons/lesson_05_router>`, the plan from :doc:`lesson 6 </lessons/lesson_06_moe_layer>`. On paper:
:doc:`/math/kernel_reductions` and :doc:`/math/kernel_dispatch`.
"""

# %%
# Shuffles
# --------
# ``__shfl_xor_sync(mask, x, bits)`` gives a lane the ``x`` of the lane whose number differs from its own in those bits.
# The mask names the lanes that take part (``ALL_LANES``, 32 ones), and the call waits until they have all come. It is
# needed because, since Volta, the lanes of a warp need not run in step. In NumPy a warp is an array of 32, and a
# shuffle is an index:
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tinymoe import reference
from tinymoe.cuda import device, dispatch, router
from tinymoe.cuda.emulator import ORDERS, KernelError, compiler, scheduled

LANES = np.arange(32)
STEPS = (16, 8, 4, 2, 1)


def shuffle_xor(x, bits):
    return x[LANES ^ bits]


x = LANES + 1
for bits in STEPS:
    x = x + shuffle_xor(x, bits)
print("every lane has the sum 1 + … + 32:", set(x.tolist()))

# %%
# Five steps, since :math:`2^5 = 32`. After each step a lane's sum covers twice as many lanes, and at the end **all**
# lanes have all of it, so nobody has to be told. Which lanes' numbers each lane has heard of:
heard = np.eye(32, dtype=bool)  # (lane, source)
figure, all_axes = plt.subplots(1, 5, figsize=(10, 2.4), layout="constrained", sharey=True)
for axes, bits in zip(all_axes, STEPS):
    heard = heard | heard[LANES ^ bits]
    axes.imshow(heard, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=f"after bits = {bits}", xlabel="of lane")
all_axes[0].set_ylabel("lane")
figure.suptitle("What each lane has heard: doubled by every shuffle, complete after five")
plt.show()
assert heard.all()

# %%
# Any operation that is associative and commutative can take the place of the sum: a maximum, or the *better of two
# choices*.
#
# Two experts in a warp
# ---------------------
# A warp for each token, an expert for each lane. The largest logit is a tree of shuffles over pairs (score, expert);
# then the winner's lane steps back, and the tree runs again. All depends on ``better``. To be an operation for a tree
# it must be commutative: two lanes that compare the same two choices, each with its own on the left, must agree. With
# **ties to the lowest expert** they do.
folder = tempfile.TemporaryDirectory()


def kernels_of(source, *names):
    path = Path(folder.name, f"lesson_{names[0]}.cu")
    path.write_text(source)
    kernels = device.Kernels(str(path), *names)
    device.ALL.remove(kernels)  # the list is of tinymoe's own
    return kernels


TOP_TWO = """#include "prelude.h"

struct Choice {
    float score;
    int expert;
};

__device__ Choice better(Choice a, Choice b) {
    return a.score > b.score || (a.score == b.score && a.expert < b.expert) ? a : b;
}

__global__ void top_two(const float *logits, int *experts, int *first_of_lane, int E) {
    const int token = blockIdx.x, lane = threadIdx.x;
    bool taken = lane >= E;  // there is no such expert
    for (int choice = 0; choice < 2; choice++) {
        Choice best = {taken ? -INFINITY : logits[token * E + lane], lane};
        for (int bits = 16; bits; bits /= 2) {
            const float score = __shfl_xor_sync(ALL_LANES, best.score, bits);
            const int expert = __shfl_xor_sync(ALL_LANES, best.expert, bits);
            best = better(best, {score, expert});
        }
        if (choice == 0) first_of_lane[token * 32 + lane] = best.expert;
        if (lane == best.expert) taken = true;
        if (lane == 0) experts[token * 2 + choice] = best.expert;
    }
}
"""
LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)
N, E, k = len(tokens), 8, 2
rng = np.random.default_rng(0)
logits = rng.standard_normal((256, E)).astype(np.float32)[tokens]  # (N, E): the same byte gives the same row
coarse = np.round(2 * logits) / 2  # with many ties


def top_two(logits, source=TOP_TWO, build="checked"):
    with device.using(build):
        experts, first = device.empty((N, k), np.int32), device.empty((N, 32), np.int32)
        kernels_of(source, "top_two").launch("top_two", N, 32, device.array(logits), experts, first, E)
    return experts, first


for name, scores in (("random", logits), ("with ties", coarse)):
    experts, first = top_two(scores)
    ranked = np.sort(scores, axis=1)
    ties = (ranked[:, -2] == ranked[:, -3]) | (ranked[:, -1] == ranked[:, -2])
    assert (experts == np.argsort(-scores, axis=1, kind="stable")[:, :k]).all()
    assert (first == experts[:, :1]).all()  # every lane knows the winner
    print(f"{name}: as the stable sort, {ties.sum()} of {N} tokens with a tie that matters")

# %%
# Checked against the library, whose kernel does the same for up to 256 experts, eight to a lane, and goes on with the
# weights in registers. These are its decisive lines:
text = (device.KERNELS / "router.cu").read_text()
start = text.index("__device__ __forceinline__ Choice better")
print(text[start : text.index("template <class T, int HELD, int WIDTH>", start)])
with device.using("checked"):
    of_library = router.top_k_ids(device.array(coarse), k)
assert (of_library == np.argsort(-coarse, axis=1, kind="stable")[:, :k]).all()

# %%
# **Broken on purpose.** "Ties hardly ever happen", so one compares scores alone: ``a.score >= b.score ? a : b``. Now
# each of two lanes that compare equals keeps its own, and the warp falls apart. Lanes disagree about the winner, two of
# them step back, and the token loses an expert that it should have had.
apart, first = top_two(
    coarse, TOP_TWO.replace("a.score > b.score || (a.score == b.score && a.expert < b.expert)", "a.score >= b.score")
)
split = [n for n in range(N) if len(set(first[n].tolist())) > 1]
n = split[0]
right = np.argsort(-coarse, axis=1, kind="stable")[:, :k]
print(f"{len(split)} of {N} tokens have lanes that disagree; {(apart != right).any(axis=1).sum()} go astray")
print(f"token {n}: logits {coarse[n]}, winners by lane 0-7 {first[n, :8]}; experts {apart[n]}, right are {right[n]}")
assert (apart != right).any()

# %%
# Those that go astray without a sign here agree on the first choice and fall apart over the second, of which ``first``
# keeps no record; lane 0, which writes, is left with whichever it met. In bfloat16 such ties come in about four of a
# thousand tokens (lesson 5, exercise 3): rare enough to pass a small test, common enough to break a long text.
#
# Ballots
# -------
# Now the sort. Number the pairs of (token, choice) as they lie in memory, :math:`q = nk + j`, and give each pair a
# thread. A pair's slot is
#
# .. math:: \text{slot}(q) = \underbrace{\text{offset}_e}_{\text{pairs of lower experts}} +
#           \underbrace{\#\{q' < q : e(q') = e(q)\}}_{\text{its rank among its own}} .
#
# The rank keeps the order of the text: this is what makes the sort *stable*. Within a warp it takes no memory at all.
# ``__ballot_sync(mask, predicate)`` gives every lane a word whose bit :math:`l` is lane :math:`l`'s predicate. One
# ballot for each bit of the expert's number, and each lane keeps the lanes that agree with it in all of them:
pairs = right.ravel()[:32]  # the first 32 pairs of the line, one for each lane


def ballot(predicate):
    return sum(1 << lane for lane in LANES.tolist() if predicate[lane])


alike = [ballot(np.ones(32, bool))] * 32
for bit in (1, 2, 4):  # E = 8
    ones = ballot(pairs & bit)
    alike = [a & (ones if e & bit else ~ones) for a, e in zip(alike, pairs.tolist())]
rank = np.array([(a & ((1 << lane) - 1)).bit_count() for lane, a in enumerate(alike)])
for lane in (0, 1, 2, 10):
    print(f"lane {lane:2}, expert {pairs[lane]}: alike {alike[lane]:032b}, rank {rank[lane]}")
assert all(rank[lane] == (pairs[:lane] == pairs[lane]).sum() for lane in LANES)

# %%
# Read a word from the right: bit 0 is lane 0. ``(1 << lane) - 1`` masks the lanes before one's own, and counting the
# bits that are left gives the rank. Eight experts take three ballots,
# and one more for the lanes that have a pair at all; a loop over experts would take eight.
#
# Count, scan, scatter
# --------------------
# A warp ranks 32 pairs, but the line has 54 and a batch thousands. Split the pairs into blocks, and three launches do
# it, each of which only waits for the one before:
#
# 1. **count**: each block counts its pairs of each expert, ``counts`` (E, blocks);
# 2. **scan**: sum up all the counts that stand before each one;
# 3. **scatter**: a pair's slot is where its block's pairs of its expert begin, plus its rank in the block.
#
# The trick is in the layout. In memory ``counts`` runs through expert 0's counts of all blocks, then expert 1's. What
# stands before (e, b) is then all of the lower experts, and of e itself the earlier blocks: just what the formula asks
# for, by one running sum. With 16 pairs to a block, so that four blocks can be printed:
chosen, PAIRS = right.ravel(), 16  # (S,)
S, blocks = len(chosen), -(-len(chosen) // PAIRS)
counts = np.stack([np.bincount(chosen[b * PAIRS : (b + 1) * PAIRS], minlength=E) for b in range(blocks)], axis=1)
starts = (np.cumsum(counts) - counts.ravel()).reshape(E, blocks)
print("counts (E, blocks):", *counts, sep="\n  ")
print("starts:", *starts, sep="\n  ")
print("offsets:", [*starts[:, 0].tolist(), S])

slots = np.empty(S, int)
for q, e in enumerate(chosen):
    b = q // PAIRS
    slots[q] = starts[e, b] + (chosen[b * PAIRS : q] == e).sum()
plan = reference.dispatch(right, E)
assert (slots.reshape(N, k) == plan.slots).all()
assert plan.offsets == [*starts[:, 0].tolist(), S]

# %%
# Looked at as a picture: every pair goes down to its slot, and lines of one colour never cross. That is stability.
figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
colours = plt.get_cmap("Dark2")(np.arange(E))
for q, slot in enumerate(slots):
    axes.plot([q, slot], [1, 0], color=colours[chosen[q]], linewidth=1)
axes.scatter(range(S), np.ones(S), c=colours[chosen], s=18, zorder=3)
axes.scatter(range(S), np.zeros(S), c=colours[np.sort(chosen)], s=18, zorder=3)
for b in range(1, blocks):
    axes.axvline(b * PAIRS - 0.5, ymin=0.8, color="black", linewidth=0.8)
axes.set(yticks=[0, 1], yticklabels=["slots", "pairs"], xticks=range(0, S, PAIRS))
axes.set_title("54 pairs of the line in four blocks, sorted by expert: lines of one expert never cross")
plt.show()

# %%
# The scan itself
# ---------------
# A running sum looks serial, and is not. Let each lane add the value of the lane 1 before it, then of the one 2 before,
# 4, 8, 16. After step i a lane has the sum of :math:`2^i` neighbours up to itself (Hillis and Steele 1986). A block's
# 32 warps do it each, write their totals to shared memory, and behind a barrier every warp scans the 32 totals once
# more for itself.
x = counts.ravel()[:32]
scanned = x.copy()
for by in (1, 2, 4, 8, 16):
    scanned = scanned + np.where(by <= LANES, scanned[np.maximum(LANES - by, 0)], 0)
assert (scanned == np.cumsum(x)).all()
print("32 counts summed up in 5 steps:", scanned.tolist())

# %%
# Checked against the library
# ---------------------------
# The library's three kernels take 256 pairs to a block. (Up to 64 pairs, so our line, it lets one block compare each
# with each: a launch costs more than that.) A thousand tokens make eight blocks, and the checked build
# would find a slot that two pairs claim. Expert 3 gets the most, experts 5 to 7 get nothing.
many = np.stack([rng.permutation(5)[:k] for _ in range(1000)]).astype(np.int32)
many[::2, 0] = np.where(many[::2, 1] == 3, many[::2, 0], 3)
expected = reference.dispatch(many, E)
for seed, order in enumerate(ORDERS):
    with device.using("checked"), scheduled(order, seed):
        plan = dispatch(device.array(many), E)
    assert (plan.tokens == expected.tokens).all()
    assert plan.offsets.tolist() == expected.offsets
    assert (plan.slots == expected.slots).all()
print("1000 tokens, rows by expert:", np.diff(expected.offsets).tolist())

# %%
# Nothing went to the host on the way. That matters because the host, to learn a count, would have to wait until the GPU
# is done with all that it was given; the grids are therefore sized for the worst case before anybody knows the routing,
# and :doc:`lesson 15 </lessons/lesson_15_grouped_gemm>` shows how the products live with that.
#
# What it costs: by its header 4 integers moved for each pair, and 4 for each expert and block. For 4096 tokens of 8x7B:
pairs_of_batch = 4096 * 2
moved = 4 * (4 * pairs_of_batch + 4 * 8 * pairs_of_batch // 256)
rows = 2 * 2 * pairs_of_batch * 4096  # bfloat16, read and written
print(f"the sort moves {moved / 1e3:.0f} kB; a copy of the rows {rows / 1e6:.0f} MB, {rows / moved:.0f} times as much")

# %%
# Broken on purpose
# -----------------
# **1. The rank by atomics.** Where each expert begins has to be counted in any case (``expected.offsets``, here lent by
# the reference). But why count for each block, and rank by ballots, when a counter for each expert could hand out the
# slots from there on?
TICKETS = """#include "prelude.h"

__global__ void hand_out(const int *experts, int *next, int *tokens, int pairs, int k) {
    const int q = blockIdx.x * blockDim.x + threadIdx.x;
    if (q < pairs) tokens[atomicAdd(&next[experts[q]], 1)] = q / k;
}
"""
x = rng.standard_normal((1000, 64)).astype(np.float32)
results = set()
for seed in range(8):
    with device.using("checked"), scheduled("shuffled", seed):
        handed, following = device.empty(2000, np.int32), device.array(expected.offsets[:E], np.int32)
        kernels_of(TICKETS, "hand_out").launch("hand_out", 8, 256, device.array(many), following, handed, 2000, k)
    own = handed[expected.offsets[0] : expected.offsets[1]]
    assert sorted(own) == sorted(expected.tokens[: expected.offsets[1]])
    total = np.zeros(64, np.float32)
    for row in x[own]:  # as a gradient of the expert's weights adds its rows
        total += row
    results.add(total.tobytes())
    if seed < 3:
        print(f"expert 0, schedule {seed}: tokens {own[:8].tolist()} …")
print(f"the sum over its rows: {len(results)} different results in 8 schedules")
assert len(results) > 1

# %%
# It is a correct partition, and not even a race: the checker has nothing to object to. But it is another order each
# time, float sums depend on their order, and two runs with the same seed are no longer the same run. What counts
# for each block and ballots buy is that bits can be compared, as the tests of these kernels do.
#
# **2. A barrier less.** The count begins by zeroing its counters in shared memory. Take the barrier behind that away:
source = (device.KERNELS / "dispatch.cu").read_text()
zeros = "    __syncthreads();  // zeros before sums\n"
assert zeros in source
with device.using("checked"):
    counted = device.empty((E, 8), np.int32)
    broken = kernels_of(source.replace(zeros, ""), "dispatch_count")
    try:
        broken.launch("dispatch_count", 8, 256, device.array(many), counted, 2000, E, shared=4 * E)
    except KernelError as error:
        caught = error
print(caught)
assert caught.kind in ("race", "uninitialised")

# %%
# Thread 0 has zeroed counter 0 only, and adds to that of expert 3, byte 12, before thread 3 has. In another order the
# zero would come *after* a count, and erase it.
#
# Remember
# --------
# * Lanes of a warp exchange registers by shuffles, and vote by ballots, with no memory and no barrier of the block.
# * A tree of ``xor`` shuffles gives the result to all lanes, if the operation does not depend on which side is its own.
#   For "the better of two" that takes a rule for ties.
# * A stable sort by a small key is count, scan, scatter. With counts laid out (E, blocks) one running sum places all.
# * Ballots rank a lane among its equals: one for each bit of the key, then count the bits below.
# * Atomics that hand out places are correct and not repeatable.
#
# **Ask yourself.** (a) Why does every lane need to know the winner, when only one lane writes it? (b) What would
# ``starts`` be if ``counts`` were laid out (blocks, E)? (c) A block's pairs are ranked warp by warp. What is added to a
# rank in the warp to make it the rank in the block? (d) A pair with expert −1 goes nowhere. Which ballot has to know?
# (e) Is a maximum by atomics, ``atomicMax`` on integers, repeatable?
#
# Exercises
# ---------
# 1. Change ``better`` so that ties go to the *highest* expert. Which NumPy expression agrees with it? Do all lanes
#    still agree?
# 2. Count the additions of the scan by shuffles for 32 lanes, and of a serial running sum. Which is larger, and why is
#    it done nevertheless?
# 3. How many ballots rank a warp's pairs among E experts? Write the rank in NumPy for any E, and check E = 100.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) the winner's own lane must step back before the second round, and no lane may step back by mistake;
# (b) where each block's pairs begin in an order by block first, and by expert within the block; (c) the pairs of that
# expert in the block's earlier warps; (d) all of them: the word begins with the lanes that go anywhere; (e) yes: a
# maximum of integers is the same in every order, as is a sum of integers.
#
# 1. One comparison turns round; the rule still does not depend on the side, so lanes agree. In NumPy, sort the columns
#    in reverse order, and turn the result back:
highest, first = top_two(coarse, TOP_TWO.replace("a.expert < b.expert", "a.expert > b.expert"))
reverse = E - 1 - np.argsort(-coarse[:, ::-1], axis=1, kind="stable")[:, :k]
assert (highest == reverse).all()
assert (first == highest[:, :1]).all()

# %%
# 2. In the step by :math:`b` the lanes from b on add: 31 + 30 + 28 + 24 + 16 = 129 additions, against 31. But 5 steps,
#    against 31: additions of different lanes happen together, and steps do not.
assert sum(32 - by for by in (1, 2, 4, 8, 16)) == 129

# %%
# 3. One for the lanes that go anywhere, and one for each bit: ⌈log2 E⌉, 7 for E = 100.
keys = rng.integers(0, 100, 32)
words, bit, ballots = [ballot(keys >= 0)] * 32, 1, 1
while bit < 100:
    ones, ballots = ballot(keys & bit), ballots + 1
    words = [w & (ones if e & bit else ~ones) for w, e in zip(words, keys.tolist())]
    bit *= 2
ranks = [(w & ((1 << lane) - 1)).bit_count() for lane, w in enumerate(words)]
assert ranks == [(keys[:lane] == keys[lane]).sum() for lane in LANES]
assert ballots == 1 + 7

# %%
# .. raw:: html
#
#    </details>

# %%
# Remove what this lesson has compiled.
folder.cleanup()
for name in ("top_two", "hand_out", "dispatch_count"):
    for library in compiler.cache().glob(f"lesson_{name}-*.so"):
        library.unlink(missing_ok=True)

# %%
# **Next:** :doc:`lesson 15 </lessons/lesson_15_grouped_gemm>` multiplies what is now sorted, four times, each time with
# less traffic.
