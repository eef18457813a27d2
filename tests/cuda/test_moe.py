"""The whole mixture on the device equals the reference's, forward and every gradient."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given, settings
from strategies import moe_inputs, rngs

from tinymoe import reference
from tinymoe.cuda import device, moe, moe_backward, moe_decode


@pytest.mark.parametrize("where", EVERYWHERE)
@given(moe_inputs(), dtypes, orders, rngs)
@settings(max_examples=15)
def test_forward_and_every_gradient_equal_the_reference(where, inputs, dtype, order, rng):
    arrays, top_k, experts = inputs
    with running(where, order):
        there, doubles = on_device(*arrays, dtype=dtype)
        (dy,), (dy64,) = on_device(rng.standard_normal(arrays[0].shape), dtype=dtype)
        (dlogits,), (dlogits64,) = on_device(rng.standard_normal((len(dy), len(arrays[1]))), dtype=np.float32)
        y, saved = moe(*there, top_k)
        grads = moe_backward(dy, dlogits, saved)
        expected, expected_saved = reference.moe(*doubles, top_k)
        np.testing.assert_array_equal(device.host(saved.routing.experts), expected_saved.routing.experts)
        np.testing.assert_array_equal(expected_saved.routing.experts, experts)
        # What the experts and their gradients add up is of the size of what goes in, and may cancel.
        assert_equivalent(y, expected, floor=2 * np.linalg.norm(doubles[0]), components=3)
        terms = 2 * (np.linalg.norm(dy64) + np.linalg.norm(dlogits64))
        for found, wanted in zip(grads, reference.moe_backward(dy64, dlogits64, expected_saved), strict=True):
            assert_equivalent(found, wanted, floor=terms, components=3)
        assert_same_bits(moe_backward(dy, dlogits, saved), grads)
        assert device.host(saved.routing.not_finite)[0] == 0
        for few in {1, len(dy)}:
            decoded_y, decoded = moe_decode(device.array(device.host(there[0])[:few]), *there[1:], top_k)
            assert_equivalent(decoded_y, expected[:few], floor=2 * np.linalg.norm(doubles[0]), components=3)
            np.testing.assert_array_equal(device.host(decoded.routing.experts), experts[:few])


@pytest.mark.parametrize("where", EVERYWHERE)
def test_nan_sets_the_flag_and_harms_nobody_else(where):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((5, 4), (3, 4), (3, 6, 4), (3, 4, 6), (3, 6, 4))]
    with running(where, ("forward", 0, 0)):
        good, _ = moe(*(device.array(a) for a in arrays), 2)
        arrays[0][3] = np.nan
        bad, saved = moe(*(device.array(a) for a in arrays), 2)
        assert device.host(saved.routing.not_finite)[0] != 0
        others = [0, 1, 2, 4]
        assert_same_bits([device.host(bad)[others]], [device.host(good)[others]])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(orders, rngs)
@settings(max_examples=3)
def test_on_hopper_rows_are_gathered_once_and_the_layer_is_the_same(where, order, rng):
    N, D, F, E, k = 150, 72, 136, 3, 2
    arrays = [rng.standard_normal(s) / 4 for s in ((N, D), (E, D), (E, F, D), (E, D, F), (E, F, D))]
    with running(where, order), pytest.MonkeyPatch.context() as patch:
        if device.architecture() not in (None, "sm_90a"):
            pytest.skip("not a Hopper card")
        patch.setattr(device, "architecture", lambda: "sm_90a")
        there, doubles = on_device(*arrays, dtype=device.BFLOAT16)
        (dy,), (dy64,) = on_device(rng.standard_normal((N, D)), dtype=device.BFLOAT16)
        y, saved = moe(*there, k)
        assert saved.experts.rows is None
        grads = moe_backward(dy, None, saved)
        expected, expected_saved = reference.moe(*doubles, k)
        np.testing.assert_array_equal(device.host(saved.routing.experts), expected_saved.routing.experts)
        assert_equivalent(y, expected, floor=2 * np.linalg.norm(doubles[0]), components=3)
        for found, wanted in zip(grads, reference.moe_backward(dy64, None, expected_saved), strict=True):
            assert_equivalent(found, wanted, floor=2 * np.linalg.norm(dy64), components=3)
        assert_same_bits(moe_backward(dy, None, saved), grads)
