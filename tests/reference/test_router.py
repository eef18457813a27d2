"""The router: choice, weights, and a gradient that knows both the renormalisation and the balance losses."""

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import moe_inputs, rngs

from tinymoe.reference import route, route_backward, softmax
from tinymoe.reference.router import top_k_ids


@given(moe_inputs(), rngs)
def test_backward_equals_finite_differences(drawn, rng):
    (x, w_gate, *_), k, _ = drawn

    def forward(x, w_gate):  # weights and logits side by side: both have readers
        routing, saved = route(x, w_gate, k)
        return np.hstack([routing.weights, routing.logits]), saved

    check_component(forward, lambda dy, saved: route_backward(dy[:, :k], dy[:, k:], saved), [x, w_gate], rng)


@given(moe_inputs(), rngs)
def test_backward_without_balance_losses_equals_finite_differences(drawn, rng):
    (x, w_gate, *_), k, _ = drawn

    def forward(x, w_gate):
        routing, saved = route(x, w_gate, k)
        return routing.weights, saved

    check_component(forward, lambda dweights, saved: route_backward(dweights, None, saved), [x, w_gate], rng)


@given(moe_inputs())
def test_weights_are_the_softmax_over_the_largest_logits(drawn):
    (x, w_gate, *_), k, experts = drawn
    routing, _ = route(x, w_gate, k)
    np.testing.assert_array_equal(routing.experts, experts)
    assert_close(routing.logits, x @ w_gate.T, 1e-14)
    assert_close(routing.weights, softmax(np.take_along_axis(routing.logits, experts, axis=1)), 1e-14)
    assert_close(routing.weights.sum(axis=1), np.ones(len(x)), 1e-15)


@given(moe_inputs())
def test_float32_routes_like_float64(drawn):
    (x, w_gate, *_), k, experts = drawn
    routing, _ = route(x.astype(np.float32), w_gate.astype(np.float32), k)
    np.testing.assert_array_equal(routing.experts, experts)
    assert routing.weights.dtype == routing.logits.dtype == np.float32


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_ties_go_to_the_lowest_id(scores, k):
    by_hand = [sorted(range(6), key=lambda e, row=row: (-row[e], e))[:k] for row in scores]
    assert top_k_ids(np.array(scores, np.float64), k).tolist() == by_hand


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_equal_logits_choose_the_first_experts_with_equal_weights(k):
    routing, _ = route(np.ones((3, 5)), np.ones((4, 5)), k)
    assert routing.experts.tolist() == [list(range(k))] * 3
    np.testing.assert_array_equal(routing.weights, np.full((3, k), 1 / k))


@given(moe_inputs(), rngs)
def test_experts_that_no_token_chose_get_no_gradient_through_the_weights(drawn, rng):
    (x, w_gate, *_), k, experts = drawn
    _, saved = route(x, w_gate, k)
    _, dw_gate = route_backward(rng.standard_normal(experts.shape), None, saved)
    assert not np.delete(dw_gate, experts.ravel(), axis=0).any()
    assert dw_gate[experts[0, 0]].any() == (k > 1)


@given(moe_inputs(), rngs)
def test_top_1_sends_exactly_zero_gradient_through_its_weight(drawn, rng):
    (x, w_gate, *_), _, _ = drawn
    routing, saved = route(x, w_gate, 1)
    assert (routing.weights == 1).all()
    dx, dw_gate = route_backward(rng.standard_normal((len(x), 1)), None, saved)
    assert not dx.any()
    assert not dw_gate.any()


@given(moe_inputs(), rngs)
def test_what_raises_all_weights_alike_has_no_gradient_since_they_sum_to_one(drawn, rng):
    (x, w_gate, *_), k, _ = drawn
    _, saved = route(x, w_gate, k)
    dx, _ = route_backward(np.repeat(rng.standard_normal((len(x), 1)), k, axis=1), None, saved)
    assert_close(dx, np.zeros_like(x), 1e-13, floor=1.0)


@given(moe_inputs(), rngs)
def test_balance_losses_reach_every_expert(drawn, rng):
    (x, w_gate, *_), k, _ = drawn
    dlogits = rng.standard_normal((len(x), len(w_gate)))
    assume(np.linalg.norm(x) > 0)
    routing, saved = route(x, w_gate, k)
    dx, dw_gate = route_backward(np.zeros_like(routing.weights), dlogits, saved)
    assert_close(dx, dlogits @ w_gate, 1e-14)
    assert_close(dw_gate, dlogits.T @ x, 1e-14)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "w_gate"])
def test_logits_that_are_not_finite_raise(where, bad, k):
    x, w_gate = np.ones((4, 5)), np.ones((3, 5))
    (x if where == "x" else w_gate)[2, 1] = bad
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="not finite"):
        route(x, w_gate, k)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_huge_logits_do_not_overflow(k):
    x, w_gate = np.ones((1, 1), np.float32), np.array([[-1e30], [1e30], [0.0]], np.float32)
    routing, saved = route(x, w_gate, k)
    assert routing.experts[0, 0] == 1
    assert routing.weights.tolist() == [[1, 0, 0][:k]]
    assert not route_backward(np.ones((1, k), np.float32), None, saved)[0].any()
