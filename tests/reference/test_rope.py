"""Rotary positions."""

import math

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.reference import rope, rope_backward, rope_table

even = st.integers(1, 5).map(lambda half: 2 * half)
thetas = st.sampled_from([100.0, 1e4, 1e6])


@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), even, thetas, rngs)
def test_backward_equals_finite_differences(B, T, H, K, theta, rng):
    def rotated(x):
        return rope(x, rope_table(np.arange(T), K, theta, x.dtype))

    check_component(rotated, rope_backward, [rng.standard_normal((B, T, H, K))], rng)


@given(st.lists(st.integers(0, 32768), min_size=1, max_size=5), even, thetas, rngs)
def test_norms_are_preserved_and_the_backward_turns_back(positions, K, theta, rng):
    x = rng.standard_normal((2, len(positions), 3, K))
    y, saved = rope(x, rope_table(np.array(positions), K, theta, np.float64))
    assert_close(np.linalg.norm(y, axis=3), np.linalg.norm(x, axis=3), 1e-14)
    assert_close(rope_backward(y, saved), x, 1e-14)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 30000), even, thetas, rngs)
def test_dot_product_depends_on_the_distance_only(s, t, shift, K, theta, rng):
    q, k = rng.standard_normal((2, K))

    def score(s, t):
        turned, _ = rope(np.stack([q, k])[None, :, None], rope_table(np.array([s, t]), K, theta, np.float64))
        return turned[0, 0, 0] @ turned[0, 1, 0]

    assert_close(score(s + shift, t + shift), score(s, t), 1e-9, floor=1.0)


def test_neighbours_are_turned_by_their_angle_by_hand():
    x = np.array([1.0, 2.0, 10.0, 20.0]).reshape(1, 1, 1, 4)  # pairs (1, 2) and (10, 20)
    y, _ = rope(x, rope_table(np.array([3]), 4, 1e4, np.float64))  # turned by 3 and by 3 · 1e4^(−1/2) = 0.03
    c, s, slow_c, slow_s = math.cos(3), math.sin(3), math.cos(0.03), math.sin(0.03)
    by_hand = [c - 2 * s, 2 * c + s, 10 * slow_c - 20 * slow_s, 20 * slow_c + 10 * slow_s]
    assert_close(y.ravel(), by_hand, 1e-15)


def test_position_zero_is_not_turned():
    x = np.random.default_rng(0).standard_normal((1, 1, 2, 6))
    np.testing.assert_array_equal(rope(x, rope_table(np.array([0]), 6, 1e6, np.float64))[0], x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_table_is_exact_to_its_last_digits_at_position_32768(dtype):
    K, theta, position = 128, 1e6, 32768
    angles = position * np.longdouble(theta) ** (-np.arange(0, K, 2, dtype=np.longdouble) / K)
    table = rope_table(np.array([position]), K, theta, np.dtype(dtype))
    assert table.shape == (1, K // 2)
    assert table.dtype == {"float32": "complex64", "float64": "complex128"}[dtype]
    tol = {"float32": 2.0**-24, "float64": 1e-11}[dtype]
    assert np.abs(table.real - np.cos(angles)).max() <= tol
    assert np.abs(table.imag - np.sin(angles)).max() <= tol
