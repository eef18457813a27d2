"""Rotary positions on the device equal the reference's."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.rope import rope, rope_backward, rope_table

evens = st.integers(1, 70).map(lambda half: 2 * half)
thetas = st.sampled_from([100.0, 1e4, 1e6])
positions = st.lists(st.integers(0, 32768), min_size=1, max_size=6).map(np.array)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 3), positions, st.integers(1, 9), evens, thetas, dtypes, orders, rngs)
def test_equals_the_reference(where, B, positions, H, K, theta, dtype, order, rng):
    shape = (B, len(positions), H, K)  # up to 630 pairs of a token, so that a thread has several
    with running(where, order):
        (x, dy), (x64, dy64) = on_device(*rng.standard_normal((2, *shape)), dtype=dtype)
        y, saved = rope(x, rope_table(positions, K, theta, dtype))
        dx = rope_backward(dy, saved)
        expected, expected_saved = reference.rope(x64, reference.rope_table(positions, K, theta, np.float64))
        assert y.dtype == dx.dtype == dtype
        assert_equivalent(y, expected)
        assert_equivalent(dx, reference.rope_backward(dy64, expected_saved))
        assert_same_bits([rope_backward(dy, saved)], [dx])


@given(positions, evens, thetas, dtypes)
def test_table_is_the_references_rounded_to_float32(positions, K, theta, dtype):
    with device.using("emulated"):
        table = rope_table(positions, K, theta, dtype)
    exact = reference.rope_table(positions, K, theta, np.float64)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, np.stack([exact.real, exact.imag], 2), rtol=0, atol=2.0**-24)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 3), evens, dtypes, orders, rngs)
def test_position_zero_is_not_turned(where, H, K, dtype, order, rng):
    with running(where, order):
        (x,), _ = on_device(rng.standard_normal((2, 1, H, K)), dtype=dtype)
        y, _ = rope(x, rope_table(np.array([0]), K, 1e4, dtype))
        assert_same_bits([y], [x])
