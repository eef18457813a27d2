"""The experts: SwiGLU, alone and over ragged groups of rows."""

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs, routings

from tinymoe.reference import dispatch, expert_ffn, expert_ffn_backward, ffn, ffn_backward, swiglu, swiglu_backward

sizes = st.integers(1, 9)
SILU_OF_1 = 0.7310585786300049


def draw_experts(rng, E, D, F):
    return rng.standard_normal((E, F, D)), rng.standard_normal((E, D, F)), rng.standard_normal((E, F, D))


@given(sizes, sizes, rngs)
def test_swiglu_backward_equals_finite_differences(S, F, rng):
    check_component(swiglu, swiglu_backward, list(3 * rng.standard_normal((2, S, F))), rng)


@given(sizes, sizes, sizes, rngs)
def test_ffn_backward_equals_finite_differences(S, D, F, rng):
    w1, w2, w3 = (w[0] for w in draw_experts(rng, 1, D, F))
    check_component(ffn, ffn_backward, [rng.standard_normal((S, D)), w1, w2, w3], rng)


@given(routings(), sizes, sizes, rngs)
def test_expert_ffn_backward_equals_finite_differences(routed, D, F, rng):
    plan = dispatch(*routed)
    arrays = [rng.standard_normal((len(plan.tokens), D)), *draw_experts(rng, routed.num_experts, D, F)]
    check_component(lambda *a: expert_ffn(*a, plan.offsets), expert_ffn_backward, arrays, rng)


def test_swiglu_by_hand():
    hidden, _ = swiglu(np.array([[0.0, 1.0, -1.0, 1.0]]), np.array([[5.0, 2.0, 2.0, -3.0]]))
    assert_close(hidden, [[0, 2 * SILU_OF_1, -2 * (1 - SILU_OF_1), -3 * SILU_OF_1]], 1e-15)


def test_w1_is_the_gate_and_w3_goes_up():
    w1, w2, w3 = np.array([[1.0]]), np.array([[3.0]]), np.array([[2.0]])
    assert_close(ffn(np.ones((1, 1)), w1, w2, w3)[0], [[6 * SILU_OF_1]], 1e-15)  # swapped: 3 silu(2) = 5.28


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_gates_do_not_overflow(dtype):
    gate = np.array([[-1e30, -1e4, 1e4, 1e30]], dtype)
    hidden, saved = swiglu(gate, np.ones_like(gate))
    assert_close(hidden / 1e30, np.maximum(gate, 0) / 1e30, 1e-6)
    dgate, dup = swiglu_backward(np.ones_like(gate), saved)
    np.testing.assert_array_equal(dgate, [[0, 0, 1, 1]])
    np.testing.assert_array_equal(dup, hidden)


@given(routings(), sizes, sizes, rngs)
def test_each_expert_sees_its_own_rows_only(routed, D, F, rng):
    plan = dispatch(*routed)
    x, (w1, w2, w3) = rng.standard_normal((len(plan.tokens), D)), draw_experts(rng, routed.num_experts, D, F)
    out, saved = expert_ffn(x, w1, w2, w3, plan.offsets)
    dout = rng.standard_normal(out.shape)
    dx, *of_weights = expert_ffn_backward(dout, saved)
    for e, (start, end) in enumerate(zip(plan.offsets[:-1], plan.offsets[1:])):
        rows = slice(start, end)
        if start == end:
            assert not any(dw[e].any() for dw in of_weights), "an expert without tokens has exactly zero gradient"
            continue
        alone, alone_saved = ffn(x[rows], w1[e], w2[e], w3[e])
        np.testing.assert_array_equal(out[rows], alone)
        alone_dx, *alone_of_weights = ffn_backward(dout[rows], alone_saved)
        np.testing.assert_array_equal(dx[rows], alone_dx)
        for dw, alone_dw in zip(of_weights, alone_of_weights):
            np.testing.assert_array_equal(dw[e], alone_dw)


def test_no_rows_at_all_give_zero_gradients():
    w1, w2, w3 = draw_experts(np.random.default_rng(0), 3, 2, 4)
    out, saved = expert_ffn(np.zeros((0, 2)), w1, w2, w3, [0, 0, 0, 0])
    dx, *of_weights = expert_ffn_backward(out, saved)
    assert dx.shape == (0, 2)
    for dw, w in zip(of_weights, (w1, w2, w3)):
        np.testing.assert_array_equal(dw, np.zeros_like(w))
