"""The sparse mixture of experts: by hand, against the loop over tokens, and what must not matter."""

import math

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import given
from strategies import moe_inputs, rngs

from tinymoe.reference import ffn, moe, moe_backward, moe_decode, moe_naive, softmax

# Three tokens, four experts, top-2, worked by hand. The tokens are the unit vectors, so w_gate is the table of logits
# (experts down, tokens across), and each expert has one hidden unit: expert e gives silu(1) · (e + 1) · (1, 2, 3).
SILU_OF_1 = 0.7310585786300049
TOKENS = np.eye(3)
W_GATE = np.array([[math.log(3), 0, -1], [0, 0, -2], [-1, 0, 0], [-2, 0, math.log(4)]])
W1 = np.ones((4, 1, 3))
W2 = np.tile(np.array([[1.0], [2.0], [3.0]]), (4, 1, 1))
W3 = np.arange(1.0, 5.0).reshape(4, 1, 1) * np.ones(3)
BY_HAND = (TOKENS, W_GATE, W1, W2, W3, 2)


def test_forward_by_hand():
    y, saved = moe(*BY_HAND)
    assert saved.routing.experts.tolist() == [[0, 1], [0, 1], [3, 2]]  # the second token's tie goes to 0 and 1
    assert_close(saved.routing.weights, [[0.75, 0.25], [0.5, 0.5], [0.8, 0.2]], 1e-15)
    assert saved.gather.plan.tokens.tolist() == [0, 1, 0, 1, 2, 2]
    assert saved.gather.plan.offsets == [0, 2, 4, 5, 6]
    mixed = [0.75 * 1 + 0.25 * 2, 0.5 * 1 + 0.5 * 2, 0.8 * 4 + 0.2 * 3]  # 1.25, 1.5, 3.8
    assert_close(y, SILU_OF_1 * np.outer(mixed, [1, 2, 3]), 1e-15)


def test_gradient_of_the_gate_by_hand():
    _, saved = moe(*BY_HAND)
    _, dw_gate, *_ = moe_backward(np.ones((3, 3)), None, saved)
    # Summed over y, expert e gives o = 6 silu(1) (e + 1); a chosen logit's gradient is weight · (o − the token's mix).
    by_token = [[-0.1875, 0.1875, 0, 0], [-0.25, 0.25, 0, 0], [0, 0, -0.16, 0.16]]
    assert_close(dw_gate, 6 * SILU_OF_1 * np.transpose(by_token), 1e-14)


@given(moe_inputs(), rngs)
def test_backward_equals_finite_differences(drawn, rng):
    arrays, k, _ = drawn
    dlogits = rng.standard_normal((len(arrays[0]), len(arrays[1])))

    def forward(*arrays):
        y, saved = moe(*arrays, k)
        return np.hstack([y, saved.routing.logits]), saved

    D = arrays[0].shape[1]
    check_component(forward, lambda dy, saved: moe_backward(dy[:, :D], dy[:, D:], saved), arrays, rng)
    _, saved = moe(*arrays, k)
    zero, none = (moe_backward(arrays[0], dlogits, saved) for dlogits in (np.zeros_like(dlogits), None))
    assert all(np.array_equal(a, b) for a, b in zip(zero, none))


@given(moe_inputs())
def test_grouped_equals_the_loop_over_tokens(drawn):
    arrays, k, experts = drawn
    y, saved = moe(*arrays, k)
    np.testing.assert_array_equal(saved.routing.experts, experts)
    assert_close(y, moe_naive(*arrays, k), 1e-13)


@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-5), ("float64", 1e-13)])
@given(moe_inputs())
def test_decoding_one_token_equals_the_grouped_form(dtype, tol, drawn):
    (x, *weights), k, _ = drawn
    x, weights = x.astype(dtype), [w.astype(dtype) for w in weights]
    for token in np.split(x, len(x)):
        (y, decoded), (expected, saved) = moe_decode(token, *weights, k), moe(token, *weights, k)
        assert y.dtype == dtype
        assert_close(y, expected, tol)
        np.testing.assert_array_equal(decoded.routing.experts, saved.routing.experts)
        assert_close(decoded.routing.weights, saved.routing.weights, tol)
        assert_close(decoded.routing.logits, saved.routing.logits, tol)


@given(moe_inputs())
def test_all_experts_chosen_is_the_dense_mixture(drawn):
    (x, w_gate, *weights), _, _ = drawn
    probs = softmax(x @ w_gate.T)
    dense = sum(probs[:, e : e + 1] * ffn(x, *(w[e] for w in weights))[0] for e in range(len(w_gate)))
    assert_close(moe(x, w_gate, *weights, len(w_gate))[0], dense, 1e-13)


@given(moe_inputs(), rngs)
def test_permuting_tokens_permutes_outputs(drawn, rng):
    (x, *weights), k, _ = drawn
    order = rng.permutation(len(x))
    assert_close(moe(x[order], *weights, k)[0], moe(x, *weights, k)[0][order], 1e-13)


@given(moe_inputs(), rngs)
def test_permuting_experts_with_their_gate_rows_leaves_the_output_alone(drawn, rng):
    (x, *weights), k, _ = drawn
    order = rng.permutation(len(weights[0]))
    assert_close(moe(x, *(w[order] for w in weights), k)[0], moe(x, *weights, k)[0], 1e-13)


@given(moe_inputs())
def test_identical_experts_make_routing_irrelevant(drawn):
    (x, w_gate, *weights), k, _ = drawn
    same = [np.repeat(w[:1], len(w_gate), axis=0) for w in weights]
    y, saved = moe(x, w_gate, *same, k)
    assert_close(y, ffn(x, *(w[0] for w in weights))[0], 1e-13)
    _, dw_gate, *_ = moe_backward(np.ones_like(y), None, saved)
    assert_close(dw_gate, np.zeros_like(w_gate), 1e-12, floor=np.abs(y).sum() + 1)


@given(moe_inputs(), rngs)
def test_expert_without_tokens_gets_exactly_zero_gradient(drawn, rng):
    arrays, k, experts = drawn
    y, saved = moe(*arrays, k)
    _, *grads = moe_backward(rng.standard_normal(y.shape), None, saved)
    for e in range(len(arrays[1])):
        if e not in experts:
            assert not any(grad[e].any() for grad in grads)
        else:
            assert all(grad[e].any() for grad in grads[1:])


@given(moe_inputs())
def test_same_input_gives_the_same_bits(drawn):
    arrays, k, _ = drawn
    (y, saved), (again, saved_again) = moe(*arrays, k), moe(*arrays, k)
    np.testing.assert_array_equal(again, y)
    assert all(map(np.array_equal, moe_backward(y, None, saved), moe_backward(y, None, saved_again)))


def test_token_that_is_not_finite_raises_instead_of_going_anywhere():
    x = TOKENS.copy()
    x[1, 1] = np.nan
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="not finite"):
        moe(x, W_GATE, W1, W2, W3, 2)
