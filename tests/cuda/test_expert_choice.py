"""Experts choose on the device the tokens with the largest probabilities, and the gradient is the reference's."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device, expert_choice, expert_choice_backward
from tinymoe.errors import InputError
from tinymoe.reference.router import ExpertChoiceSaved


@st.composite
def inputs(draw):
    """Draw x, w_gate and a capacity: few levels, so that many tokens are alike to an expert, or none alike."""
    N, D = draw(st.integers(1, 90)), draw(st.integers(1, 20) | st.integers(1, 50).map(lambda packs: 4 * packs))
    E, rng, levels = draw(st.integers(1, 6) | st.integers(31, 35)), draw(rngs), draw(st.sampled_from([1, 3, 1000]))
    x, w_gate = (rng.integers(-levels, levels + 1, shape) / levels / D**0.5 for shape in ((N, D), (E, D)))
    return x[rng.integers(0, N, N)] if draw(st.booleans()) else x, w_gate, draw(st.integers(0, N))


def chosen_of(probs, capacity):
    """Return which tokens (N, E) each expert takes, by a stable sort of its column."""
    chosen = np.zeros(probs.shape, bool)
    np.put_along_axis(chosen, np.argsort(-probs, axis=0, kind="stable")[:capacity], True, axis=0)
    return chosen


def assert_chosen(routing, saved, capacity):
    """Compare what is chosen with the sort of the device's own probabilities: no rounding is between them."""
    weights, experts, _, not_finite = map(device.host, routing)
    probs = device.host(saved.probs)
    chosen = chosen_of(probs, capacity)
    np.testing.assert_array_equal(experts, np.where(chosen, np.arange(probs.shape[1]), -1))
    np.testing.assert_array_equal(weights, np.where(chosen, probs, 0))
    assert not not_finite.any()


@pytest.mark.parametrize("where", EVERYWHERE)
@given(inputs(), st.booleans(), dtypes, orders, rngs)
def test_equals_the_reference(where, drawn, has_dlogits, dtype, order, rng):
    *arrays, capacity = drawn
    shape = N, E = len(arrays[0]), len(arrays[1])
    with running(where, order):
        (x, w_gate), (x64, w64) = on_device(*arrays, dtype=dtype)
        (dweights, dlogits), (dweights64, dlogits64) = on_device(
            rng.standard_normal(shape), rng.standard_normal(shape), dtype=np.float32
        )
        if not has_dlogits:
            dlogits = dlogits64 = None
        routing, saved = expert_choice(x, w_gate, capacity)
        assert_chosen(routing, saved, capacity)
        assert_same_bits(expert_choice(x, w_gate, capacity)[0], routing)
        logits = x64 @ w64.T
        probs, chosen = reference.softmax(logits), device.host(routing.experts) >= 0
        assert_equivalent(routing.logits, logits, floor=np.linalg.norm(abs(x64) @ abs(w64.T)))
        assert_equivalent(saved.probs, probs)

        grads = expert_choice_backward(dweights, dlogits, saved)
        expected = reference.expert_choice_backward(dweights64, dlogits64, ExpertChoiceSaved(x64, w64, probs, chosen))
        dp = abs(dweights64) * chosen
        summed = probs * (dp + (probs * dp).sum(axis=1, keepdims=True))  # what cancels in the gradient of the logits
        summed += 0 if dlogits64 is None else abs(dlogits64)
        assert_equivalent(grads[0], expected[0], floor=np.linalg.norm(summed @ abs(w64)) / E)
        assert_equivalent(grads[1], expected[1], floor=np.linalg.norm(summed.T @ abs(x64)) / N)
        assert_same_bits(expert_choice_backward(dweights, dlogits, saved), grads)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(2, 40), st.integers(1, 12), dtypes, orders, rngs, st.data())
def test_choice_is_the_reference_s_where_no_two_tokens_are_alike(where, N, E, dtype, order, rng, data):
    capacity = data.draw(st.integers(1, N))
    x = rng.permuted(np.tile(np.arange(N) / 64, (E, 1)), axis=1).T  # (N, E)
    with running(where, order):
        (there, w_gate), (x64, w64) = on_device(x, 2 * np.eye(E), dtype=dtype)
        routing, _ = expert_choice(there, w_gate, capacity)
        expected, saved64 = reference.expert_choice(x64, w64, capacity)
    ranked = np.sort(saved64.probs, axis=0)[::-1]
    apart = (ranked[capacity - 1] - ranked[capacity] > 1e-5) if capacity < N else np.ones(E, bool)
    np.testing.assert_array_equal(device.host(routing.experts)[:, apart], expected.experts[:, apart])
    assert_equivalent(device.host(routing.weights)[:, apart], expected.weights[:, apart])


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("capacity", [1, 1023, 1024, 1025, 2100, 2101])
def test_more_tokens_than_threads_and_most_of_them_alike(where, capacity):
    rng = np.random.default_rng(capacity)
    with running(where, ("shuffled", 0, 0)):
        x, w_gate = (device.array(rng.integers(-1, 2, shape).astype(np.float32)) for shape in ((2101, 1), (2, 1)))
        assert_chosen(*expert_choice(x, w_gate, capacity), capacity)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("capacity", [0, 1, 299, 300])
def test_a_single_expert_takes_the_first_tokens_and_the_last_of_very_many_takes_its_own(where, capacity):
    with running(where, ("reverse", 0, 0)):
        one, _ = expert_choice(device.zeros((300, 4), np.float32), device.zeros((1, 4), np.float32), capacity)
        assert device.host(one.experts)[:, 0].tolist() == [0] * capacity + [-1] * (300 - capacity)
        rng = np.random.default_rng(0)
        x, w_gate = (device.array(rng.standard_normal(shape, np.float32)) for shape in ((9, 3), (256, 3)))
        assert_chosen(*expert_choice(x, w_gate, capacity % 10), capacity % 10)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([np.nan, np.inf, -np.inf]), dtypes, orders, st.data())
def test_logits_that_are_not_finite_are_told_and_every_expert_has_its_tokens(where, N, E, bad, dtype, order, data):
    capacity, row, expert = (data.draw(st.integers(low, high)) for low, high in ((0, N), (0, N - 1), (0, E - 1)))
    arrays = np.ones((N, 5)), np.ones((E, 5))
    (arrays[0][row] if data.draw(st.booleans()) else arrays[1][expert])[2] = bad
    with running(where, order):
        (x, w_gate), _ = on_device(*arrays, dtype=dtype)
        weights, experts, _, not_finite = map(device.host, expert_choice(x, w_gate, capacity)[0])
    assert not_finite.tolist() == [1]
    assert ((experts == np.arange(E)) | (experts == -1)).all()
    assert ((experts >= 0).sum(axis=0) == capacity).all()
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("where", EVERYWHERE)
def test_huge_logits_do_not_overflow(where):
    with running(where, ("forward", 0, 0)):
        x, w_gate = (device.array(np.array(a, np.float32)) for a in ([[-1], [1]], [[-3.4028e38], [1e38], [3.4028e38]]))
        routing, saved = expert_choice(x, w_gate, 1)
    assert device.host(saved.probs).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert device.host(routing.experts).tolist() == [[0, 1, -1], [-1, -1, 2]]
    assert not device.host(routing.not_finite).any()


@pytest.mark.parametrize(("E", "capacity", "message"), [(257, 2, "256"), (4, -1, "3 tokens"), (4, 4, "3 tokens")])
def test_what_cannot_be_chosen_is_refused(E, capacity, message):
    with running("emulated", ("forward", 0, 0)), pytest.raises(InputError, match=message):
        expert_choice(device.zeros((3, 2), np.float32), device.zeros((E, 2), np.float32), capacity)
