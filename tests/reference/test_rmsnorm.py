"""RMSNorm: rows of root mean square one."""

import numpy as np
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.reference import rmsnorm, rmsnorm_backward


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.01, 0.1, 1.0]), rngs)
def test_backward_equals_finite_differences(N, D, eps, rng):
    arrays = [rng.standard_normal((N, D)), rng.standard_normal(D)]
    check_component(lambda x, weight: rmsnorm(x, weight, eps), rmsnorm_backward, arrays, rng)


def test_norm_by_hand():
    y, _ = rmsnorm(np.array([[3.0, 4.0]]), np.array([1.0, -2.0]), 0.0)  # mean square 12.5
    assert_close(y, [[3 / 12.5**0.5, -8 / 12.5**0.5]], 1e-15)


def test_eps_is_added_to_the_mean_square_under_the_root():
    y, _ = rmsnorm(np.array([[1.0, 1.0]]), np.ones(2), 3.0)
    assert_close(y, [[0.5, 0.5]], 1e-15)


@given(st.integers(1, 9), rngs)
def test_length_of_a_row_does_not_matter_and_gets_no_gradient(D, rng):
    x, weight = rng.standard_normal((3, D)) + 0.1, rng.standard_normal(D)
    y, saved = rmsnorm(x, weight, 1e-30)
    assert_close(rmsnorm(1000 * x, weight, 1e-30)[0], y, 1e-12)
    dx, _ = rmsnorm_backward(rng.standard_normal((3, D)), saved)
    assert_close(np.vecdot(dx, x), np.zeros(3), 1e-9, floor=np.linalg.norm(dx) * np.linalg.norm(x) + 1)


def test_row_of_zeros_stays_zero_and_its_gradient_finite():
    y, saved = rmsnorm(np.zeros((1, 3)), np.full(3, 2.0), 1e-4)
    dx, dweight = rmsnorm_backward(np.ones((1, 3)), saved)
    assert not y.any()
    assert not dweight.any()
    assert_close(dx, np.full((1, 3), 200.0), 1e-12)  # dy · weight / √eps
