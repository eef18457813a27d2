"""Cross-entropy."""

import math

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.reference import cross_entropy, cross_entropy_backward
from tinymoe.reference.loss import IGNORED


@st.composite
def logits_and_targets(draw):
    N, V, rng = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(rngs)
    targets = rng.integers(V, size=N)
    targets[rng.random(N) < draw(st.sampled_from([0, 0.5, 1]))] = IGNORED
    return rng.standard_normal((N, V)), targets


@given(logits_and_targets(), rngs)
def test_backward_equals_finite_differences(drawn, rng):
    logits, targets = drawn
    check_component(lambda x: cross_entropy(x, targets), cross_entropy_backward, [logits], rng)


@given(logits_and_targets())
def test_ignored_rows_contribute_nothing_and_get_exactly_zero_gradient(drawn):
    logits, targets = drawn
    counted = targets != IGNORED
    loss, saved = cross_entropy(logits, targets)
    expected = cross_entropy(logits[counted], targets[counted])[0] if counted.any() else 0.0
    assert loss == pytest.approx(expected, rel=1e-14, abs=0)
    assert not cross_entropy_backward(1.0, saved)[~counted].any()


@pytest.mark.parametrize("V", [1, 2, 256, 32000])
def test_uniform_logits_give_ln_V(V):
    loss, _ = cross_entropy(np.full((3, V), -7.5), np.array([0, V - 1, V // 2]))
    assert loss == pytest.approx(math.log(V), abs=1e-12)


def test_loss_by_hand():
    logits = np.log([[3.0, 1.0], [1.0, 4.0], [1.0, 1.0]])
    loss, saved = cross_entropy(logits, np.array([0, 0, -100]))  # −100 does not count
    assert loss == pytest.approx((math.log(4 / 3) + math.log(5)) / 2, rel=1e-15)
    assert_close(cross_entropy_backward(1.0, saved), [[-0.125, 0.125], [-0.4, 0.4], [0, 0]], 1e-15)


@given(logits_and_targets(), st.floats(-1e3, 1e3))
def test_a_shift_of_all_logits_changes_nothing(drawn, shift):
    logits, targets = drawn
    (loss, saved), (shifted, shifted_saved) = cross_entropy(logits, targets), cross_entropy(logits + shift, targets)
    assert_close(shifted, loss, 1e-10)
    assert_close(cross_entropy_backward(1.0, shifted_saved), cross_entropy_backward(1.0, saved), 1e-10)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_do_not_overflow(size):
    logits = np.array([[size, -size], [size, -size]], np.float32)
    loss, saved = cross_entropy(logits, np.array([0, 1]))
    assert loss == pytest.approx(size)
    assert_close(cross_entropy_backward(1.0, saved), [[0, 0], [0.5, -0.5]], 1e-7)


@given(logits_and_targets())
def test_gradient_of_each_row_sums_to_zero(drawn):
    _, saved = cross_entropy(*drawn)
    dlogits = cross_entropy_backward(1.0, saved)
    assert_close(dlogits.sum(axis=1), np.zeros(len(dlogits)), 1e-14, floor=1.0)
