"""Hopper's barriers, tiles and products do on this CPU what their words say, and every misuse is caught."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from emulation import EVERYWHERE, orders, running
from hypothesis import given
from hypothesis import strategies as st

from tinymoe.cuda import device, nvrtc
from tinymoe.cuda.emulator import KernelError, scheduled
from tinymoe.cuda.tile_map import tile_map

SOURCE = Path(__file__).parent / "kernels" / "hopper.cu"
SCHEDULES = [("forward", 0, 0), ("reverse", 0, 0), ("reverse", 1, 3)] + [
    ("shuffled", seed, preempt) for seed, preempt in itertools.product(range(3), (0, 2, 10))
]


class Bug(NamedTuple):
    """A value of the kernel's Bug, and the kinds of error it may come to, by schedule."""

    name: str
    kinds: str


BUGS = [
    Bug("STAGE_FREED_TOO_EARLY", "in flight"),
    Bug("STAGE_NEVER_WAITED_FOR", "in flight|mbarrier|deadlock"),
    Bug("WRONG_PARITY", "in flight|uninitialised|deadlock"),
    Bug("TOO_FEW_BYTES", "in flight|uninitialised"),
    Bug("TOO_MANY_BYTES", "deadlock"),
    Bug("NO_BARRIER_AFTER_INIT", "race|uninitialised"),
    Bug("NO_FENCE_AFTER_INIT", "unfenced"),
    Bug("NO_INIT", "uninitialised"),
    Bug("NO_BARRIER_AT_ALL", "mbarrier"),
    Bug("ARRIVES_TWICE", "mbarrier"),
    Bug("NO_WGMMA_FENCE", "unfenced"),
    Bug("NO_WGMMA_WAIT", "in flight"),
    Bug("NO_COMMIT", "in flight"),
    Bug("ONE_WARP_ELSEWHERE", "divergence"),
    Bug("MISALIGNED_TILE", "misaligned"),
    Bug("TILE_NOBODY_WAITS_FOR", "in flight"),
]
BUGS_OF_COPIES = [
    Bug("COPIES_UNFENCED", "unfenced"),
    Bug("COPIES_NOT_WAITED_FOR", "in flight|uninitialised|race"),
    Bug("COPIES_NOBODY_READS", "in flight"),
    Bug("ARRIVES_BEFORE_ITS_COPIES", "in flight"),
    Bug("TOO_FEW_ARRIVALS", "in flight|race|uninitialised|deadlock"),
    Bug("TOO_MANY_ARRIVALS", "deadlock"),
]
LAYOUTS = [f"{a}, {b}" for a in ("false", "true") for b in ("false", "true")]
KERNELS = device.Kernels(
    SOURCE,
    *(f"multiply<{stages}, {layout}, NONE>" for stages in (1, 3) for layout in LAYOUTS),
    *(f"multiply<2, false, true, {bug.name}>" for bug in [*BUGS, Bug("ACCUMULATOR_READ_TOO_EARLY", "")]),
    *(f"multiply_written<{n}, {fenced}>" for n in (64, 128, 256) for fenced in ("true", "false")),
    *(f"multiply_copied<{bug}>" for bug in ["NONE", *(bug.name for bug in BUGS_OF_COPIES)]),
)


def multiply(a, b, stages=2, layout="false, true", bug="NONE"):
    """Return the product of a (m, k) and b (k, n), small integers, each stored as the layout says."""
    (m, k), n = a.shape, b.shape[1]
    a_columns, b_columns = (word == "true" for word in layout.split(", "))

    def stored(matrix):  # rows of a multiple of 8 elements, the last ones zeros
        return device.array(np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % 8))).astype(device.BFLOAT16))

    c = device.empty((m, n), np.float32)
    KERNELS.launch(
        f"multiply<{stages}, {layout}, {bug}>",
        (-(-n // 64), -(-m // 64)),
        160,
        tile_map(stored(a.T if a_columns else a), 64),
        tile_map(stored(b if b_columns else b.T), 64),
        *(c, m, n, k),
        shared=stages * (2 * 64 * 64 * 2 + 2 * 8),
    )
    return device.host(c)


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-8, 9, shape)  # their products are exact, in any order


@pytest.mark.parametrize("where", EVERYWHERE)
@given(
    m=st.integers(1, 100),
    n=st.integers(1, 100),
    k=st.integers(1, 300),
    stages=st.sampled_from([1, 3]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
    order=orders,
)
def test_pipeline_equals_numpy_bit_for_bit(where, m, n, k, stages, layout, seed, order):
    a, b = integers(seed, m, k), integers(seed + 1, k, n)
    with running(where, order):
        assert np.array_equal(multiply(a, b, stages, layout), a @ b)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_block_leaves_no_barriers_to_the_next(where):
    a, b = integers(0, 1200, 8), integers(1, 8, 1200)  # 361 blocks of 6 barriers, of which one block may have 1886
    with device.using(where):
        assert np.array_equal(multiply(a, b, stages=3), a @ b)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("n", [64, 128, 256])
def test_product_of_what_the_warpgroup_wrote(where, n):
    a, b = integers(0, 64, 16), integers(1, n, 16)
    with device.using(where):
        c = device.empty((64, n), np.float32)
        written = [device.array(matrix.astype(device.BFLOAT16)) for matrix in (a, b)]
        KERNELS.launch(f"multiply_written<{n}, true>", 1, 128, *written, c, shared=(64 + n) * 128)
        assert np.array_equal(device.host(c), a @ b.T)


def multiply_copied(a, b, bug="NONE"):
    """Return a (64, 16) times b (64, 16)ᵀ, small integers, which one warp copies and another multiplies."""
    c, copied = device.empty((64, 64), np.float32), [device.array(matrix.astype(device.BFLOAT16)) for matrix in (a, b)]
    KERNELS.launch(f"multiply_copied<{bug}>", 1, 160, *copied, c, shared=2 * 64 * 128 + 8)
    return device.host(c)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(seed=st.integers(0, 99), order=orders)
def test_product_of_what_a_warp_copied(where, seed, order):
    a, b = integers(seed, 64, 16), integers(seed + 1, 64, 16)
    with running(where, order):
        assert np.array_equal(multiply_copied(a, b), a @ b.T)


def lines_of(bug):
    """Return the lines below the comments that name a bug."""
    lines = enumerate(SOURCE.read_text().splitlines(), 1)
    return [i + 1 for i, line in lines if re.search(rf"// caught below:.*\b{bug}\b", line)]


def assert_caught(bug, run):
    for schedule in SCHEDULES:
        with device.using("checked"), scheduled(*schedule), pytest.raises(KernelError) as caught:
            run()
        error = caught.value
        assert error.kind in bug.kinds.split("|"), (schedule, error)
        assert error.line in lines_of(bug.name), (schedule, error)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught_where_it_stands(bug):
    a, b = integers(0, 70, 400), integers(1, 400, 60)
    assert_caught(bug, lambda: multiply(a, b, bug=bug.name))


@pytest.mark.parametrize("bug", BUGS_OF_COPIES, ids=lambda bug: bug.name)
def test_bug_of_copies_is_caught_where_it_stands(bug):
    a, b = integers(0, 64, 16), integers(1, 64, 16)
    assert_caught(bug, lambda: multiply_copied(a, b, bug.name))


@pytest.mark.parametrize("n", [64, 128, 256])
def test_written_without_a_fence_is_caught(n):
    a, b = (device.array(integers(i, rows, 16).astype(device.BFLOAT16)) for i, rows in enumerate((64, n)))
    with device.using("checked"), pytest.raises(KernelError) as caught:
        KERNELS.launch(
            f"multiply_written<{n}, false>", 1, 128, a, b, device.empty((64, n), np.float32), shared=(64 + n) * 128
        )
    assert caught.value.kind == "unfenced"
    assert caught.value.line in lines_of("UNFENCED")


@pytest.mark.parametrize("where", ["emulated", "checked"])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_accumulator_is_nan_until_its_product_is_waited_for(where, order):
    with device.using(where), scheduled(order):
        found = multiply(integers(0, 64, 64), integers(1, 64, 64), bug="ACCUMULATOR_READ_TOO_EARLY")
    assert np.isnan(found).any()
    assert not np.isnan(found).all()


def test_compiles_for_hopper():
    pytest.importorskip("cuda.bindings", reason="NVRTC is not installed: pip install 'tinymoe[nvrtc]'")
    right = device.Kernels(SOURCE, *(e for e in KERNELS.expressions if "NONE" in e or "true>" in e))
    compiled = nvrtc.compile_cubin(right, "sm_90a")
    assert all(compiled.resources[e].spills == 0 for e in right.expressions)


@pytest.mark.parametrize(
    ("shape", "dtype", "box", "complaint"),
    [
        ((4, 12), "bfloat16", (4, 64), "rows of a multiple of 16 bytes"),
        ((4, 16), "float32", (4, 64), "contiguous bfloat16 matrices; got float32"),
        ((4, 16, 1), "bfloat16", (4, 64), "contiguous bfloat16 matrices"),
        ((4, 16), "bfloat16", (257, 64), "a box has 1 to 256 rows"),
        ((4, 16), "bfloat16", (4, 72), "a box has 1 to 256 rows"),
    ],
)
def test_matrices_that_cannot_be_cut_are_refused(shape, dtype, box, complaint):
    with pytest.raises(TypeError, match=complaint):
        tile_map(device.zeros(shape, device.BFLOAT16 if dtype == "bfloat16" else dtype), *box)


def test_a_launch_wants_a_map_where_the_kernel_does():
    x = device.zeros((64, 64), device.BFLOAT16)
    with pytest.raises(TypeError, match="a must be a map made with tile_map"):
        KERNELS.launch("multiply<1, false, false, NONE>", 1, 160, x, x, device.empty((64, 64), np.float32), 64, 64, 64)
