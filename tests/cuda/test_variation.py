"""Other routings on the device equal the reference's, forward and every gradient, and the defaults are the mixture."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, doubles, dtypes, on_device, orders, running
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import moe_inputs, rngs

from tinymoe import reference
from tinymoe.cuda import (
    Variation,
    device,
    moe,
    moe_backward,
    router_noise,
    router_noise_backward,
    varied_moe,
    varied_moe_backward,
)
from tinymoe.reference.variation import capacity_of

APART = 1e-4  # far beyond what float32 rounds, of probabilities
BY_EXPERTS = Variation(by_experts=True)
factors = st.sampled_from([None, 0.0, 0.3, 0.7, 1.0, 1.25, 9.0])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(moe_inputs(), dtypes, orders, rngs)
@settings(max_examples=5)
def test_defaults_are_the_plain_mixture_bit_for_bit(where, inputs, dtype, order, rng):
    arrays, k, _ = inputs
    with running(where, order):
        there, _ = on_device(*arrays, dtype=dtype)
        (dy,), _ = on_device(rng.standard_normal(arrays[0].shape), dtype=dtype)
        (dlogits,), _ = on_device(rng.standard_normal((len(dy), len(arrays[1]))), dtype=np.float32)
        (y, saved), (plain, plain_saved) = varied_moe(*there, k, Variation()), moe(*there, k)
        assert_same_bits([y, *saved.routing], [plain, *plain_saved.routing])
        assert_same_bits(varied_moe_backward(dy, dlogits, saved), moe_backward(dy, dlogits, plain_saved))
        assert device.host(saved.dropped).tolist() == [0]


# The parts.


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 10) | st.integers(30, 70), dtypes, orders, rngs)
def test_noise_and_its_gradient_equal_the_reference(where, N, D, E, dtype, order, rng):
    with running(where, order):
        (x, w_noise), (x64, w64) = on_device(
            rng.standard_normal((N, D)), 3 * rng.standard_normal((E, D)) / D**0.5, dtype=dtype
        )
        (normal, dnoise), (normal64, dnoise64) = on_device(*rng.standard_normal((2, N, E)), dtype=np.float32)
        noise, saved = router_noise(x, w_noise, normal)
        grads = router_noise_backward(dnoise, saved)
        expected, saved64 = reference.router_noise(x64, w64, normal64)
        wanted = reference.router_noise_backward(dnoise64, saved64)
        assert noise.dtype == np.float32
        assert_equivalent(noise, expected, floor=1)
        dz = abs(dnoise64 * saved64.slope)
        assert_equivalent(grads[0], wanted[0], floor=np.linalg.norm(dz @ abs(w64)) / E)
        assert_equivalent(grads[1], wanted[1], floor=np.linalg.norm(dz.T @ abs(x64)) / N)
        assert_same_bits([noise, *grads], [router_noise(x, w_noise, normal)[0], *router_noise_backward(dnoise, saved)])


@pytest.mark.parametrize("where", EVERYWHERE)
def test_noise_neither_overflows_nor_vanishes(where):
    z = np.array([-1e30, -100, -20, 0, 20, 100, 1e30], np.float32)
    with running(where, ("forward", 0, 0)):
        normal = device.array(np.full((1, 7), -2, np.float32))
        noise, saved = router_noise(device.array(np.ones((1, 1), np.float32)), device.array(z[:, None]), normal)
    softplus, sigmoid = np.logaddexp(0, z.astype(np.float64)), 0.5 + 0.5 * np.tanh(0.5 * z.astype(np.float64))
    np.testing.assert_allclose(device.host(noise)[0], -2 * softplus, rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(device.host(saved.slope)[0], -2 * sigmoid, rtol=1e-6, atol=1e-16)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(moe_inputs(), dtypes, orders, rngs)
@settings(max_examples=5)
def test_jitter_moves_the_router_and_not_the_experts(where, inputs, dtype, order, rng):
    (x, w_gate, *experts), k, _ = inputs
    experts = [np.repeat(w[:1], len(w_gate), axis=0) for w in experts]  # whichever expert: the same output
    jitter = rng.uniform(0.5, 1.5, x.shape)
    with running(where, order):
        there, (x64, w64, *_) = on_device(x, w_gate, *experts, dtype=dtype)
        (jitter,), (jitter64,) = on_device(jitter, dtype=np.float32)
        y, saved = varied_moe(*there, k, Variation(jitter))
        logits = (x64 * jitter64) @ w64.T
        tolerance = 2e-2 if dtype == device.BFLOAT16 else 1e-5
        assert np.linalg.norm(doubles(saved.routing.logits) - logits) <= tolerance * np.linalg.norm(x64)
        assert_equivalent(y, doubles(moe(*there, k)[0]), floor=np.linalg.norm(x64))


# All of it.


def assert_apart(saved, bias, capacity, by_experts, k):
    """Go on only if no rounding can change what is chosen: neither the experts, nor their order."""
    probs = reference.softmax(saved.routing.logits)
    if by_experts:
        ranked = -np.sort(-probs, axis=0)[max(capacity - 1, 0) : capacity + 1]
    else:
        ranked = -np.sort(-(probs if bias is None else probs + bias), axis=1).T[: k + 1]
    assume(np.diff(-ranked, axis=0).min(initial=1) > APART)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(moe_inputs(), factors, st.data(), dtypes, orders, rngs)
@settings(max_examples=12)
def test_forward_and_every_gradient_equal_the_reference(where, inputs, factor, data, dtype, order, rng):
    arrays, k, _ = inputs
    (N, D), E = arrays[0].shape, len(arrays[1])
    jitter, w_noise, bias, by_experts, has_dlogits = data.draw(st.tuples(*5 * [st.booleans()]))
    noisy = w_noise and not by_experts
    with running(where, order):
        there, arrays64 = on_device(*arrays, rng.standard_normal((E, D)) / D**0.5, dtype=dtype)
        floats = (  # a jitter that no dtype rounds
            *(rng.choice([0.5, 1, 2], (N, D)), rng.standard_normal((N, E)), 0.3 * rng.standard_normal(E)),
            rng.standard_normal((N, E)),
        )
        floats, floats64 = on_device(*floats, dtype=np.float32)
        (dy,), (dy64,) = on_device(rng.standard_normal((N, D)), dtype=dtype)

        def variation(w, jitters, normal, biases):
            return Variation(
                jitters if jitter else None,
                *((w, normal) if w_noise else (None, None)),
                biases if bias else None,
                factor,
                by_experts,
            )

        expected, saved64 = reference.varied_moe(*arrays64[:5], k, variation(arrays64[5], *floats64[:3]))
        capacity = min(N, capacity_of(1.0 if factor is None else factor, N, k, E))
        assert_apart(saved64, floats64[2] if bias else None, capacity, by_experts, k)
        dlogits, dlogits64 = (floats[3], floats64[3]) if has_dlogits else (None, None)
        wanted = reference.varied_moe_backward(dy64, dlogits64, saved64)

        of_device = variation(there[5], *floats[:3])
        y, saved = varied_moe(*there[:5], k, of_device)
        grads = varied_moe_backward(dy, dlogits, saved)
        np.testing.assert_array_equal(device.host(saved.routing.experts), saved64.routing.experts)
        tokens, offsets, slots = map(device.host, saved.gather.plan)
        assert offsets.tolist() == saved64.gather.plan.offsets
        np.testing.assert_array_equal(slots, saved64.gather.plan.slots)
        np.testing.assert_array_equal(tokens[: offsets[-1]], saved64.gather.plan.tokens)
        assert len(tokens) == (slots.size if factor is None and not by_experts else min(slots.size, E * capacity))
        assert (tokens[offsets[-1] :] == -1).all()
        np.testing.assert_allclose(device.host(saved.dropped), [saved64.dropped], atol=1e-6)
        assert device.host(saved.routing.not_finite).tolist() == [0]

        assert_equivalent(y, expected, floor=2 * np.linalg.norm(arrays64[0]), components=3)
        assert len(grads) == len(wanted) == 5 + noisy
        terms = 4 * (np.linalg.norm(dy64) + np.linalg.norm(dlogits64 if has_dlogits else 0))
        for found, gradient in zip(grads, wanted, strict=True):
            assert_equivalent(found, gradient, floor=terms, components=3)
        again, saved_again = varied_moe(*there[:5], k, of_device)
        assert_same_bits([y, *grads], [again, *varied_moe_backward(dy, dlogits, saved_again)])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(moe_inputs(), dtypes, orders)
@settings(max_examples=5)
def test_tokens_without_an_expert_get_exactly_zeros(where, inputs, dtype, order):
    arrays, k, _ = inputs
    with running(where, order):
        there, _ = on_device(*arrays, dtype=dtype)
        for variation in (Variation(capacity_factor=0.3), BY_EXPERTS):
            y, saved = varied_moe(*there, k, variation)
            left = (device.host(saved.gather.plan.slots) < 0).all(axis=1)
            assert not doubles(y)[left].any()
            assert doubles(y)[~left].any(axis=1).all()
            assert not variation.by_experts or (device.host(saved.gather.plan.tokens) >= 0).all()


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(
    ("variation", "of"),
    [
        (Variation(), "x"),
        (Variation(), "normal"),
        (Variation(capacity_factor=1.5), "x"),
        (Variation(capacity_factor=1.5), "normal"),
        (BY_EXPERTS, "x"),
    ],
)
def test_nan_sets_the_flag_and_harms_no_other_token(where, variation, of):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((5, 4), (3, 4), (3, 6, 4), (3, 4, 6), (3, 6, 4))]
    normal = rng.standard_normal((5, 3)).astype(np.float32)

    def run():
        noise = {} if variation.by_experts else {"w_noise": device.array(arrays[1]), "normal": device.array(normal)}
        y, saved = varied_moe(*map(device.array, arrays), 2, variation._replace(**noise))
        return device.host(y), device.host(saved.routing.not_finite)

    with running(where, ("forward", 0, 0)):
        good, flag = run()
        assert flag.tolist() == [0]
        (arrays[0] if of == "x" else normal)[3] = np.nan
        bad, flag = run()
    assert flag.tolist() == [1]
    others = [0, 1, 2, 4]
    assert np.isfinite(bad[others]).all()
    if variation == Variation():  # with a capacity they share what there is
        assert_same_bits([bad[others]], [good[others]])
