r"""
Lesson 15 · The grouped GEMM: a ladder from naive to tensor cores
=================================================================

**The question.** Nearly all the work of a mixture is one kind of product: each expert's weights times the rows that
were sent there, groups of any size, possibly empty. A GPU can multiply far faster than it can load. How must a product
be cut up so that its time is not spent on loading, and what does each cut save?

tinymoe has five complete kernels for it, called rungs, in ``tinymoe/cuda/kernels/grouped_gemm/``: naive, tiles in
shared memory, tiles in registers, tensor cores, and, in two steps, Hopper's way to feed them. We derive what each has
to move, look at the lines that do it, *count* what the first four really move, and run them all on ragged groups
against NumPy.

**No rung has been timed on a GPU yet.** Nothing below is a speed. What is derived and counted are operations, operands
and bytes, which are the same on every machine; where a device's ceilings are needed, they are its datasheet's.

**You need** blocks, barriers and shared memory from :doc:`lesson 13 </lessons/lesson_13_cuda_model>` and the sorted
rows of :doc:`lesson 14 </lessons/lesson_14_dispatch_kernels>`. On paper: :doc:`/math/kernel_tiles`,
:doc:`/math/kernel_swizzle`, :doc:`/math/kernel_fragments`.
"""

# %%
# Bytes and FLOPs first
# ---------------------
# N tokens are sent to k experts each: S = N·k rows in expert order, called slots, :math:`S_e` of them expert e's. For
# these :math:`y_s = x_s W_e^\top`, from D inputs to F outputs. One product of a fixed shape for all experts is none of
# it, unless every group is padded to the largest; a loop with a product for each expert needs the sizes on the host,
# and leaves most of a GPU idle where groups are small. So it is one launch for all groups, whatever their sizes.
#
# A multiply-add is 2 FLOPs, so the product takes :math:`2 S D F`, whatever the groups. With z bytes a number it must
# load every row, and every weight that is used, at least once, and store the result: :math:`z (SD + E_{used} DF + SF)`
# bytes. FLOPs over bytes is the *arithmetic intensity*; the FLOPs that a device does while it loads a byte are its
# *ridge*. For a SwiGLU layer of 8x7B, three products, when every expert has work, and of the bytes the weights alone:
import tempfile
from itertools import pairwise, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tinymoe import MixtralConfig, reference
from tinymoe.cuda import device
from tinymoe.cuda.emulator import Array, KernelError, Library, compiler
from tinymoe.cuda.grouped_gemm import RUNGS, grouped_linear, grouped_swiglu
from tinymoe.scale.devices import DEVICES

big, h200 = MixtralConfig.mixtral_8x7b(), DEVICES["h200"]  # the latter as its datasheet describes it
D, F, E, k = big.dim, big.hidden_dim, big.num_experts, big.top_k_experts
flops_of_token, weights = 3 * 2 * k * D * F, 3 * E * D * F * 2  # FLOPs; bytes in bfloat16
ridge = h200.flops / h200.bandwidth
print(f"{flops_of_token / 1e6:.1f} MFLOP a token, {weights / 1e9:.3f} GB of weights")
print(f"an H200, by its datasheet: {ridge:.0f} FLOP in the time of a byte")
for n in (16, 256, 4096, 16384):
    print(f"{n:6} tokens: {n * flops_of_token / weights:7.1f} FLOP for each byte of weights")
crossing = weights / h200.bandwidth / (flops_of_token / h200.flops)
print(f"loading the weights takes as long as multiplying at {crossing:.0f} tokens")

# %%
# Above a thousand tokens or so the layer *could* be bound by arithmetic. (Rows and results add bytes: at 16384 tokens
# storing gate, up and hidden takes as many as the weights.) Whether it is depends on how often a kernel loads the same
# number again.
#
# The one formula of this lesson
# ------------------------------
# Let somebody, a block, a warp or a thread, compute h × w outputs. For each step along the inner dimension it needs h
# operands of x and w of W, and does :math:`h w` multiply-adds. So
#
# .. math:: \text{operands per multiply-add} = \frac{h + w}{h w} = \frac1h + \frac1w .
#
# One output alone: 2. A square tile of side 32: 1/16. The formula holds on every level: a *block's* tile says what must
# come from global memory, and the tile of a *thread or warp* what must come from shared memory. Most of
# the ladder is larger tiles on both levels; the rest is smaller numbers, and not waiting.


def operands(h, w):
    return 1 / h + 1 / w


LEVELS = {  # rung: (rows, columns) of what shares loads from memory (rung 1: nothing), and of whoever multiplies
    "1_naive": ((1, 1), None),
    "2_tiled": ((32, 32), (1, 1)),
    "3_register": ((128, 128), (8, 8)),
    "4_tensor_core": ((128, 128), (64, 32)),
    "5_wgmma": ((128, 128), (64, 128)),
    "5_hopper": ((128, 256), (64, 256)),
}
for name, (block, owner) in LEVELS.items():
    shared = f"{operands(*owner):.4f}" if owner else "none"
    print(f"{name:14} operands per multiply-add: {operands(*block):.4f} from global memory, {shared} from shared")

# %%
# Ragged groups
# -------------
# A tile of rows must belong to one expert, since a tile has one W. So each group is cut into tiles by itself, and its
# last tile may be partly empty. The grid, however, is launched before the host knows the routing. Rungs 1 to 4 take
# ``slots / height + experts + 1`` row tiles, enough for every routing (exercise 2), and each block finds out by a walk
# over the offsets which expert's tile it is; the surplus ones have nothing to store. Rows that no expert owns, of
# dropped pairs, are one group more, and become zeros. (The last step has a block for each multiprocessor, which
# walks from tile to tile.)
groups = [140, 0, 37, 5]  # rows of four experts: the second has none
offsets = np.concatenate([[0], np.cumsum(groups)])
S, inner, outer = sum(groups), 64, 160


def row_tiles(offsets, height):
    """Return (expert, begin, end) of every tile, as include/ragged.h finds them."""
    return [
        (e, begin, min(begin + height, offsets[e + 1]))
        for e in range(len(offsets) - 1)
        for begin in range(offsets[e], offsets[e + 1], height)
    ]


figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
for level, height in enumerate((8, 32, 128)):
    tiles = row_tiles(offsets, height)
    for e, begin, end in tiles:
        axes.barh(level, end - begin, left=begin, height=0.6, color=f"C{e}", edgecolor="white", linewidth=0.7)
    filled = S / (height * len(tiles))
    axes.text(S + 3, level, f"{len(tiles)} tiles, {filled:.0%} filled", va="center", fontsize=8)
axes.set(yticks=range(3), yticklabels=["8 rows", "32 rows", "128 rows"], xlabel="slot", xlim=(0, S + 42))
axes.set_title("Tiles of 140, 0, 37 and 5 rows: no tile has two experts, so tall tiles are partly empty")
plt.show()

# %%
# Tall tiles load less and waste more multiplications. Waste is at most one tile for an expert: 8192 rows, as for 4096
# tokens of 8x7B, would be 64 full tiles of 128, and are on average 68, 6 % more. With 64 rows in all nearly everything
# is waste, and it costs little: rows that do not exist are not loaded. With one token the layer does 1 FLOP for each
# byte of weights, and as :math:`1/h + 1/w \ge 1` for h = 1 no tile changes that: loading the weights is the limit.
# Decoding wants kernels that do nothing else, ``kernels/few_tokens.cu`` in the library: each weight is read once, and
# as it is the weights that are the tall side of a tensor core's product there, the tokens' side has only 8 rows.
#
# How to count
# ------------
# The emulator runs the real source, so the source can be given operands that count themselves: a type whose conversion
# to ``float`` adds its bytes. In rungs 1 to 3 the element type is a template parameter; where shared memory is
# declared a word is replaced. In rung 4 two instructions alone touch the operands, and those are wrapped. Stores of y
# are counted nowhere: they are the same for all.
COUNTERS = """#include "pack.h"
#include "ragged.h"
#include "tensor_core.h"

// They begin at 1: variables that begin at 0 lie where the emulator has its shared memory.
static int64_t global_bytes = 1, shared_read = 1, shared_written = 1;
__global__ void counted(int64_t *counts) {
    counts[0] = global_bytes - 1, counts[1] = shared_read - 1, counts[2] = shared_written - 1;
    global_bytes = shared_read = shared_written = 1;
}

struct Global {
    float value;
};
float to_float(Global x) { return global_bytes += 4, x.value; }
template <>
Global from_float<Global>(float x) { return {x}; }

struct Shared {
    float value;
    operator float() const { return shared_read += 4, value; }
    void operator=(float x) { shared_written += 4, value = x; }
};

template <bool TRANSPOSED>
void counted_load(uint32_t (&to)[4], const void *row) {  // each lane has the address of a row of 16 bytes
    shared_read += 16;
    load_matrices<TRANSPOSED>(to, row);
}
void counted_copy(void *to, const void *from, bool valid) {
    global_bytes += valid ? 16 : 0, shared_written += 16;
    copy_16_bytes(to, from, valid);
}
#define load_matrices counted_load
#define copy_16_bytes counted_copy
"""
folder = tempfile.TemporaryDirectory()
FOLDER = device.KERNELS / "grouped_gemm"
x = np.random.default_rng(0).integers(-2, 3, (S, inner)).astype(np.float32)  # small integers: every sum is exact
w = np.random.default_rng(1).integers(-2, 3, (len(groups), outer, inner)).astype(np.float32)


def in_numpy(x, w):
    """One product per expert, of the rows between its offsets."""
    return np.concatenate([x[begin:end] @ w[e].T for e, (begin, end) in enumerate(pairwise(offsets))])


expected = in_numpy(x, w)


def source_of(name):
    return (FOLDER / f"{name}.cu").read_text()


def count(name, depth):
    """Run a rung on operands that count; return bytes of global memory, of shared memory read, and written."""
    source = source_of(name)
    for shared in ("__shared__ float", "const float (&a)[TILE][TILE + 1]", "const float (&b)[TILE][TILE + 1]"):
        source = source.replace(shared, shared.replace("float", "Shared"))
    source = source.replace("    float a[DEPTH][TILE]", "    Shared a[DEPTH][TILE]")
    path = Path(folder.name, f"lesson_count_{name}.cu")
    path.write_text(COUNTERS + source)
    element = "bfloat16" if name == "4_tensor_core" else "Global"
    library = Library(path, [f"grouped_gemm<{element}, true>", "counted"], "emulated")
    dtype = device.BFLOAT16 if name == "4_tensor_core" else np.float32
    with device.using("emulated"):
        arrays = [device.array(x, dtype), None, device.array(w, dtype), device.array(offsets, np.int32)]
        y, counts = device.empty((S, outer), dtype), device.empty(3, np.int64)
    pass_ = [
        Array(0, 0, False, "none") if a is None else Array(a.ctypes.data, a.nbytes, True, "a") for a in [*arrays, y]
    ]
    (height, width), block = RUNGS[name].tile, (*RUNGS[name].block, 1, 1)[:3]
    grid = (len(row_tiles(offsets, height)), -(-outer // width), 1)  # just what is needed
    sizes = [np.int32(size).tobytes() for size in (len(groups), S, inner, outer)]
    library.launch(f"grouped_gemm<{element}, true>", grid, block, [*pass_, *sizes], RUNGS[name].shared)
    assert (y.astype(np.float32) == expected.astype(dtype).astype(np.float32)).all()
    library.launch("counted", (1, 1, 1), (1, 1, 1), [Array(counts.ctypes.data, counts.nbytes, True, "counts")])
    return counts.tolist(), grid[0] * grid[1] * -(-inner // depth)  # and how often any block loads a pair of tiles


def show(name, begin, end):
    """Print a rung's lines from one that contains ``begin`` up to the first, behind it, that contains ``end``."""
    lines = source_of(name).splitlines()
    first = next(i for i, line in enumerate(lines) if begin in line)
    last = next(i for i, line in enumerate(lines) if i > first and end in line)
    print("\n".join(lines[first : last + 1]))


# %%
# Rung 1: a thread per output
# ---------------------------
show("1_naive", "for (int i = 0; i < inner", "sum +=")
traffic = {}
(traffic["1_naive"], _) = count("1_naive", 1)
products = S * inner * outer  # multiply-adds that somebody asked for
print(f"counted: {traffic['1_naive'][0] / 4 / products} operands from global memory per multiply-add")
assert traffic["1_naive"] == [4 * 2 * products, 0, 0]

# %%
# Two operands, 8 bytes of float32, for 2 FLOPs: each element of x is asked for once for every column, each weight once
# for every row of its expert. A memory of 4.8 TB/s, which an H200's datasheet promises, would feed 1.2 TFLOP/s. Caches
# help, since most was asked for a moment before. The pattern hurts: a warp's 32 neighbours load in one instruction, and
# the fewer lines of 128 bytes they touch the better. Here they own neighbouring columns, hence rows of W that lie
# ``inner`` elements apart (the lines serve the next steps as well, if the cache still has them):


def lines_of(addresses):
    return len(set((np.asarray(addresses) // 128).tolist()))


lane = np.arange(32)
print("lines for a warp's load of W in rung 1:", lines_of(4 * lane * inner), "- and of x, one address for all: 1")
print("lines when neighbours read neighbours:", lines_of(4 * lane))

# %%
# Rung 2: tiles in shared memory
# ------------------------------
# The 32 × 32 outputs of a block need 32 rows and 32 columns, and each of 1024 threads loads one element of both. Every
# element is then used 32 times, from shared memory.
show("2_tiled", "for (int i = 0; i < used; i += TILE)", "nobody reads")
traffic["2_tiled"], loads = count("2_tiled", 32)
tiles, columns = len(row_tiles(offsets, 32)), -(-outer // 32)
by_hand = [4 * (S * inner * columns + outer * inner * tiles), 4 * 2 * 32**3 * loads, 4 * 2 * 32**2 * loads]
print("counted:", traffic["2_tiled"], "by hand:", by_hand)
assert traffic["2_tiled"] == by_hand

# %%
# Each row is loaded once for every *column* of tiles, each weight once for every row tile *of its expert*. The rest is
# as the formula says: for 32 × 32 outputs and 32 steps 2 · 32³ operands from shared memory. Two barriers guard it: the
# tiles are complete before anybody multiplies, and nobody multiplies any more when the next ones come. Now shared
# memory is asked for two operands for each multiply-add that is *executed* (tiles that are 71 % full also execute
# those that nobody asked for), what global memory was asked for on rung 1.
#
# Rung 3: tiles in registers
# --------------------------
# The same formula, one level down. A thread owns 8 × 8 outputs, keeps their sums in registers, and loads 8 + 8 operands
# for 64 multiply-adds: an eighth of the reads of shared memory. That a block of 256 threads then owns 128 × 128 outputs
# cuts the traffic with global memory as well, to a fourth.
show("3_register", "for (int i = 0; i < DEPTH; i++) {", "sums[r][c] +=")
traffic["3_register"], loads = count("3_register", 8)
tiles, columns = len(row_tiles(offsets, 128)), -(-outer // 128)
# beyond the last column of W it loads the last one again, whose sums nobody stores: the width is a whole tile's
by_hand = [4 * (S * inner * columns + 128 * columns * inner * tiles), 4 * 256 * 8 * 16 * loads, 4 * 2 * 128 * 8 * loads]
print("counted:", traffic["3_register"], "by hand:", by_hand)
assert traffic["3_register"] == by_hand

# %%
# Rung 4: tensor cores
# --------------------
# A tensor core multiplies 16 × 16 by 16 × 8 in one instruction of a warp, ``mma.sync``, bfloat16 in, float32 sums. A
# warp's 64 × 32 outputs are 4 × 4 of these. The operands come by ``ldmatrix``, four 8 × 8 matrices at a time, which
# reads each word once for the warp and spreads it over the lanes' registers, so it is the *warp's* tile that counts in
# the formula. While one pair of tiles is
# multiplied, the copies of the next three are under way (``cp.async``, four stages), and token rows are gathered on the
# way in: each copy has its own address.
show("4_tensor_core", "for (int i = 0; i * DEPTH < inner; i++) {", "    }")
show("4_tensor_core", "for (int i = 0; i < MMA_ROWS; i++)", "mma_16x8x16(")
traffic["4_tensor_core"], loads = count("4_tensor_core", 32)
read = 2 * 8 * (4 + 2) * 32 * 16  # two halves of a tile, 8 warps, 4 + 2 ldmatrix, 32 lanes, 16 bytes
by_hand = [2 * (S * inner * columns + outer * inner * tiles), read * loads, 2 * 2 * 128 * 32 * loads]
print("counted:", traffic["4_tensor_core"], "by hand:", by_hand)
assert traffic["4_tensor_core"] == by_hand
per_product = read / 2 / (128 * 128 * 32)  # operands of 2 bytes, for the multiply-adds of a whole tile
print(f"operands from shared memory: {per_product:.4f}, the formula says {operands(64, 32):.4f}")
assert per_product == operands(64, 32)

# %%
# Rung 5: Hopper
# --------------
# ``mma.sync`` wants its operands in registers, and the instructions that bring them there should cost an H100's tensor
# cores much of their time; that is the expectation, to be measured. Hopper's ``wgmma`` lets four warps, a warpgroup,
# multiply 64 × 128 × 16 or 64 × 256 × 16 with both operands in shared memory, where a copy engine (TMA) puts whole
# boxes of a matrix when one thread asks for them. The first step changes nothing else: rung 4's tile, and a loop of all
# threads. Each of three stages has a barrier in memory, and thread 0 says how many bytes must come before its phase
# ends:
show("5_wgmma", "const auto ask", "};")

# %%
# All wait for that, two warpgroups multiply, and when nobody reads the stage any more thread 0 asks for what comes
# three steps later. A barrier's phases have parities 0, 1, 0, …, and who waits names the parity of the phase whose end
# it needs:
show("5_wgmma", "mbarrier_wait(shared->full", "ask(step + STAGES)")

# %%
# In each step the tensor cores wait for the last product, and for all threads to meet. A second block on the same
# multiprocessor may fill the gap. The second step, ``5_hopper``, closes it, and the block becomes a small factory: one
# *producer* asks for boxes, two warpgroups of *consumers* multiply, 128 × 256 outputs. They meet at two barriers for
# each of four stages. The producer:
show("5_hopper", "for (int deep = 0; deep < tile.inner", "}")

# %%
# It waits until the stage is empty (one that has never been used counts as empty, hence ``^ 1``), says how many bytes
# it expects, and names the boxes. The consumers wait until those bytes have come, and hand back the stage *before*,
# whose products are known to be done:
show("5_hopper", "mbarrier_wait(shared.full", "before = turn.stage")

# %%
# Loading does not stop between two tiles either: a block takes every so many-th tile of the grid, and while the
# consumers store one, the producer loads the next. What it takes for granted is that rows lie in expert order, since a
# box has no address for each row: x is gathered once, for both products that read it and for their gradients. The lines
# for ``GATHERED`` belong to a variant that makes no such copy: 128 threads of the producer gather rows by rung 4's
# ``cp.async``, which arrives at the barrier by itself, and the consumers put a fence between those writes and
# ``wgmma``, which reads by another path. By its bytes the copy is 1 % of a layer's time at 16384 tokens, so there is
# little to gain.
#
# Side by side, by the formula, for full tiles (of shared memory what is read; on rungs 4 and 5 a word counts once for
# the warp or warpgroup that it serves).
names, width = list(LEVELS), 0.38
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
sizes = {name: 2 if RUNGS[name].only_bfloat16 else 4 for name in names}  # bytes of an operand
of_global = [sizes[name] * operands(*LEVELS[name][0]) for name in names]
of_shared = [sizes[name] * operands(*LEVELS[name][1]) if LEVELS[name][1] else 0 for name in names]
for shift, values, label in ((-width / 2, of_global, "global memory"), (width / 2, of_shared, "shared memory")):
    bars = axes.bar(np.arange(len(names)) + shift, values, width, label=label)
    axes.bar_label(bars, [f"{v:.3g}" if v else "" for v in values], fontsize=8)
axes.set(yscale="log", ylim=(0.02, 30), ylabel="bytes per multiply-add", xticks=range(len(names)), xticklabels=names)
axes.legend()
axes.set_title("By the formula: bytes per multiply-add fall from 8 to 0.02 and 0.04")
plt.show()
print("FLOPs per byte of global memory:", {name: 2 / value for name, value in zip(names, of_global)})

# %%
# Rung 4 does 64 FLOPs for a byte that it asks of global memory, and the datasheet's ridge is at 206. Is it lost? Blocks
# beside each other ask for the same tiles, and the second time they come from the L2 cache, so the memory itself sees
# less. How much less is for a GPU to measure. From rung 3 to rung 4 the tile is the same, and the
# step is that of float32 to bfloat16. The last step asks for less to begin with, 85 FLOPs a byte, by a wider tile.
#
# What a lane holds
# -----------------
# A *fragment*, what a warp holds of an operand or of the sums, is spread over its lanes by a layout that the PTX manual
# prescribes. With g = lane / 4 and t = lane % 4, the
# sums of a 16 × 8 product lie in rows g and g + 8, columns 2t and 2t + 1. A programmer cannot choose it; one can only
# see to it that loads and stores fit.
#
# The second picture is about ``ldmatrix``, which reads 8 rows of 16 bytes at once. Shared memory has 32 banks of 4
# bytes, hence 8 such chunks at a time, if they lie in 8 different groups of banks. Rows of 64 bytes (32 deep, bfloat16)
# put every second row into the same group. Rung 4 permutes the chunks of a row by the row's number, an exclusive or:
show("4_tensor_core", "return DEEP ?", "}")
row, chunk = np.mgrid[:8, :4]


def bank_group(row, chunk):
    return (row * 64 + chunk * 16) // 16 % 8  # of 64-byte rows


plain, swizzled = bank_group(row, chunk), bank_group(row, chunk ^ row // 2 % 4)
for name, group in (("plain", plain), ("swizzled", swizzled)):
    print(f"{name}: the 8 rows of a chunk lie in {[len(set(column)) for column in group.T.tolist()]} groups")
assert all(len(set(column)) == 8 for column in swizzled.T.tolist())

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
owner = np.empty((16, 8), int)
for lane_ in range(32):
    for half in range(2):
        owner[lane_ // 4 + 8 * half, lane_ % 4 * 2 : lane_ % 4 * 2 + 2] = lane_
left.imshow(owner % 4, cmap="Pastel1", vmin=0, vmax=8, aspect="auto")
for (r, c), lane_ in np.ndenumerate(owner):
    left.text(c, r, lane_, ha="center", va="center", fontsize=7)
left.set(xlabel="column", ylabel="row", title="mma.sync: the lane of each sum")
for axes, group, title in ((middle, plain, "plain"), (right, swizzled, "swizzled")):
    axes.imshow(group, cmap="tab10", vmin=0, vmax=9, aspect="auto")
    for (r, c), g in np.ndenumerate(group):
        axes.text(c, r, g, ha="center", va="center", color="white")
    axes.set(xlabel="chunk of 16 bytes", ylabel="row", xticks=range(4), title=f"{title}: group of banks")
figure.suptitle(
    "Who holds what: a product's 16 x 8 sums over 32 lanes; a column of chunks in 2 groups of banks, then in 8"
)
plt.show()

# %%
# These pictures are computed, not observed. The emulator follows the documented layouts, which no hardware has
# confirmed here yet, and it knows no banks.
#
# Checked against NumPy
# ---------------------
# All of them through the library, in the emulator's checked build (lesson 13), with rows gathered from 50 tokens, as
# the first product of a layer does. Small integers make every sum exact, so that "equal" can mean equal; rungs 4 and 5
# round the result to bfloat16.
tokens = np.random.default_rng(2).integers(0, 50, S).astype(np.int32)
exact = in_numpy(x[tokens], w)
for name in RUNGS:
    dtype = device.BFLOAT16 if RUNGS[name].only_bfloat16 else np.float32
    with device.using("checked"):
        there = [device.array(a, dtype) for a in (x, w)]
        y = grouped_linear(*there, device.array(offsets, np.int32), device.array(tokens), using=name)
    assert (y == exact.astype(dtype)).all()
    print(f"{name}: {y.shape} equal to NumPy's product per expert")

# %%
# And the fused kernel of rung 4, for a layer's first two products: a block takes the same 64 columns of w1 and of w3,
# so that :math:`x w_1^\top` (gate) and :math:`x w_3^\top` (up) of an element end in the same thread, which computes
# silu(gate) · up before anything is stored. (x and the weights are divided by 4, to keep the sums in SwiGLU's range.)
w3 = np.random.default_rng(3).integers(-2, 3, w.shape).astype(np.float32)
with device.using("emulated"):
    bf16 = [device.array(a / 4, device.BFLOAT16) for a in (x, w, w3)]
    gate, up, hidden = grouped_swiglu(*bf16, device.array(offsets, np.int32), device.array(tokens))
wanted = reference.swiglu(exact / 16, in_numpy(x[tokens], w3) / 16)[0]
error = np.linalg.norm(hidden.astype(np.float32) - wanted) / np.linalg.norm(wanted)
print(f"fused SwiGLU: relative error {error:.4f}, a bfloat16 has 8 significant bits")
assert error < 2**-8

# %%
# Broken on purpose
# -----------------
# 1. *The second barrier of rung 2.* "All have loaded" is plain; that all must also have *read* is forgotten more often.
# 2. *A wait too short in rung 4.* ``wait_for_copies<STAGES - 2>`` lets two groups be under way, so that the one before
#    them has come. With ``STAGES - 1`` the tile may still be on its way when it is multiplied. In the emulator a copy
#    happens at the last moment that is legal, so that nothing comes in time by luck.


def broken(name, right, wrong):
    assert right in source_of(name)
    path = Path(folder.name, f"lesson_broken_{name}.cu")
    path.write_text(source_of(name).replace(right, wrong))
    T, dtype = ("bfloat16", device.BFLOAT16) if name == "4_tensor_core" else ("float", np.float32)
    kernels = device.Kernels(str(path), f"grouped_gemm<{T}, true>")
    device.ALL.remove(kernels)  # the list is of tinymoe's own
    (height, width), block = RUNGS[name].tile, RUNGS[name].block
    with device.using("checked"):
        there = [device.array(x, dtype), None, device.array(w, dtype), device.array(offsets, np.int32)]
        y = device.empty((S, outer), dtype)
        grid = S // height + len(groups) + 1, -(-outer // width)
        try:
            kernels.launch(
                *(f"grouped_gemm<{T}, true>", grid, block, *there, y, len(groups), S, inner, outer),
                shared=RUNGS[name].shared,
            )
        except KernelError as error:
            print(error)
            return error
    raise AssertionError("nobody noticed")


assert broken("2_tiled", "        __syncthreads();  // nobody reads them any more\n", "").kind == "race"
assert broken("4_tensor_core", "wait_for_copies<STAGES - 2>", "wait_for_copies<STAGES - 1>").kind == "in flight"

# %%
# In the first, thread 0 has already written the next step's tile when thread 1 reads: hence "not ordered after". A
# third mistake is one of design. Padding every group to the largest makes one batched product of a fixed shape, and
# no walk over offsets. What it multiplies:
print(f"padded to the largest group: {len(groups) * max(groups)} rows in place of {S}; with one expert at 90 % of 8192")
print(f"rows and eight experts: {8 * 0.9:.1f} times the work")

# %%
# Remember
# --------
# * Count before you code: FLOPs, bytes that must move, bytes that your tiling moves.
# * An h × w tile needs 1/h + 1/w operands per multiply-add, on each level of memory. That formula is most of the
#   ladder.
# * Groups are tiled one by one; a tile has one expert. The grid is sized for the worst routing, or walks
#   from tile to tile, so that the host need not know the routing.
# * Each rung is meant to move the bottleneck: global memory, shared memory, arithmetic units, waiting.
# * Traffic can be counted without a GPU. Time cannot, and none of these has been timed.
#
# **Ask yourself.** (a) How many FLOPs is the product of 182 rows, inner 64, outer 160? (b) Why does the number of
# groups not appear in it? (c) How often does rung 2 load each weight of an expert with 140 rows? (d) A block's tile is
# 64 × 256: operands per multiply-add? (e) What side would a square tile need for the same? (f) Why does rung 3 need 64
# registers for a thread, before any others? (g) Rung 2 has two barriers in each step, rung 4 one. Why is one enough?
# (h) What does a block do whose tile number is beyond all groups? (i) Why may rung 4 sum in another order than rung 3,
# and how could we demand equality all the same? (j) What would have to be measured on a GPU before one may say that
# rung 4 is faster than rung 3?
#
# Exercises
# ---------
# 1. A tile of 128 × 256, 64 deep, bfloat16, four stages: operands per multiply-add, FLOPs per byte, and does it fit
#    into 227 KiB of shared memory? And 256 × 256?
# 2. Show that ``S // height + experts + 1`` row tiles are always enough, and look by brute force for a routing that
#    needs all but one of them.
# 3. Rung 2 declares its tiles ``[32][33]``. When W is transposed a warp writes ``b[tx][ty]``, tx from 0 to 31. How many
#    lanes share a bank with rows of 33 floats, and with rows of 32?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) 2 · 182 · 64 · 160 = 3.7 million; (b) each row is multiplied by one expert's weights, whichever it
# is; (c) 140 rows are 5 tiles of 32, so five times; (d) 1/64 + 1/256 = 5/256; (e) 2/n = 5/256, n = 102.4: the side of a
# square is the harmonic mean; (f) 8 × 8 sums; (g) the stage that is overwritten is the one that was multiplied a step
# before, and the barrier at the step's beginning says that all are done with it; (h) its range of rows is empty: it
# stores nothing (a tile of rows that no expert owns stores zeros); (i) addition of floats is not associative, and
# inside of one instruction the order is the hardware's; with small integers every order is exact; (j) both, on the
# same data, in the same run, on that GPU, with results compared.
assert 2 * products == 2 * 182 * 64 * 160

# %%
# 1. 1/128 + 1/256 = 3/256 operands, and 85 FLOPs a byte. A stage is (128 + 256) · 64 · 2 bytes = 48 KiB, four are 192
#    KiB: it fits. 256 × 256 has 128 FLOPs a byte, a stage of 64 KiB, and three stages at most.
for h, w_ in ((128, 256), (256, 256)):
    print(f"{h} x {w_}: {2 / (2 * operands(h, w_)):.1f} FLOP a byte, {4 * (h + w_) * 64 * 2 / 1024:.0f} KiB")
assert round(2 / (2 * operands(128, 256)), 1) == 85.3
assert 4 * (128 + 256) * 64 * 2 <= 227 * 1024 < 4 * (256 + 256) * 64 * 2

# %%
# 2. :math:`\lceil S_e / h \rceil \le \lfloor S_e / h \rfloor + 1`, and the floors of the parts sum to at most the floor
#    of the sum: :math:`\lfloor S / h \rfloor + E` are enough for E experts. The rows that no expert owns (dropped
#    pairs) are one part more, hence + 1. Without such rows, and with fewer experts than a tile has
#    rows, the bound less one is reached when every group leaves one row over:
h, E_ = 8, 4
worst = max(sum(-(-g // h) for g in sizes_) - sum(sizes_) // h for sizes_ in product(range(10), repeat=E_))
print("most tiles beyond S // height, of four experts:", worst)
assert worst == E_

# %%
# 3. The address of b[tx][ty] is tx · row + ty. With 33 all banks differ; with 32 all lanes hit the same.
for length in (33, 32):
    lanes_of_bank = np.bincount((lane * length + 5) % 32, minlength=32).max()
    print(f"rows of {length}: {lanes_of_bank} lanes in one bank")
assert np.bincount(lane * 33 % 32).max() == 1

# %%
# .. raw:: html
#
#    </details>

# %%
# Remove what this lesson has compiled.
folder.cleanup()
for library in [*compiler.cache().glob("lesson_count_*.so"), *compiler.cache().glob("lesson_broken_*.so")]:
    library.unlink(missing_ok=True)

# %%
# **Next:** :doc:`lesson 16 </lessons/lesson_16_backward_kernels>` goes back through all of this, and adds up without a
# single atomic.
