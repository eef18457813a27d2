"""The experts on the device equal the reference's."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import rngs, routings

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.experts import (
    expert_ffn,
    expert_ffn_backward,
    ffn,
    ffn_backward,
    gathered_ffn,
    swiglu,
    swiglu_backward,
)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 40), st.integers(1, 30), dtypes, orders, rngs)
def test_swiglu_equals_the_reference(where, S, F, dtype, order, rng):
    with running(where, order):
        (gate, up, dhidden), (gate64, up64, dhidden64) = on_device(*rng.normal(0, 4, (3, S, F)), dtype=dtype)
        hidden, saved = swiglu(gate, up)
        expected, expected_saved = reference.swiglu(gate64, up64)
        assert_equivalent(hidden, expected)
        for found, wanted in zip(
            swiglu_backward(dhidden, saved), reference.swiglu_backward(dhidden64, expected_saved), strict=True
        ):
            assert_equivalent(found, wanted)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("dtype", [np.dtype("float32"), device.BFLOAT16])
def test_swiglu_of_huge_gates_and_of_more_than_a_grid_holds(where, dtype, monkeypatch):
    monkeypatch.setattr("tinymoe.cuda.experts.MOST_BLOCKS", 2)
    z = np.concatenate([np.linspace(-200, 200, 1300), [-1e4, 1e4]])
    with running(where, ("forward", 0, 0)):
        (gate, up), (gate64, up64) = on_device(z, z, dtype=dtype)
        hidden, saved = swiglu(gate, up)
        expected, expected_saved = reference.swiglu(gate64, up64)
        assert_equivalent(hidden, expected)
        wanted = reference.swiglu_backward(up64, expected_saved)
        for found, exact in zip(swiglu_backward(up, saved), wanted, strict=True):
            assert_equivalent(found, exact)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(routings(dropped=True), st.integers(1, 12), st.integers(1, 12), dtypes, orders, rngs)
def test_experts_and_every_gradient_equal_the_reference(where, routed, D, F, dtype, order, rng):
    plan, E = reference.dispatch(routed.experts, routed.num_experts), routed.num_experts
    S, N = plan.offsets[-1], len(routed.experts)
    if S == 0:
        return
    shapes = [(N, D), (E, F, D), (E, D, F), (E, F, D), (S, D)]
    scales = [1, D**-0.5, F**-0.5, D**-0.5, 1]
    with running(where, order):
        arrays = [scale * rng.standard_normal(shape) for scale, shape in zip(scales, shapes)]
        (x, *weights, dout), (x64, *weights64, dout64) = on_device(*arrays, dtype=dtype)
        offsets = device.array(np.array(plan.offsets, np.int32))
        rows = device.array(plan.tokens[:S].astype(np.int32))
        out, saved = gathered_ffn(x, rows, *weights, offsets)
        grads = expert_ffn_backward(dout, saved)
        expected, expected_saved = reference.expert_ffn(x64[plan.tokens], *weights64, plan.offsets)
        assert_equivalent(out, expected, floor=2 * np.linalg.norm(x64))
        for found, wanted in zip(grads, reference.expert_ffn_backward(dout64, expected_saved), strict=True):
            assert_equivalent(found, wanted, floor=2 * np.linalg.norm(dout64))  # its terms may cancel
        for e in range(E):
            if plan.offsets[e] == plan.offsets[e + 1]:
                assert not any(device.host(grad)[e].any() for grad in grads[1:])
        assert_same_bits(expert_ffn_backward(dout, saved), grads)
        copied, _ = expert_ffn(device.array(device.host(x)[plan.tokens[:S]]), *weights, offsets)
        assert_same_bits([copied], [out])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), dtypes, orders, rngs)
def test_dense_feed_forward_equals_the_reference(where, S, D, F, dtype, order, rng):
    with running(where, order):
        shapes = [(S, D), (F, D), (D, F), (F, D), (S, D)]
        arrays = [rng.standard_normal(shape) / shape[-1] ** 0.5 for shape in shapes]
        (x, *weights, dout), (x64, *weights64, dout64) = on_device(*arrays, dtype=dtype)
        out, saved = ffn(x, *weights)
        expected, expected_saved = reference.ffn(x64, *weights64)
        assert_equivalent(out, expected, floor=2 * np.linalg.norm(x64))
        for found, wanted in zip(
            ffn_backward(dout, saved), reference.ffn_backward(dout64, expected_saved), strict=True
        ):
            assert_equivalent(found, wanted, floor=2 * np.linalg.norm(dout64))  # its terms may cancel


@pytest.mark.parametrize("where", EVERYWHERE)
@given(routings(), st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 8]), dtypes, orders, rngs)
@settings(max_examples=8)
def test_what_was_not_kept_is_computed_again_to_the_same_gradients(where, routed, D, F, packed, dtype, order, rng):
    plan, E = reference.dispatch(routed.experts, routed.num_experts), routed.num_experts
    D, F, S, N = packed * D, packed * F, plan.offsets[-1], len(routed.experts)  # packed: on tensor cores in bfloat16
    with running(where, order):
        arrays = [rng.standard_normal(s) for s in ((N, D), (E, F, D), (E, D, F), (E, F, D), (S, D))]
        (x, *weights, dout), _ = on_device(*arrays, dtype=dtype)
        offsets, rows = (device.array(np.array(a, np.int32)) for a in (plan.offsets, plan.tokens))
        _, saved = gathered_ffn(x, rows, *weights, offsets)
        kept = expert_ffn_backward(dout, saved)
        assert_same_bits(expert_ffn_backward(dout, saved._replace(hidden=None, swiglu=None)), kept)
        again = expert_ffn_backward(dout, saved._replace(hidden=None))
        # Tensor cores make hidden of sums that are not rounded yet; gate and up are kept rounded.
        assert_equivalent(again[2], device.host(kept[2]).astype(np.float64))
        assert_same_bits([again[0], again[1], again[3]], [kept[0], kept[1], kept[3]])
