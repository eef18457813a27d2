"""Every rung of the grouped GEMM equals one NumPy product per expert."""

from itertools import pairwise

import numpy as np
import pytest
from emulation import (
    EVERYWHERE,
    Order,
    assert_equivalent,
    assert_same_bits,
    doubles,
    dtypes,
    on_device,
    orders,
    running,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.grouped_gemm import RUNGS, grouped_dw, grouped_dx, grouped_linear, grouped_swiglu

NARROW = [name for name in RUNGS if RUNGS[name].only_bfloat16]  # which takes sizes that are multiples of 8, too
sizes = st.integers(1, 20) | st.sampled_from([31, 32, 33, 36, 64])
eights = st.integers(1, 20).map(lambda n: 8 * n)


@st.composite
def groups(draw, most=24):
    """Draw offsets: experts without a row, one with many, and a tail that nobody owns."""
    counts = draw(st.lists(st.integers(0, 3) | st.integers(0, most), min_size=1, max_size=5))
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), sum(counts) + draw(st.sampled_from([0, 0, 3]))


def by_expert(offsets):
    return [slice(a, b) for a, b in pairwise(offsets)]


def check(where, rung, offsets, slots, inner, outer, gathered, dtype, order, rng):
    experts, tokens = len(offsets) - 1, 7
    rows = rng.integers(0, tokens, slots).astype(np.int32) if gathered else np.arange(slots)
    with running(where, order):
        (x, dy, w), (x64, dy64, w64) = on_device(
            rng.standard_normal((tokens if gathered else slots, inner)),
            rng.standard_normal((slots, outer)),
            rng.standard_normal((experts, outer, inner)),
            dtype=dtype,
        )
        (there,), index = on_device(offsets)[0], device.array(rows) if gathered else None

        def run():
            return (
                grouped_linear(x, w, there, index, using=rung),
                grouped_dx(dy, w, there, using=rung),
                grouped_dw(dy, x, there, index, using=rung),
            )

        y, dx, dw = run()
        expected_y, expected_dx, expected_dw = np.zeros((slots, outer)), np.zeros((slots, inner)), np.zeros(w.shape)
        for e, part in enumerate(by_expert(offsets)):
            expected_y[part], expected_dx[part] = x64[rows[part]] @ w64[e].T, dy64[part] @ w64[e]
            expected_dw[e] = dy64[part].T @ x64[rows[part]]
        assert_equivalent(y, expected_y)
        assert_equivalent(dx, expected_dx)
        assert_equivalent(dw, expected_dw)
        for e, part in enumerate(by_expert(offsets)):
            assert part.start < part.stop or not device.host(dw)[e].any()
        assert not device.host(y)[offsets[-1] :].any()
        assert_same_bits(run(), (y, dx, dw))


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("where", EVERYWHERE)
@given(data=st.data())
@settings(max_examples=12)
def test_equals_a_product_per_expert(where, rung, data):
    offsets, slots = data.draw(groups())
    if slots == 0:
        return
    of = eights if rung in NARROW else sizes
    inner, outer, gathered = data.draw(of), data.draw(of), data.draw(st.booleans())
    dtype = device.BFLOAT16 if rung in NARROW else data.draw(dtypes)
    order, rng = data.draw(orders), data.draw(rngs)
    check(where, rung, offsets, slots, inner, outer, gathered, dtype, order, rng)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("where", EVERYWHERE[1:])
@given(dtypes, st.booleans(), orders, rngs)
@settings(max_examples=2)
def test_several_tiles_in_every_direction(where, rung, dtype, gathered, order, rng):
    offsets = np.array([0, 140, 140, 281, 282], np.int32)
    inner, outer = (152, 168) if rung in NARROW else (150, 161)
    dtype = device.BFLOAT16 if rung in NARROW else dtype
    check(where, rung, offsets, 290, inner, outer, gathered, dtype, order, rng)


@pytest.mark.parametrize("rung", [name for name in RUNGS if name.startswith("5")])
@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(
    "order", [("forward", 0, 0), ("reverse", 0, 0), ("shuffled", 1, 0)], ids=lambda order: order[0]
)
def test_a_pipeline_goes_from_tile_to_tile(where, order, rung):
    """Stages change hands many times: long products, then experts with one row each, and with none in between."""
    counts = [1] * 13 + [63, 0, 0, 290, 0, 1, 0, 330]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rng = np.random.default_rng(0)
    check(where, rung, offsets, offsets[-1], 328, 136, True, device.BFLOAT16, order, rng)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_infinity_of_an_expert_reaches_no_other_and_meets_no_zero(where, rung, odd):
    inner, outer = (256, 128) if rung.startswith("5") else (40, 24) if rung in NARROW else (37, 21)
    dtype = device.BFLOAT16 if rung in NARROW else np.float32
    offsets, infinite = np.array([0, 4, 74, 77, 79], np.int32), np.array([odd, not odd] * 2)
    slots, in_slots = 82, np.concatenate([np.repeat(infinite, np.diff(offsets)), [True] * 3])  # nobody owns the last
    x, dy, w = np.ones((slots, inner)), np.ones((slots, outer)), np.ones((4, outer, inner))
    x[in_slots], dy[in_slots], w[infinite] = np.inf, np.inf, np.inf
    with running(where, ("forward", 0, 0)):
        (x, dy, w), _ = on_device(x, dy, w, dtype=dtype)
        there, rows = on_device(offsets, np.arange(slots, dtype=np.int32))[0]
        y = doubles(grouped_linear(x, w, there, rows, using=rung))
        dx = doubles(grouped_dx(dy, w, there, using=rung))
        dw = doubles(grouped_dw(dy, x, there, rows, using=rung))
    assert not y[offsets[-1] :].any()
    assert not dx[offsets[-1] :].any()
    in_slots = in_slots[: offsets[-1]]
    for product, is_infinite in ((y[: len(in_slots)], in_slots), (dx[: len(in_slots)], in_slots), (dw, infinite)):
        assert np.isposinf(product[is_infinite]).all()
        assert np.isfinite(product[~is_infinite]).all()


def check_fused(where, rung, offsets, slots, inner, outer, gathered, order, rng):
    tokens, E = 7, len(offsets) - 1
    rows = rng.integers(0, tokens, slots).astype(np.int32) if gathered else np.arange(slots)
    x_shape, w_shape = (tokens if gathered else slots, inner), (E, outer, inner)
    arrays = [rng.standard_normal(shape) / inner**0.25 for shape in (x_shape, w_shape, w_shape)]
    with running(where, order):
        (x, w1, w3), (x64, *weights) = on_device(*arrays, dtype=device.BFLOAT16)
        (there,), index = on_device(offsets)[0], device.array(rows) if gathered else None
        products = [np.zeros((slots, outer)) for _ in range(2)]
        for product, w in zip(products, weights):
            for e, part in enumerate(by_expert(offsets)):
                product[part] = x64[rows[part]] @ w[e].T
        expected = (*products, reference.swiglu(*products)[0])
        for found, wanted in zip(grouped_swiglu(x, w1, w3, there, index, rung), expected, strict=True):
            assert_equivalent(found, wanted)


@pytest.mark.parametrize("rung", NARROW)
@pytest.mark.parametrize("where", EVERYWHERE)
@given(groups(), eights, eights, st.booleans(), orders, rngs)
@settings(max_examples=10)
def test_fused_swiglu_equals_the_products_and_the_swiglu(where, rung, drawn, inner, outer, gathered, order, rng):
    offsets, slots = drawn
    if slots:
        check_fused(where, rung, offsets, slots, inner, outer, gathered, order, rng)


@pytest.mark.parametrize("rung", NARROW)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_fused_swiglu_of_several_tiles(where, rung):
    offsets, order = np.array([0, 130, 130, 195, 196], np.int32), Order("shuffled", 0, 0)
    check_fused(where, rung, offsets, 200, 40, 136, True, order, np.random.default_rng(0))
