"""The balance losses on the device equal the reference's."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs, routings

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.balance import (
    expert_load,
    hf_load_balancing_loss,
    switch_loss,
    switch_loss_backward,
    z_loss,
    z_loss_backward,
)

upstream = st.sampled_from([1.0, 0.02, -3.0])


@st.composite
def logits(draw):
    """Draw (N, E) logits, of more experts than a warp has lanes, near zero or far from it."""
    N, E = draw(st.integers(1, 60)), draw(st.integers(1, 80))
    return draw(rngs).standard_normal((N, E)) * draw(st.sampled_from([1, 10])) + draw(st.sampled_from([0, -300, 300]))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(routings(dropped=True) | st.tuples(st.integers(1, 2000).map(np.arange), st.just(300)), orders)
def test_load_equals_the_reference(where, routed, order):
    experts, E = routed
    experts = experts % E if experts.ndim == 1 else experts
    with running(where, order):
        load = expert_load(device.array(experts, np.int32), E)
        assert load.dtype == np.float32
        assert_equivalent(load, reference.expert_load(experts, E))
        assert_same_bits([expert_load(device.array(experts, np.int32), E)], [load])


@pytest.mark.parametrize("where", EVERYWHERE)
def test_load_of_more_assignments_than_the_grid_has_threads(where):
    experts = np.random.default_rng(0).integers(-1, 5, 70_000)
    with running(where, ("forward", 0, 0)):
        assert_equivalent(expert_load(device.array(experts, np.int32), 5), reference.expert_load(experts, 5))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_load_of_nothing_is_zero(where):
    with running(where, ("forward", 0, 0)):
        for experts in (np.full((3, 2), -1), np.empty((0, 2))):
            assert device.host(expert_load(device.array(experts, np.int32), 4)).tolist() == [0] * 4


@pytest.mark.parametrize("where", EVERYWHERE)
def test_ids_that_name_no_expert_are_not_counted(where):
    with running(where, ("forward", 0, 0)):
        load = expert_load(device.array([[0, 3], [1 << 30, 1], [-(1 << 30), -1]], np.int32), 3)
    assert device.host(load).tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize("where", EVERYWHERE)
@given(logits(), upstream, st.booleans(), orders, rngs)
def test_switch_loss_equals_the_reference(where, logits, dloss, load_is_host, order, rng):
    load = rng.dirichlet(np.ones(logits.shape[1]))
    with running(where, order):
        (there, load_there), (logits64, load64) = on_device(logits, load, dtype=np.float32)
        given_load = load64 if load_is_host else load_there
        loss, saved = switch_loss(there, given_load)
        expected, expected_saved = reference.switch_loss(logits64, load64)
        assert loss.shape == (1,)
        assert_equivalent(loss, [expected])
        dlogits = switch_loss_backward(dloss, saved)
        N, E = logits.shape
        floor = np.linalg.norm(dloss * E / N * expected_saved.probs * load64)
        assert_equivalent(dlogits, reference.switch_loss_backward(dloss, expected_saved), floor)
        again, saved = switch_loss(there, given_load)
        assert_same_bits([again, switch_loss_backward(dloss, saved)], [loss, dlogits])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(logits(), upstream, orders)
def test_z_loss_equals_the_reference(where, logits, dloss, order):
    with running(where, order):
        (there,), (logits64,) = on_device(logits, dtype=np.float32)
        loss, saved = z_loss(there)
        expected, expected_saved = reference.z_loss(logits64)
        assert loss.shape == (1,)
        assert_equivalent(loss, [expected], floor=1.0)
        dlogits = z_loss_backward(dloss, saved)
        floor = abs(dloss) / len(logits) ** 0.5  # of log Σ exp of order one
        assert_equivalent(dlogits, reference.z_loss_backward(dloss, expected_saved), floor)
        again, saved = z_loss(there)
        assert_same_bits([again, z_loss_backward(dloss, saved)], [loss, dlogits])


@pytest.mark.parametrize("where", EVERYWHERE)
def test_losses_of_more_tokens_than_the_summing_block_has_threads(where):
    logits = np.random.default_rng(0).standard_normal((2500, 2))
    load = np.array([0.9, 0.1])
    with running(where, ("shuffled", 0, 0)):
        (there,), (logits64,) = on_device(logits, dtype=np.float32)
        assert_equivalent(switch_loss(there, load)[0], [reference.switch_loss(logits64, load)[0]])
        assert_equivalent(z_loss(there)[0], [reference.z_loss(logits64)[0]])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 50), orders, rngs, st.data())
def test_hf_loss_equals_the_reference(where, tokens_of_layer, E, order, rng, data):
    k = data.draw(st.integers(1, E))
    layers = [np.array([rng.permutation(E) for _ in range(N)]) / 8 for N in tokens_of_layer]  # apart from each other
    with running(where, order):
        loss = hf_load_balancing_loss([device.array(layer, np.float32) for layer in layers], k)
        assert loss.shape == (1,)
        assert_equivalent(loss, [reference.hf_load_balancing_loss(layers, k)])
        assert_same_bits([hf_load_balancing_loss(layers, k)], [loss])  # given on the host, too


def test_hf_loss_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="empty"):
        hf_load_balancing_loss([], 2)
