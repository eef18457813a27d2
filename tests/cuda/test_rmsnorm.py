"""RMSNorm on the device equals the reference's."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda.rmsnorm import rmsnorm, rmsnorm_backward


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 300), st.integers(1, 140), st.sampled_from([1e-5, 0.1]), dtypes, orders, rngs)
def test_equals_the_reference(where, N, D, eps, dtype, order, rng):
    with running(where, order):
        (x, weight, dy), (x64, weight64, dy64) = on_device(
            rng.standard_normal((N, D)), rng.standard_normal(D), rng.standard_normal((N, D)), dtype=dtype
        )
        y, saved = rmsnorm(x, weight, eps)
        grads = rmsnorm_backward(dy, saved)
        expected, expected_saved = reference.rmsnorm(x64, weight64, eps)
        dx, dweight = reference.rmsnorm_backward(dy64, expected_saved)
        assert_equivalent(y, expected)
        # With one column x̂ is ±1 but for eps: what is left of dx is a small difference of large numbers.
        assert_equivalent(grads[0], dx, floor=np.linalg.norm(dy64 * weight64 * expected_saved.inverse_rms))
        assert_equivalent(grads[1], dweight, floor=np.linalg.norm(dy64))
        assert_same_bits(rmsnorm_backward(dy, saved), grads)
