"""Other routings: each does what it says, has the gradient of what it does, and the defaults are the plain mixture."""

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import moe_inputs, rngs, routings

from tinymoe.reference import (
    Variation,
    drop_overflow,
    expert_choice,
    expert_choice_backward,
    moe,
    moe_backward,
    route,
    router_noise,
    router_noise_backward,
    softmax,
    varied_moe,
    varied_moe_backward,
)
from tinymoe.reference.variation import capacity_of

BY_EXPERTS = Variation(by_experts=True)


def apart(values, gap=1e-2):
    """Return whether all values of each column are so far apart that small steps change no order."""
    return np.diff(np.sort(values, axis=0), axis=0).min(initial=1) > gap


@given(moe_inputs(), rngs)
def test_defaults_are_the_plain_mixture_bit_for_bit(drawn, rng):
    arrays, k, _ = drawn
    (y, saved), (plain, plain_saved) = varied_moe(*arrays, k, Variation()), moe(*arrays, k)
    np.testing.assert_array_equal(y, plain)
    dy, dlogits = rng.standard_normal(y.shape), rng.standard_normal(saved.routing.logits.shape)
    pairs = zip(varied_moe_backward(dy, dlogits, saved), moe_backward(dy, dlogits, plain_saved), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


# Noise and jitter.


@given(moe_inputs(), rngs)
def test_noise_and_its_gradient(drawn, rng):
    (x, w_gate, *_), _, _ = drawn
    normal = rng.standard_normal((len(x), len(w_gate)))
    noise, _ = router_noise(x, w_gate, normal)
    assert_close(noise, normal * np.log1p(np.exp(x @ w_gate.T)), 1e-12)
    check_component(
        lambda x, w: router_noise(x, w, normal.astype(x.dtype)),
        router_noise_backward,
        (x, w_gate),
        rng,
    )


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@given(moe_inputs(), rngs)
def test_gradients_through_noise_jitter_and_drops(capacity_factor, drawn, rng):
    arrays, k, _ = drawn
    (N, D), E = arrays[0].shape, len(arrays[1])
    w_noise = rng.standard_normal((E, D)) / D
    normal, jitter = 0.05 * rng.standard_normal((N, E)), 1 + 0.01 * rng.uniform(-1, 1, (N, D))
    routed = varied_moe(*arrays, k, Variation(jitter, w_noise, normal))[1].routing
    ranked = -np.sort(-softmax(routed.logits), axis=1)
    assume(apart(ranked.T[: k + 1][::-1]))

    def forward(x, w_gate, w1, w2, w3, w_noise):
        variation = Variation(jitter.astype(x.dtype), w_noise, normal.astype(x.dtype), None, capacity_factor)
        y, saved = varied_moe(x, w_gate, w1, w2, w3, k, variation)
        return np.hstack([y, saved.routing.logits]), saved

    backward = lambda dy, saved: varied_moe_backward(dy[:, :D], dy[:, D:], saved)  # noqa: E731
    check_component(forward, backward, (*arrays, w_noise), rng)


def test_noise_explores_and_jitter_moves_the_router_only():
    rng = np.random.default_rng(0)
    x, w_gate = rng.standard_normal((500, 8)), 0.01 * rng.standard_normal((4, 8))
    w1, w2, w3 = (rng.standard_normal(shape) for shape in ((4, 5, 8), (4, 8, 5), (4, 5, 8)))
    plain = varied_moe(x, w_gate, w1, w2, w3, 2, Variation())[1].routing
    noisy = Variation(w_noise=np.zeros((4, 8)), normal=rng.standard_normal((500, 4)))
    moved = varied_moe(x, w_gate, w1, w2, w3, 2, noisy)[1].routing
    assert 0.3 < np.mean(moved.experts[:, 0] != plain.experts[:, 0]) < 0.9
    assert_close(moved.logits - plain.logits, np.log(2) * noisy.normal, 1e-12)
    same = [np.repeat(w[:1], 4, axis=0) for w in (w1, w2, w3)]  # whichever expert: the same output
    jitter = Variation(jitter=rng.uniform(0.5, 1.5, x.shape))
    jittered, saved = varied_moe(x, w_gate, *same, 2, jitter)
    assert not np.array_equal(saved.routing.experts, plain.experts)
    assert_close(jittered, varied_moe(x, w_gate, *same, 2, Variation())[0], 1e-12)


# The bias.


@given(moe_inputs(), rngs)
def test_bias_selects_and_does_not_weigh(drawn, rng):
    (x, w_gate, *_), k, _ = drawn
    bias = rng.standard_normal(len(w_gate))
    routing, _ = route(x, w_gate, k, bias=bias)
    p = softmax(x @ w_gate.T)
    expected = np.argsort(-(p + bias), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(routing.experts, expected)
    chosen = np.take_along_axis(p, expected, axis=1)
    assert_close(routing.weights, chosen / chosen.sum(axis=1, keepdims=True), 1e-13)
    for zero, none in zip(route(x, w_gate, k, bias=np.zeros(len(w_gate)))[0], route(x, w_gate, k)[0]):
        assert_close(zero, none, 1e-15)


def test_large_bias_empties_an_expert_and_fills_another():
    x, w_gate = np.random.default_rng(0).standard_normal((50, 6)), np.random.default_rng(1).standard_normal((3, 6))
    routing, _ = route(x, w_gate, 1, bias=np.array([-9.0, 0, 9.0]))
    assert (routing.experts == 2).all()


def test_bias_may_choose_what_the_softmax_rounds_to_zero():
    x, w_gate = np.ones((1, 1), np.float32), np.array([[500.0], [0.0], [1.0]], np.float32)
    routing, _ = route(x, w_gate, 2, bias=np.array([-9.0, 0, 0], np.float32))
    assert routing.experts.tolist() == [[1, 2]]
    assert_close(routing.weights, [[1 / (1 + np.e), np.e / (1 + np.e)]], 1e-6)


# Capacity.


@given(routings(dropped=True), st.integers(0, 8))
def test_drop_overflow_equals_the_loop_over_pairs(routing, capacity):
    experts, E = routing
    room, expected = [capacity] * E, np.full_like(experts, -1)
    for choice in range(experts.shape[1]):  # first choices first, then the order of the text
        for n in range(len(experts)):
            e = experts[n, choice]
            if e >= 0 and room[e]:
                room[e] -= 1
                expected[n, choice] = e
    np.testing.assert_array_equal(drop_overflow(experts, E, capacity), expected)


@given(moe_inputs(), st.sampled_from([0.1, 0.5, 1.0, 1.25]))
def test_capacity_bounds_the_load_and_counts_what_it_drops(drawn, factor):
    arrays, k, experts = drawn
    (N, _), E = arrays[0].shape, len(arrays[1])
    y, saved = varied_moe(*arrays, k, Variation(capacity_factor=factor))
    plan = saved.gather.plan
    assert np.diff(plan.offsets).max() <= capacity_of(factor, N, k, E)
    assert saved.dropped == pytest.approx(np.mean(plan.slots < 0))
    np.testing.assert_array_equal(saved.routing.experts, experts)  # the load that balance losses see is before drops
    dropped = (plan.slots < 0).all(axis=1)
    assert not y[dropped].any(), "a token without an expert must leave the residual stream as it is"
    assert y[~dropped].any(axis=1).all()


@given(moe_inputs())
def test_enough_capacity_drops_nothing(drawn):
    arrays, k, _ = drawn
    y, saved = varied_moe(*arrays, k, Variation(capacity_factor=len(arrays[1]) / k))
    np.testing.assert_array_equal(y, moe(*arrays, k)[0])
    assert saved.dropped == 0


def test_capacity_is_rounded_up():
    assert [capacity_of(c, 10, 2, 8) for c in (1.0, 1.25, 2.0, 0.01)] == [3, 4, 5, 1]


# Experts that choose.


@given(moe_inputs(), rngs)
def test_experts_choose_the_tokens_that_want_them_most(drawn, rng):
    (x, w_gate, *_), _, _ = drawn
    N, E = len(x), len(w_gate)
    capacity = int(rng.integers(1, N + 1))
    routing, _ = expert_choice(x, w_gate, capacity)
    p = softmax(x @ w_gate.T)
    for e in range(E):
        taken = sorted(range(N), key=lambda n, e=e: (-p[n, e], n))[:capacity]
        assert set(np.flatnonzero(routing.experts[:, e] == e)) == set(taken)
        assert (np.delete(routing.experts[:, e], taken) == -1).all()
        assert_close(routing.weights[taken, e], p[taken, e], 1e-14)


@given(moe_inputs(), rngs)
def test_gradients_of_expert_choice(drawn, rng):
    (x, w_gate, *_), _, _ = drawn
    capacity = int(rng.integers(1, len(x) + 1))
    assume(apart(softmax(x @ w_gate.T), 1e-4))
    E = len(w_gate)

    def forward(x, w_gate):
        routing, saved = expert_choice(x, w_gate, capacity)
        return np.hstack([routing.weights, routing.logits]), saved

    backward = lambda d, saved: expert_choice_backward(d[:, :E], d[:, E:], saved)  # noqa: E731
    check_component(forward, backward, (x, w_gate), rng)


@given(moe_inputs(), rngs)
def test_gradients_through_the_mixture_by_experts(drawn, rng):
    arrays, k, _ = drawn
    assume(apart(softmax(arrays[0] @ arrays[1].T), 1e-4))
    check_component(
        lambda *arrays: varied_moe(*arrays, k, BY_EXPERTS),
        lambda dy, saved: varied_moe_backward(dy, None, saved),
        arrays,
        rng,
    )


@given(moe_inputs())
def test_load_by_experts_is_exactly_even(drawn):
    arrays, k, _ = drawn
    (N, _), E = arrays[0].shape, len(arrays[1])
    saved = varied_moe(*arrays, k, BY_EXPERTS)[1]
    assert (np.diff(saved.gather.plan.offsets) == min(N, capacity_of(1, N, k, E))).all()


def test_expert_choice_is_not_causal():
    """A later token takes an earlier one's place: the earlier one's output changes, as no causal model's may."""
    rng = np.random.default_rng(0)
    x, w_gate = rng.standard_normal((8, 6)), rng.standard_normal((4, 6))
    w1, w2, w3 = (rng.standard_normal(shape) for shape in ((4, 5, 6), (4, 6, 5), (4, 5, 6)))
    louder = x.copy()
    louder[7] *= 100
    y, changed = (varied_moe(given, w_gate, w1, w2, w3, 2, BY_EXPERTS)[0] for given in (x, louder))
    assert not np.array_equal(y[:7], changed[:7])
    y, changed = (varied_moe(given, w_gate, w1, w2, w3, 2, Variation())[0] for given in (x, louder))
    np.testing.assert_array_equal(y[:7], changed[:7])


def test_logits_that_are_not_finite_raise():
    x, w_gate = np.ones((3, 2)), np.ones((2, 2))
    x[1, 1] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        expert_choice(x, w_gate, 1)
