"""The linear map on the device equals the reference's."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import InputError, reference
from tinymoe.cuda import device
from tinymoe.cuda.linear import linear, linear_backward, linear_few, matmul

sizes = st.integers(1, 70)
inner_sizes = sizes | st.integers(1, 70).map(lambda n: 8 * n) | st.integers(1, 9).map(lambda n: 64 * n)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(sizes, sizes, sizes, dtypes, rngs)
def test_equals_the_reference(where, N, D_in, D_out, dtype, rng):
    with device.using(where):
        (x, w, dy), (x64, w64, dy64) = on_device(
            *map(rng.standard_normal, [(N, D_in), (D_out, D_in), (N, D_out)]), dtype=dtype
        )
        y, saved = linear(x, w)
        grads = linear_backward(dy, saved)
        expected, expected_saved = reference.linear(x64, w64)
        for found, wanted in zip((y, *grads), (expected, *reference.linear_backward(dy64, expected_saved))):
            assert found.dtype == dtype
            assert_equivalent(found, wanted, floor=np.sqrt(wanted.size))  # terms of order one may cancel
        assert_same_bits((linear(x, w)[0], *linear_backward(dy, saved)), (y, *grads))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 40), inner_sizes, sizes, dtypes, orders, rngs)
@settings(max_examples=15)
def test_few_rows_equal_the_reference_and_each_has_the_same_bits_alone(where, N, D_in, D_out, dtype, order, rng):
    with running(where, order):
        (x, w), (x64, w64) = on_device(*map(rng.standard_normal, [(N, D_in), (D_out, D_in)]), dtype=dtype)
        y, expected = linear_few(x, w), reference.linear(x64, w64)[0]
        assert y.dtype == dtype
        assert_equivalent(y, expected, floor=np.sqrt(expected.size))
        alone = device.array(device.host(x)[-1:].copy())
        assert_same_bits([linear_few(alone, w)], [device.host(y)[-1:]])


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("multiply", [lambda x, w: linear(x, w)[0], linear_few])
def test_sums_are_of_float32_and_rounded_once(where, multiply):
    with device.using(where):
        ones = device.array(np.ones((1, 1001)).astype(device.BFLOAT16))  # summed in bfloat16, ones stop at 256
        assert float(device.host(multiply(ones, ones))[0, 0]) == 1000  # of the multiples of 4, the nearest even


@pytest.mark.parametrize("where", EVERYWHERE)
@given(sizes, sizes, dtypes)
def test_results_can_be_given_to_a_kernel(where, N, D, dtype):
    with device.using(where):
        (x, w), _ = on_device(np.ones((N, D)), np.ones((D, D)), dtype=dtype)
        y, saved = linear(x, w)
        for result in (y, *linear_backward(y, saved)):
            assert device.array(result) is result


def test_other_dtypes_are_refused():
    with device.using("emulated"):
        a, b = (device.array(np.ones((2, 2)), dtype) for dtype in (np.float32, device.BFLOAT16))
        with pytest.raises(TypeError, match="float32 and bfloat16"):
            matmul(a, b)
        with pytest.raises(InputError, match="float64"):
            matmul(np.ones((2, 2)), a)
