"""The router on the device equals the reference's, and goes on where logits are not finite."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.router import route, route_backward, top_k_ids
from tinymoe.errors import InputError
from tinymoe.reference.router import top_k_ids as reference_top_k_ids


@st.composite
def exact_inputs(draw):
    """Draw x, w_gate of small multiples of 1/8, and k: logits are exact in float32, and many are equal."""
    N, D, E = draw(st.integers(1, 80)), draw(st.integers(1, 160)), draw(st.integers(1, 40) | st.integers(33, 256))
    if E > 40:
        N, D = -(-N // 8), -(-D // 4)
    rng, k = draw(rngs), draw(st.integers(1, min(E, 4)) | st.integers(1, E))
    return rng.integers(-1, 2, (N, D)), rng.integers(-4, 5, (E, D)) / 8, k


@pytest.mark.parametrize("where", EVERYWHERE)
@given(exact_inputs(), st.booleans(), dtypes, orders, rngs)
def test_equals_the_reference(where, drawn, has_dlogits, dtype, order, rng):
    *inputs, k = drawn
    N, E = len(inputs[0]), len(inputs[1])
    with running(where, order):
        (x, w_gate), (x64, w64) = on_device(*inputs, dtype=dtype)
        (dweights, dlogits), (dweights64, dlogits64) = on_device(
            rng.standard_normal((N, k)), rng.standard_normal((N, E)), dtype=np.float32
        )
        if not has_dlogits:
            dlogits = dlogits64 = None
        routing, saved = route(x, w_gate, k)
        expected, saved64 = reference.route(x64, w64, k)
        np.testing.assert_array_equal(device.host(routing.logits), expected.logits)
        np.testing.assert_array_equal(device.host(routing.experts), expected.experts)
        assert_equivalent(routing.weights, expected.weights)
        assert not device.host(routing.not_finite).any()
        assert_same_bits(route(x, w_gate, k)[0], routing)

        grads = route_backward(dweights, dlogits, saved)
        dx, dw_gate = reference.route_backward(dweights64, dlogits64, saved64)
        summed = np.zeros((N, E)) if dlogits64 is None else abs(dlogits64)  # what cancels in the gradient of the logits
        mean = abs(expected.weights * dweights64).sum(axis=1, keepdims=True)
        np.put_along_axis(summed, expected.experts, expected.weights * (abs(dweights64) + mean), axis=1)
        assert_equivalent(grads[0], dx, floor=np.linalg.norm(summed @ abs(w64)) / E)
        assert_equivalent(grads[1], dw_gate, floor=np.linalg.norm(summed.T @ abs(x64)) / N)
        assert_same_bits(route_backward(dweights, dlogits, saved), grads)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 70), dtypes, orders, rngs, st.data())
def test_any_numbers_route_to_the_largest_logits(where, N, D, E, dtype, order, rng, data):
    k = data.draw(st.integers(1, E))
    with running(where, order):
        (x, w_gate), (x64, w64) = on_device(
            rng.standard_normal((N, D)), rng.standard_normal((E, D)) / D**0.5, dtype=dtype
        )
        weights, experts, logits, _ = map(device.host, route(x, w_gate, k)[0])
    assert_equivalent(logits, x64 @ w64.T)
    chosen = np.take_along_axis(logits.astype(np.float64), experts, axis=1)
    assert (np.diff(chosen, axis=1) <= 1e-5).all()
    left = np.ones((N, E), bool)
    np.put_along_axis(left, experts, False, axis=1)
    assert left.sum() == N * (E - k)
    assert (np.where(left, logits, -np.inf) <= chosen[:, -1:] + 1e-5).all()
    assert_equivalent(weights, reference.softmax(chosen))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_many_rows_are_summed_in_slices_of_more_rows(where):
    rng = np.random.default_rng(0)
    with running(where, ("forward", 0, 0)):
        (x, w_gate), (x64, _) = on_device(rng.standard_normal((4500, 1)), np.zeros((2, 1)), dtype=np.float32)
        (dlogits,), (dlogits64,) = on_device(rng.standard_normal((4500, 2)), dtype=np.float32)
        _, saved = route(x, w_gate, 1)
        _, dw_gate = route_backward(device.zeros((4500, 1), np.float32), dlogits, saved)
    assert_equivalent(dw_gate, dlogits64.T @ x64)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(
    st.integers(1, 9), st.integers(1, 40) | st.integers(1, 256), st.sampled_from([1, 3, 1000]), orders, rngs, st.data()
)
def test_top_k_ids_of_any_scores_give_ties_to_the_lowest(where, N, E, levels, order, rng, data):
    k = data.draw(st.integers(1, min(E, 5)) | st.just(E))
    scores = rng.integers(-levels, levels + 1, (N, E)).astype(np.float32)
    scores[rng.random((N, E)) < 0.1] = data.draw(st.sampled_from([-np.inf, np.nan]))  # either is chosen last
    with running(where, order):
        found = device.host(top_k_ids(device.array(scores), k))
    np.testing.assert_array_equal(found, reference_top_k_ids(scores, k))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([np.nan, np.inf, -np.inf]), dtypes, orders, st.data())
def test_logits_that_are_not_finite_are_told_and_the_choice_is_still_of_experts(where, N, E, bad, dtype, order, data):
    k, row, expert = (data.draw(st.integers(low, high)) for low, high in ((1, E), (0, N - 1), (0, E - 1)))
    inputs = np.ones((N, 5)), np.ones((E, 5))
    (inputs[0][row] if data.draw(st.booleans()) else inputs[1][expert])[2] = bad
    with running(where, order):
        (x, w_gate), _ = on_device(*inputs, dtype=dtype)
        weights, experts, _, not_finite = map(device.host, route(x, w_gate, k)[0])
    assert not_finite.tolist() == [1]
    assert all(len(set(chosen)) == k and min(chosen) >= 0 and max(chosen) < E for chosen in experts.tolist())
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_huge_logits_do_not_overflow_and_share_nothing(where, k):
    with running(where, ("forward", 0, 0)):
        (x, w_gate), _ = on_device(np.ones((1, 1)), [[-1e30], [1e30], [0.0]], dtype=np.float32)
        routing, saved = route(x, w_gate, k)
        grads = route_backward(device.array(np.ones((1, k), np.float32)), None, saved)
    assert device.host(routing.experts).tolist() == [[1, 0, 2][:k]]
    assert device.host(routing.weights).tolist() == [[1, 0, 0][:k]]
    assert not device.host(grads[0]).any()
    assert not device.host(routing.not_finite).any()


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), dtypes, orders, rngs)
def test_top_1_sends_exactly_zero_gradient_through_its_weight(where, N, D, E, dtype, order, rng):
    with running(where, order):
        (x, w_gate), _ = on_device(rng.standard_normal((N, D)), rng.standard_normal((E, D)), dtype=dtype)
        (dweights,), _ = on_device(rng.standard_normal((N, 1)), dtype=np.float32)
        routing, saved = route(x, w_gate, 1)
        assert (device.host(routing.weights) == 1).all()
        assert all(not device.host(grad).any() for grad in route_backward(dweights, None, saved))


# Noise and bias.


@pytest.mark.parametrize("where", EVERYWHERE)
@given(exact_inputs(), dtypes, orders, rngs)
def test_noise_is_added_to_the_logits_and_gets_their_gradient(where, drawn, dtype, order, rng):
    *inputs, k = drawn
    N, E = len(inputs[0]), len(inputs[1])
    with running(where, order):
        (x, w_gate), (x64, w64) = on_device(*inputs, dtype=dtype)
        (noise, dweights, dlogits), (noise64, dweights64, dlogits64) = on_device(
            rng.integers(-4, 5, (N, E)) / 8, rng.standard_normal((N, k)), rng.standard_normal((N, E)), dtype=np.float32
        )
        routing, saved = route(x, w_gate, k, noise)
        expected, saved64 = reference.route(x64, w64, k, noise64)
        np.testing.assert_array_equal(device.host(routing.logits), expected.logits)
        np.testing.assert_array_equal(device.host(routing.experts), expected.experts)
        assert_equivalent(routing.weights, expected.weights)
        *grads, dnoise = route_backward(dweights, dlogits, saved)
        assert_equivalent(dnoise, reference.route_backward(dweights64, dlogits64, saved64)[2])
        assert_same_bits(route_backward(dweights, dlogits, saved._replace(noisy=False)), grads)
        silent = device.zeros((N, E), np.float32)
        assert_same_bits(route(x, w_gate, k, silent, device.zeros(E, np.float32))[0], route(x, w_gate, k)[0])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 20), st.integers(1, 40) | st.integers(33, 256), orders, rngs, st.data())
def test_bias_selects_and_does_not_weigh(where, N, E, order, rng, data):
    k, scale = data.draw(st.integers(1, min(E, 4)) | st.integers(1, E)), data.draw(st.sampled_from([0.01, 1, 9]))
    with running(where, order):
        (x, w_gate, bias), (_, _, bias64) = on_device(
            rng.standard_normal((N, 5)), rng.standard_normal((E, 5)), scale * rng.standard_normal(E), dtype=np.float32
        )
        weights, experts, logits, _ = map(device.host, route(x, w_gate, k, None, bias)[0])
        np.testing.assert_array_equal(logits, device.host(route(x, w_gate, k)[0].logits))
    scores = reference.softmax(logits.astype(np.float64)) + bias64
    chosen = np.take_along_axis(scores, experts, axis=1)
    rounded = 1e-6 * max(1, abs(bias64).max())
    assert (np.diff(chosen, axis=1) <= rounded).all()
    left = np.ones((N, E), bool)
    np.put_along_axis(left, experts, False, axis=1)
    assert left.sum() == N * (E - k)
    assert (np.where(left, scores, -np.inf) <= chosen[:, -1:] + rounded).all()
    assert_equivalent(weights, reference.softmax(np.take_along_axis(logits.astype(np.float64), experts, axis=1)))


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("k", "experts", "weights"), [(1, [0], [1]), (2, [0, 1], [0, 1]), (3, [0, 1, 2], [0, 1, 0])])
def test_what_only_the_bias_chooses_has_a_weight_however_small_its_probability(where, k, experts, weights):
    with running(where, ("forward", 0, 0)):
        (x, w_gate, bias), _ = on_device(np.ones((1, 1)), [[-1e30], [1e30], [0.0]], [9.0, 0, 0], dtype=np.float32)
        routing, _ = route(x, w_gate, k, None, bias)
    assert device.host(routing.experts).tolist() == [experts]
    assert device.host(routing.weights).tolist() == [weights]


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 40), st.sampled_from([np.nan, np.inf, -np.inf]), orders, rngs, st.data())
def test_bias_that_is_not_finite_still_chooses_among_experts(where, E, bad, order, rng, data):
    k = data.draw(st.integers(1, E))
    bias = np.where(rng.random(E) < 0.5, bad, 0)
    with running(where, order):
        (x, w_gate, bias), _ = on_device(np.ones((3, 2)), rng.standard_normal((E, 2)), bias, dtype=np.float32)
        weights, experts, _, _ = map(device.host, route(x, w_gate, k, None, bias)[0])
    assert all(len(set(chosen)) == k and min(chosen) >= 0 and max(chosen) < E for chosen in experts.tolist())
    assert_equivalent(weights.sum(axis=1), np.ones(3))


@pytest.mark.parametrize(("E", "k"), [(257, 2), (4, 0), (4, 5)])
def test_what_the_kernel_cannot_choose_from_is_refused(E, k):
    with running("emulated", ("forward", 0, 0)), pytest.raises(InputError, match="256"):
        route(device.zeros((3, 2), np.float32), device.zeros((E, 2), np.float32), k)
