"""Every rung of the grouped GEMM equals one NumPy product per expert."""

from itertools import pairwise

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.grouped_gemm import RUNGS, grouped_dw, grouped_dx, grouped_linear, grouped_swiglu

sizes = st.integers(1, 20) | st.sampled_from([31, 32, 33, 36, 64])
TENSOR_CORE = "4_tensor_core"  # takes bfloat16, and sizes that are multiples of 8


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
    unit = 8 if rung == TENSOR_CORE else 1
    inner, outer, gathered = unit * data.draw(sizes), unit * data.draw(sizes), data.draw(st.booleans())
    dtype = device.BFLOAT16 if rung == TENSOR_CORE else data.draw(dtypes)
    order, rng = data.draw(orders), data.draw(rngs)
    check(where, rung, offsets, slots, inner, outer, gathered, dtype, order, rng)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("where", EVERYWHERE[1:])
@given(dtypes, st.booleans(), orders, rngs)
@settings(max_examples=4)
def test_several_tiles_in_every_direction(where, rung, dtype, gathered, order, rng):
    offsets = np.array([0, 140, 140, 281, 290], np.int32)
    inner, outer = (152, 168) if rung == TENSOR_CORE else (150, 161)
    dtype = device.BFLOAT16 if rung == TENSOR_CORE else dtype
    check(where, rung, offsets, 295, inner, outer, gathered, dtype, order, rng)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(groups(), sizes, sizes, st.booleans(), orders, rngs)
@settings(max_examples=10)
def test_fused_swiglu_equals_the_products_and_the_swiglu(where, drawn, inner, outer, gathered, order, rng):
    (offsets, slots), tokens = drawn, 7
    if slots == 0:
        return
    inner, outer, E = 8 * inner, 8 * outer, len(offsets) - 1
    rows = rng.integers(0, tokens, slots).astype(np.int32) if gathered else np.arange(slots)
    arrays = [rng.standard_normal(s) / inner**0.25 for s in ((max(tokens, slots), inner), *[(E, outer, inner)] * 2)]
    with running(where, order):
        (x, w1, w3), (x64, *weights) = on_device(*arrays, dtype=device.BFLOAT16)
        (there,), index = on_device(offsets)[0], device.array(rows) if gathered else None
        if not gathered:
            x, x64 = x[:slots], x64[:slots]
        products = [np.zeros((slots, outer)) for _ in range(2)]
        for product, w in zip(products, weights):
            for e, part in enumerate(by_expert(offsets)):
                product[part] = x64[rows[part]] @ w[e].T
        expected = (*products, reference.swiglu(*products)[0])
        for found, wanted in zip(grouped_swiglu(x, w1, w3, there, index), expected, strict=True):
            assert_equivalent(found, wanted)
