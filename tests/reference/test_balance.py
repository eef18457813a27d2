"""The balance losses: their values at balance and at collapse, and their gradients."""

import math

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs, routings

from tinymoe import hf_load_balancing_loss
from tinymoe.reference import expert_load, softmax, switch_loss, switch_loss_backward, z_loss, z_loss_backward
from tinymoe.reference.router import top_k_ids


@st.composite
def logits_and_load(draw):
    routed, rng = draw(routings()), draw(rngs)
    return rng.standard_normal((len(routed.experts), routed.num_experts)), expert_load(*routed)


def certain(experts, E):
    """Return logits by which each token chooses its experts with certainty, each as likely as the other."""
    logits = np.full((len(experts), E), -1000.0)
    np.put_along_axis(logits, np.array(experts), 0.0, axis=1)
    return logits


# The load.


def test_load_by_hand():
    assert expert_load(np.array([[0, 2], [2, 1], [2, -1]]), 4).tolist() == [0.2, 0.2, 0.6, 0.0]


@given(routings(dropped=True))
def test_load_sums_to_one_unless_nothing_was_assigned(routed):
    load = expert_load(*routed)
    assert load.shape == (routed.num_experts,)
    assert_close(load.sum(), float((routed.experts >= 0).any()), 1e-15)


# The Switch loss.


@given(logits_and_load(), rngs)
def test_switch_backward_equals_finite_differences(drawn, rng):
    logits, load = drawn
    check_component(lambda x: switch_loss(x, load), switch_loss_backward, [logits], rng)


@given(logits_and_load())
def test_switch_loss_is_one_when_the_load_or_the_probabilities_are_uniform(drawn):
    logits, load = drawn
    assert switch_loss(logits, np.full_like(load, 1 / len(load)))[0] == pytest.approx(1, rel=1e-14)
    assert switch_loss(np.full_like(logits, 3.0), load)[0] == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize(("E", "k"), [(2, 1), (4, 2), (8, 2), (8, 1), (3, 3)])
def test_switch_loss_is_E_over_k_when_all_choose_the_same_with_certainty(E, k):
    experts = np.tile(np.arange(k), (10, 1))
    assert switch_loss(certain(experts, E), expert_load(experts, E))[0] == pytest.approx(E / k, rel=1e-14)


def test_switch_loss_goes_below_one():
    logits = np.log(np.repeat([[0.51, 0.49], [0.01, 0.99]], [6, 4], axis=0))
    load = expert_load(top_k_ids(logits, 1), 2)
    assert load.tolist() == [0.6, 0.4]
    assert switch_loss(logits, load)[0] == pytest.approx(0.924, abs=1e-12)


@given(logits_and_load())
def test_gradient_lowers_the_overloaded_and_vanishes_at_uniform_load(drawn):
    logits, load = drawn
    _, saved = switch_loss(logits, load)
    dlogits = switch_loss_backward(1.0, saved)
    assert_close(dlogits.sum(axis=1), np.zeros(len(dlogits)), 1e-14, floor=1.0)
    if load.max() > load.min() + 1e-9:
        assert (dlogits[:, load.argmax()] > 0).all()
    _, even = switch_loss(logits, np.full_like(load, 1 / len(load)))
    assert_close(switch_loss_backward(1.0, even), np.zeros_like(logits), 1e-14, floor=1.0)


@given(logits_and_load())
def test_parts_of_a_batch_add_up_given_the_load_of_the_whole(drawn):
    logits, load = drawn
    parts = [part for part in np.array_split(logits, 3) if len(part)]
    shares = [len(part) / len(logits) for part in parts]
    for loss in (lambda x: switch_loss(x, load)[0], lambda x: z_loss(x)[0]):
        assert_close(sum(s * loss(part) for s, part in zip(shares, parts)), loss(logits), 1e-14)


# The z-loss.


@given(logits_and_load(), rngs)
def test_z_backward_equals_finite_differences(drawn, rng):
    check_component(z_loss, z_loss_backward, [drawn[0]], rng)


@pytest.mark.parametrize("level", [0.0, -3.0, 1e4])
def test_z_loss_of_equal_logits_is_the_square_of_their_level_plus_ln_E(level):
    loss, saved = z_loss(np.full((3, 8), level))
    assert loss == pytest.approx((level + math.log(8)) ** 2, rel=1e-14)
    assert_close(z_loss_backward(1.0, saved), np.full((3, 8), 2 * (level + math.log(8)) / 24), 1e-11)


def test_z_loss_is_zero_when_the_exponentials_sum_to_one():
    loss, saved = z_loss(np.log([[0.3, 0.7], [0.5, 0.5]]))
    assert loss == pytest.approx(0, abs=1e-30)
    assert_close(z_loss_backward(1.0, saved), np.zeros((2, 2)), 1e-12)


# transformers' variant.


@given(st.lists(rngs, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 6), st.data())
def test_hf_loss_equals_the_sum_over_choices_and_experts(layers, N, E, data):
    k = data.draw(st.integers(1, E))
    router_logits = [rng.standard_normal((N, E)) for rng in layers]
    probs = softmax(np.concatenate(router_logits))
    expected = 0.0
    for e in range(E):
        assignments = sum(e in row for row in np.argsort(-probs, axis=1)[:, :k])
        expected += E * (assignments / len(probs)) * probs[:, e].mean()
    assert hf_load_balancing_loss(router_logits, k) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("E", "k"), [(4, 2), (8, 2), (6, 3), (5, 1)])
def test_hf_loss_is_k_at_balance(E, k):
    experts = (np.arange(E)[:, None] + np.arange(k)) % E
    assert hf_load_balancing_loss([certain(experts, E)] * 3, k) == pytest.approx(k, rel=1e-14)


@pytest.mark.parametrize(("E", "alone", "together"), [(4, 4.0, 2.0), (8, 8.0, 4.0)])
def test_hf_loss_is_blind_to_layers_that_collapse_onto_different_experts(E, alone, together):
    layers = [certain(np.tile(chosen, (5, 1)), E) for chosen in ([0, 1], [2, 3])]
    assert [hf_load_balancing_loss([layer], 2) for layer in layers] == pytest.approx([alone, alone], rel=1e-14)
    assert hf_load_balancing_loss(layers, 2) == pytest.approx(together, rel=1e-14)
    ours = [switch_loss(layer, expert_load(top_k_ids(layer, 2), E))[0] for layer in layers]
    assert ours == pytest.approx([E / 2, E / 2], rel=1e-14)


def test_hf_loss_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="empty"):
        hf_load_balancing_loss([], 2)
