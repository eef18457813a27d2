r"""
Lesson 13 · CUDA's model: blocks, threads and barriers on your CPU
==================================================================

**The question.** A GPU runs many thousands of threads, in an order that nobody promises. What may a program take for
granted about that order, and how does one find out, without a GPU, that it took too much?

So far every component was NumPy. From here on the same components are *kernels*: C++ functions that run once per
thread. tinymoe compiles them for an NVIDIA GPU, or, as here, for this CPU through an emulator, which needs no more than
a C++ compiler. What the emulator cannot show is time, and no kernel of this project has been timed on a GPU yet. What
it shows better than a GPU is whether a kernel is *right*: in which orders its threads may run, and what each of them
touches.

**You need** a little C, g++, and the running line from :doc:`lesson 1 </lessons/lesson_01_bytes>`. No GPU.
"""

# %%
# A function for every thread
# ---------------------------
# A launch starts a **grid** of **blocks**, each of the same number of **threads**, and every thread runs the same
# function. All that tells a thread from the next are two numbers that it can read: which block it is in, ``blockIdx``,
# and which thread of the block it is, ``threadIdx``. The usual first lines of a kernel turn them into "my element".
# Here a thread owns one byte of the line and writes it in capitals; a block has 8 threads, so that we can look at all
# of them (real ones have 128 or 256).
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tinymoe.cuda import device
from tinymoe.cuda.emulator import ORDERS, KernelError, compiler, scheduled

LINE = "def add(a, b): return a + b"
N, THREADS = len(LINE), 8
BLOCKS = -(-N // THREADS)  # rounded up

CAPITALS = """#include "prelude.h"

__global__ void capitals(const int *bytes, int *out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = 'a' <= bytes[i] && bytes[i] <= 'z' ? bytes[i] - 32 : bytes[i];
}
"""

# %%
# A launcher is a few lines: the source in a file, the names of its kernels, then grid, block and arguments. The library
# declares its own kernels in the same way (:class:`tinymoe.cuda.device.Kernels`); arrays are NumPy's here, and would
# be CuPy's on a GPU.
folder = tempfile.TemporaryDirectory()


def kernels_of(source, name):
    path = Path(folder.name, f"lesson_{name}.cu")
    path.write_text(source)
    kernels = device.Kernels(str(path), name)
    device.ALL.remove(kernels)  # the list is of tinymoe's own
    return kernels


def run(source, name, *sizes, build="emulated", order="forward", seed=0, grid=BLOCKS):
    """Launch a kernel on the bytes of the line; return its outputs, integers that begin as zeros."""
    with device.using(build), scheduled(order, seed):
        outputs = [device.zeros(size, np.int32) for size in sizes]
        kernels_of(source, name).launch(name, grid, THREADS, tokens, *outputs, N)
    return outputs[0] if len(outputs) == 1 else outputs


with device.using("emulated"):
    tokens = device.array(np.frombuffer(LINE.encode(), np.uint8), np.int32)  # (N,)
out = run(CAPITALS, "capitals", N)
print(f"{BLOCKS} blocks of {THREADS} threads for {N} bytes: {BLOCKS * THREADS - N} threads have nothing to do")
print(bytes(out.tolist()).decode())
assert bytes(out.tolist()).decode() == LINE.upper()

# %%
# The grid is a whole number of blocks, so the last block reaches beyond the line. That is what
# ``if (i >= n) return;`` is for, and leaving it out is the most common mistake of all. We come back to it.
index = np.arange(BLOCKS * THREADS).reshape(BLOCKS, THREADS)

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.imshow(np.where(index < N, index // THREADS, np.nan), cmap="Pastel1", aspect="auto", vmin=0, vmax=8)
for (b, t), i in np.ndenumerate(index):
    text = LINE[i].replace(" ", "␣") if i < N else "–"
    axes.text(t, b, text, ha="center", va="center", family="monospace", fontsize=13)
axes.set(xlabel="threadIdx.x", ylabel="blockIdx.x", xticks=range(THREADS), yticks=range(BLOCKS))
axes.set_title("A thread per byte; five threads of the last block own none")
plt.show()

# %%
# No order
# --------
# Blocks are independent: the hardware starts them in any order, as many at a time as fit, and nothing makes one wait
# for another. Within a block there is one means to wait, the **barrier** ``__syncthreads()``: no thread goes on until
# all threads of its block have come. Between two barriers there is no order either.
#
# The emulator makes each thread a fiber and runs one block at a time, each thread until it has to wait. A *schedule*
# says who comes next: forward, reverse, or shuffled by a seed. To see one, let every thread draw a ticket before a
# barrier and another one behind it. ``atomicAdd`` returns what was there and adds, as one step that nobody can come
# between.
TICKETS = """#include "prelude.h"

__global__ void tickets(const int *bytes, int *counter, int *before, int *behind, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    before[i] = atomicAdd(counter, 1);
    __syncthreads();
    behind[i] = atomicAdd(counter, 1);
}
"""
figure, all_axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained", sharey=True)
for axes, order in zip(all_axes, ORDERS):
    _, before, behind = run(TICKETS, "tickets", 1, BLOCKS * THREADS, BLOCKS * THREADS, order=order, seed=1)
    for b in range(BLOCKS):
        mine = slice(b * THREADS, (b + 1) * THREADS)
        assert before[mine].max() < behind[mine].min()  # in every order, all have come before one goes on
    axes.plot(before, range(BLOCKS * THREADS), "o", markersize=4, label="before the barrier")
    axes.plot(behind, range(BLOCKS * THREADS), "s", markersize=4, label="behind it")
    axes.set(title=order, xlabel="ticket", yticks=range(0, BLOCKS * THREADS + 1, THREADS))
all_axes[0].set_ylabel("thread of the grid")
all_axes[0].legend(fontsize=8)
figure.suptitle("Three schedules of four blocks: only the barrier holds in all of them")
plt.show()

# %%
# Tickets may depend on the order; a component's result may not. So we demand the same result in all schedules. That is
# a strong test: the emulator can run an order that a GPU would choose once in a month.
#
# Shared memory
# -------------
# Threads of a block share a small fast memory, declared ``__shared__``: at most 48 KiB for a block when declared like
# this, 227 KiB on a Hopper GPU if one asks for it, with anything in it when the block begins, gone when it ends. It is
# for what several threads of a block need. Global memory, where the arrays are, is for everything else, and a variable
# like ``i`` is in the thread's own registers.
#
# Our example is the smallest that needs a neighbour: **bigrams**, each byte together with the one before, as the number
# 256 · before + byte. Every thread puts its byte into shared memory; behind the barrier it takes its neighbour's.
BIGRAMS = """#include "prelude.h"

__global__ void bigrams(const int *bytes, int *pairs, int n) {
    __shared__ int tile[8];
    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    if (i < n) tile[t] = bytes[i];
    __syncthreads();  // all bytes are in the tile
    if (i >= n) return;
    const int before = t > 0 ? tile[t - 1] : i > 0 ? bytes[i - 1] : 0;
    pairs[i] = 256 * before + bytes[i];
}
"""
expected = 256 * np.concatenate([[0], tokens[:-1]]) + tokens
pairs = run(BIGRAMS, "bigrams", N)
print([chr(pair // 256) + chr(pair % 256) for pair in pairs[1:9]])
for order in ORDERS:
    for seed in range(5):
        assert (run(BIGRAMS, "bigrams", N, order=order, seed=seed) == expected).all()
print("the same forward, in reverse and in five random schedules")

# %%
# Two details. Thread 0 has no neighbour in its block and reads global memory: shared memory ends at the block. And the
# threads beyond the line still come to the barrier, and leave behind it. A barrier waits for *all* threads of the
# block.
#
# Broken on purpose
# -----------------
# **The barrier forgotten.** Without it a thread may read the tile before its neighbour has written. Let us see whether
# a test would notice.
without = BIGRAMS.replace("    __syncthreads();  // all bytes are in the tile\n", "")
for number, line in enumerate(without.splitlines(), 1):
    print(f"{number:2} {line}")
for order in ORDERS:
    print(f"{order:9} right: {(run(without, 'bigrams', N, order=order) == expected).all()}")
assert (run(without, "bigrams", N) == expected).all()
assert (run(without, "bigrams", N, order="reverse") != expected).any()

# %%
# In the forward order thread 0 writes before thread 1 reads, and the result is right. On a GPU it would most likely be
# right as well, since 8 threads usually go side by side; nothing promises it. A test that compares numbers passes,
# until a block has 256 threads and a busy day. Shuffled orders are one answer. The other is to look not at the numbers
# but at the accesses.
#
# The **checked build** compiles the same source with a call before every load and store. The checker keeps, for each
# cell of memory, who wrote it last and who has read it since, and for each thread, what it can know to have happened:
# its own past, and at a barrier everybody's. An access is a **race** if another thread's access to the same cell is
# not known to come before it, one of the two writes, and not both are atomic. No unlucky order is needed: as long as
# the order does not change *which* cells are touched, every schedule shows it.


def caught(launch, source, *arguments, **how):
    try:
        launch(source, *arguments, build="checked", **how)
    except KernelError as error:
        print(error)
        return error
    raise AssertionError("nobody noticed")


error = caught(run, without, "bigrams", N)
assert (error.kind, error.line, error.block, error.thread) == ("race", 8, (0, 0, 0), (1, 0, 0))
assert (run(BIGRAMS, "bigrams", N, build="checked") == expected).all()

# %%
# Kernel, file and line, block, thread, the byte, and the other thread: thread 1 reads what thread 0 wrote, and nothing
# stands between. The right kernel passes.
#
# **The threads that leave too early.** It seems tidy to have the guard at the top. Then the last block's idle threads
# are gone when the others come to the barrier. Since Volta a GPU waits only for threads that have not returned, and
# this kernel would run; on older ones it may hang. The emulator holds to the stricter rule, all threads of the block,
# in both builds.
early = BIGRAMS.replace("    if (i >= n) return;\n", "").replace(
    "    if (i < n) tile[t] = bytes[i];\n", "    if (i >= n) return;\n    tile[t] = bytes[i];\n"
)
error = caught(run, early, "bigrams", N)
assert (error.kind, error.block) == ("divergence", (BLOCKS - 1, 0, 0))

# %%
# **The guard forgotten.** Thread 3 of the last block would own byte 27, and there are 27, from 0 to 26. In C that reads
# whatever lies behind the array, and a neighbour's data makes no noise. The checker knows where each argument ends:
error = caught(run, CAPITALS.replace("    if (i >= n) return;\n", ""), "capitals", N)
assert (error.kind, error.block, error.thread) == ("out of bounds", (3, 0, 0), (3, 0, 0))

# %%
# **A sum without an atomic.** How often does each byte occur? A thread per byte, and a counter per value.
# ``counts[b]++`` is a load, an addition and a store; if two threads load before either stores, one increment is lost.
# In the emulator's fast build nobody comes between, and the result is right in every order. Only the checker sees it:
HISTOGRAM = """#include "prelude.h"

__global__ void histogram(const int *bytes, int *counts, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&counts[bytes[i]], 1);
}
"""
counts = np.bincount(tokens, minlength=256)
lost = HISTOGRAM.replace("atomicAdd(&counts[bytes[i]], 1)", "counts[bytes[i]]++")
print("fast build right:", all((run(lost, "histogram", 256, order=order) == counts).all() for order in ORDERS))
error = caught(run, lost, "histogram", 256)
assert error.kind == "race"
assert (run(HISTOGRAM, "histogram", 256, build="checked") == counts).all()

# %%
# With integers an atomic sum is exact, and any order gives the same. With floats it is not, and
# :doc:`lesson 16 </lessons/lesson_16_backward_kernels>` shows what that costs.
#
# A sum that a block shares
# -------------------------
# Norms, softmax and losses all add up a row. One thread could walk along it; a block does better. Each thread adds
# every 8th element, then half of the threads add the other half's sums to theirs, then a quarter, and so on: 3 steps
# for 8 threads, :math:`\log_2` of their number. Each step reads what others wrote in the one before, so each needs a
# barrier.
SQUARES = """#include "prelude.h"

__global__ void squares(const float *x, float *sums, int D) {
    __shared__ float part[8];
    const int t = threadIdx.x;
    float sum = 0;
    for (int d = t; d < D; d += 8) sum += x[blockIdx.x * D + d] * x[blockIdx.x * D + d];
    part[t] = sum;
    for (int half = 4; half; half /= 2) {
        __syncthreads();  // the sums of the step before are there
        if (t < half) part[t] += part[t + half];
    }
    if (t == 0) sums[blockIdx.x] = part[0];
}
"""
D = 50  # no multiple of 8
rng = np.random.default_rng(0)
rows = rng.standard_normal((256, D)).astype(np.float32)[tokens]  # (N, D): the same byte gives the same row


def sum_squares(source, build="emulated", order="forward"):
    with device.using(build), scheduled(order):
        x, sums = device.array(rows), device.empty(N, np.float32)
        kernels_of(source, "squares").launch("squares", N, THREADS, x, sums, D)
    return sums


tree, serial = np.zeros((N, THREADS), np.float32), np.zeros(N, np.float32)
for d in range(D):
    tree[:, d % THREADS] += rows[:, d] ** 2
    serial += rows[:, d] ** 2
for half in (4, 2, 1):
    tree[:, :half] += tree[:, half : 2 * half]
for build in ("emulated", "checked"):
    for order in ORDERS:
        assert sum_squares(SQUARES, build, order).tobytes() == tree[:, 0].tobytes()
print(f"same bits as this tree in NumPy; {(tree[:, 0] != serial).sum()} of {N} rows differ from a serial sum")
np.testing.assert_allclose(tree[:, 0], serial, rtol=1e-5)

# %%
# Not only close: the same bits, in three schedules and both builds, because the kernel fixes which sums are added to
# which. (NumPy's bits as well, because the emulator rounds product and sum separately; a GPU's compiler fuses them into
# one instruction, and the last bits are its own.) It is another order than a single thread's, so the last bits differ
# from that one's. This is the contract of all kernels here: they
# may add in an order of their own, but always in the same one.
#
# Take the barrier out of the loop, so that it stands once before it, and the checker names the loop's line:
once = SQUARES.replace("        __syncthreads();  // the sums of the step before are there\n", "")
once = once.replace("    part[t] = sum;\n", "    part[t] = sum;\n    __syncthreads();\n")
error = caught(sum_squares, once)
assert error.kind == "race"
assert "part[t] +=" in once.splitlines()[error.line - 1]

# %%
# Checked against the library
# ---------------------------
# The same shape, a row to each group of threads and a tree over the group, is the library's RMSNorm, whose group is a
# warp of 32 and whose tree is shuffles in place of shared memory (:doc:`lesson 14
# </lessons/lesson_14_dispatch_kernels>`; on paper, :doc:`/math/kernel_reductions`). Its file begins like all of them:
# the idea, the grid, what a thread owns, bytes and FLOPs.
from tinymoe import reference
from tinymoe.cuda import rmsnorm

print("\n".join((device.KERNELS / "rmsnorm.cu").read_text().splitlines()[:4]))
ones = np.ones(D, np.float32)
with device.using("checked"):
    y, _ = rmsnorm(device.array(rows), device.array(ones), 1e-5)
np.testing.assert_allclose(y, rows / np.sqrt(tree[:, :1] / D + np.float32(1e-5)), rtol=1e-5)
np.testing.assert_allclose(y, reference.rmsnorm(rows, ones, 1e-5)[0], rtol=1e-5)
print("the library's kernel, our sums and the reference agree")

# %%
# What the emulator does not show
# -------------------------------
# Time, first of all: how many threads fit on a multiprocessor, whether neighbouring threads read neighbouring addresses
# (a GPU fetches lines, not words), conflicts in the banks of shared memory. Nor the reorderings of a weak memory model
# between blocks: whatever two blocks pass each other within one launch it reports as a race, fences or not. And blocks
# run one after the other, so one that spins until another has done something never ends; a watchdog stops it.
#
# It does let you stop in a kernel: ``TINYMOE_DEVICE=checked gdb --args python program.py``, then a breakpoint such as
# ``break rmsnorm.cu:23 if threadIdx.x == 33``.
#
# Remember
# --------
# * A kernel is a function that every thread runs; its place in the grid is all that it knows. Guard the last block.
# * Blocks have no order and cannot wait for each other within an ordinary launch. Threads of a block wait at a barrier,
#   all of them; here it is an error if one has left.
# * Two accesses to one cell, one of them a write, not both atomic, nothing that orders them: a race, even when the
#   numbers are right. Compare numbers in several schedules, and let the checker look at the accesses.
# * A tree of fixed shape gives the same bits in every schedule.
#
# **Ask yourself.** (a) Which threads of the last block take part in the barrier of ``bigrams``, and why must they?
# (b) The bigrams without a barrier pass in the forward order. Which threads may read wrong values in the reverse order,
# and which cannot? (c) Why can two blocks not exchange a value through shared memory? (d) 1000 rows, a block of 8
# threads each, rows of 50: how many threads run, and how many squares does the busiest of them add? (e) Why is
# ``counts[b]++`` right in the emulator's fast build, and what would it take to go wrong?
#
# Exercises
# ---------
# 1. Write ``trigrams``: 65536 · (two before) + 256 · before + byte, from the tile where the tile has it. Check it in
#    the checked build.
# 2. Let a block own two pieces of 8 bytes and go through them one after the other with the same tile. How many barriers
#    does it need? Take each out, and see what is caught.
# 3. A histogram that asks less of global memory: count in shared memory (``__shared__ int mine[256]``), then add the
#    counts that are not zero. How many atomics reach global memory, before and after?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) all 8, since a barrier waits for every thread of the block; the five without a byte write and read
# nothing; (b) threads 1 to 7 of each block (of the last only 1 and 2), whose neighbour comes later; thread 0 reads
# global memory; (c) each block has its own, and the other may not have begun or may be over (Hopper's clusters, blocks
# that are started together, are the exception); (d) 8000 threads; threads 0 and 1 add 7 squares each,
# the others 6; (e) a fiber is not interrupted between load and store; two threads that really run at once are.
#
# 1. Threads 0 and 1 look beyond the tile.
TRIGRAMS = """#include "prelude.h"

__global__ void trigrams(const int *bytes, int *out, int n) {
    __shared__ int tile[8];
    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    if (i < n) tile[t] = bytes[i];
    __syncthreads();
    if (i >= n) return;
    const int before = t > 0 ? tile[t - 1] : i > 0 ? bytes[i - 1] : 0;
    const int two_before = t > 1 ? tile[t - 2] : i > 1 ? bytes[i - 2] : 0;
    out[i] = 65536 * two_before + 256 * before + bytes[i];
}
"""
expected_trigrams = expected + 65536 * np.concatenate([[0, 0], tokens[:-2]])
assert (run(TRIGRAMS, "trigrams", N, build="checked", order="shuffled") == expected_trigrams).all()

# %%
# 2. Two in each round: all have written before anybody reads, and all have read before anybody overwrites. (The one at
#    the end of the last round is not needed.) Both are caught in the line that reads the tile. Without the first,
#    thread 1 may read what thread 0 has not written yet; without the second, what it has overwritten already.
TWO = """#include "prelude.h"

__global__ void bigrams(const int *bytes, int *pairs, int n) {
    __shared__ int tile[8];
    const int t = threadIdx.x;
    for (int piece = 0; piece < 2; piece++) {
        const int i = (2 * blockIdx.x + piece) * 8 + t;
        if (i < n) tile[t] = bytes[i];
        __syncthreads();  // written
        if (i < n) pairs[i] = 256 * (t > 0 ? tile[t - 1] : i > 0 ? bytes[i - 1] : 0) + bytes[i];
        __syncthreads();  // read
    }
}
"""
assert (run(TWO, "bigrams", N, build="checked", grid=2) == expected).all()
for which in ("written", "read"):
    error = caught(run, TWO.replace(f"__syncthreads();  // {which}", ""), "bigrams", N, grid=2)
    assert (error.kind, error.line) == ("race", 10)

# %%
# 3. Before, one for every byte: 27. After, one for each value that a block has, so only what a block has twice is
#    saved. Of 8 bytes that is little, of 256 bytes of text it is most.
SHARED_HISTOGRAM = """#include "prelude.h"

__global__ void histogram(const int *bytes, int *counts, int n) {
    __shared__ int mine[256];
    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    for (int v = t; v < 256; v += blockDim.x) mine[v] = 0;
    __syncthreads();  // zeros before counts
    if (i < n) atomicAdd(&mine[bytes[i]], 1);
    __syncthreads();  // all are counted
    for (int v = t; v < 256; v += blockDim.x)
        if (mine[v]) atomicAdd(&counts[v], mine[v]);
}
"""
assert (run(SHARED_HISTOGRAM, "histogram", 256, build="checked") == counts).all()
after = sum(len(set(LINE[i : i + THREADS])) for i in range(0, N, THREADS))
print(f"atomics in global memory: {N} before, {after} after")
assert after < N

# %%
# .. raw:: html
#
#    </details>

# %%
# Remove what this lesson has compiled.
folder.cleanup()
for name in ("capitals", "tickets", "bigrams", "histogram", "squares", "trigrams"):
    for library in compiler.cache().glob(f"lesson_{name}-*.so"):
        library.unlink(missing_ok=True)

# %%
# **Next:** :doc:`lesson 14 </lessons/lesson_14_dispatch_kernels>` takes 32 threads that need no barrier, a warp, and
# sorts the tokens of a mixture with them.
