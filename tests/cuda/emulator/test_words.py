"""CUDA's words mean on this CPU what they mean on a GPU, which NumPy says."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulation import EVERYWHERE, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.cuda import device

WORDS = device.Kernels(
    str(Path(__file__).parent / "kernels" / "words.cu"),
    *("widen", "narrow", "shuffle<int>", "shuffle<float>", "shuffle<int64_t>", "vote", "atomics", "arithmetic"),
    *("vectors", "positions"),
)
everywhere = pytest.mark.parametrize("where", EVERYWHERE)


def run(kernel, grid, block, *arguments):
    """Launch a kernel and return its arrays as the host's; a (shape, dtype) is an array to be written."""
    there = [
        device.array(a) if isinstance(a, np.ndarray) else device.empty(*a) if isinstance(a, tuple) else a
        for a in arguments
    ]
    WORDS.launch(kernel, grid, block, *there)
    return [device.host(a) for a, given in zip(there, arguments) if isinstance(given, tuple | np.ndarray)]


def assert_same_floats(found, expected):
    """Compare bits, except a NaN's."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@everywhere
def test_every_half_and_bfloat16_widens_as_in_numpy(where):
    bits = np.arange(2**16, dtype=np.int32)
    with device.using(where):
        _, half, bfloat16 = run("widen", 64, 1024, bits, (2**16, np.float32), (2**16, np.float32), 2**16)
    with np.errstate(invalid="ignore"):  # some processors complain of signalling NaNs
        assert_same_floats(half, bits.astype(np.uint16).view(np.float16).astype(np.float32))
    assert_same_floats(bfloat16, bits.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32))


def near_halves(dtype):
    """Return every number of a 16-bit type, the ties between neighbours, and what lies right beside those."""
    with np.errstate(invalid="ignore"):  # some processors complain of signalling NaNs
        numbers = np.arange(0x8000, dtype=np.uint16).view(dtype).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    doubles = [*numbers.astype(np.float64), 2 * float(numbers[-1]) - float(numbers[-2])]  # and the first too large
    ties = ((np.array(doubles[1:]) + doubles[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(to)) for to in (0, np.inf)]
    found = np.concatenate([numbers, ties, *beside])
    return np.concatenate([found, -found])


@everywhere
def test_floats_are_rounded_to_nearest_even_as_in_numpy(where):
    anything = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 65519.996, 65520, 1e-45, -1e-45, 3.4e38], np.float32)
    x = np.concatenate([anything, special, near_halves(np.float16), near_halves(ml_dtypes.bfloat16)])
    with device.using(where):
        _, half, bfloat16 = run("narrow", -(-len(x) // 1024), 1024, x, (len(x), np.int32), (len(x), np.int32), len(x))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for found, dtype in (half, np.float16), (bfloat16, ml_dtypes.bfloat16):
            assert_same_floats(
                found.astype(np.uint16).view(dtype).astype(np.float32), x.astype(dtype).astype(np.float32)
            )


@everywhere
@given(
    st.sampled_from([("int", np.int32), ("float", np.float32), ("int64_t", np.int64)]),
    st.sampled_from([1, 2, 4, 8, 16, 32]),
    st.integers(0, 31),
    orders,
    rngs,
)
def test_shuffles_move_what_the_lane_at_the_source_has(where, kind, width, by, order, rng):
    (T, dtype), lane = kind, np.arange(32)
    x = rng.integers(-(2**30), 2**30, 64).astype(dtype) * (2**32 if T == "int64_t" else 1)
    source = rng.integers(0, 64, 64).astype(np.int32)
    with running(where, order):
        _, _, *found = run(f"shuffle<{T}>", 1, 64, x, source, *[(64, dtype)] * 4, by, width)
    first = lane // width * width  # of the lane's group
    for warp in (slice(0, 32), slice(32, 64)):
        sources = [
            first + source[warp] % width,
            np.where(lane ^ by < first + width, lane ^ by, lane),  # a group may read those before it, not those behind
            np.where(lane - by >= first, lane - by, lane),
            np.where(lane + by < first + width, lane + by, lane),
        ]
        for values, expected in zip(found, sources, strict=True):
            assert np.array_equal(values[warp], x[warp][expected])


@everywhere
@given(st.integers(1, 2**32 - 2), orders, rngs)
def test_votes_count_the_lanes_of_their_mask(where, mask, order, rng):
    predicate = (rng.random(64) < rng.choice([0, 0.5, 1])).astype(np.int32) * 2
    with running(where, order):
        _, ballot, any_, all_ = run("vote", 1, 64, predicate, (64, np.uint32), (64, np.int32), (64, np.int32), mask)
    for t in range(64):
        group = mask if mask >> t % 32 & 1 else ~mask & 0xFFFFFFFF
        set_ = sum(1 << i for i in range(32) if group >> i & 1 and predicate[t // 32 * 32 + i])
        assert (ballot[t], bool(any_[t]), bool(all_[t])) == (set_, set_ != 0, set_ == group)


@everywhere
@given(st.integers(1, 3), st.integers(1, 70), orders, rngs)
def test_atomics_lose_nothing(where, blocks, threads, order, rng):
    n = blocks * threads
    x, start = rng.integers(-999, 999, n).astype(np.int32), np.array([0, -500, 500, 7, 0], np.int32)
    with running(where, order):
        _, cells, bits, sum_, tickets, exchanged = run(
            *("atomics", blocks, threads, x, start, np.zeros(2, np.uint32), np.zeros(1, np.float32)),
            *((n, np.int32), (n, np.int32)),
        )
    assert sorted(tickets) == list(range(n))
    assert sorted([*exchanged, cells[3]]) == sorted([*x, 7])
    assert list(cells[[0, 1, 2, 4]]) == [n, max(-500, x.max()), min(500, x.min()), np.bitwise_xor.reduce(x)]
    assert bits[0] == np.bitwise_or.reduce(np.uint32(1) << (x & 31).astype(np.uint32))
    assert bits[1] == int(x.sum()) % 2**32
    assert sum_[0] == x.sum()


@everywhere
def test_arithmetic(where):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [[0, -1, 1, -(2**31), 2**31 - 1], rng.integers(-(2**31), 2**31, 500) >> rng.integers(0, 32, 500)]
    )
    x, n = x.astype(np.int32), len(x)
    y, z = rng.standard_normal((2, n)).astype(np.float32)
    y[:4], z[2:6] = [np.nan, np.inf, np.nan, 0], [np.nan, 1, np.nan, -np.inf]
    with device.using(where):
        *_, counts, results = run("arithmetic", 1, 1024, x, y, z, ((n, 3), np.int32), ((n, 4), np.float32), n)
    for value, (popc, ffs, clz) in zip(x.astype(np.uint32).tolist(), counts):
        assert (popc, clz) == (value.bit_count(), 32 - value.bit_length())
        assert ffs == (value & -value).bit_length()
    assert_same_floats(results[:, 0], y)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(results[:, 1], 1 / np.sqrt(np.abs(y)), rtol=1e-6)
    assert_same_floats(results[:, 2], np.fmax(y, z))  # of a NaN and a number, the number
    assert_same_floats(results[:, 3], np.fmin(y, z))


@everywhere
def test_vectors(where):
    x = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    with device.using(where):
        _, reversed_, swapped, words = run(
            "vectors", 1, 32, x, (x.shape, np.float32), ((64, 2), np.float32), (x.shape, np.uint32)
        )
    assert np.array_equal(reversed_, x[:, ::-1])
    assert np.array_equal(swapped, x.reshape(64, 2)[:, ::-1])
    assert np.array_equal(words, x.view(np.uint32))


@everywhere
@given(st.tuples(*[st.integers(1, 4)] * 3), st.tuples(*[st.integers(1, 5)] * 3), orders)
def test_positions_count_x_first(where, grid, block, order):
    size, blocks = int(np.prod(block)), int(np.prod(grid))
    with running(where, order):
        (found,) = run("positions", grid, block, ((blocks, size, 8), np.int32))
    thread = np.stack(np.unravel_index(np.arange(size), block[::-1])[::-1], axis=1)
    number = np.stack(np.unravel_index(np.arange(blocks), grid[::-1])[::-1], axis=1)
    assert (found[..., :3] == thread).all()
    assert (found[..., 3:6] == number[:, None]).all()
    assert (found[..., 6:] == (size, 32)).all()
