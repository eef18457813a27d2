"""Softmax over the last axis."""

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.reference import softmax


def test_softmax_by_hand():
    assert_close(softmax(np.log([[1.0, 3.0], [4.0, 1.0]])), [[0.25, 0.75], [0.8, 0.2]], 1e-15)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.floats(-1e3, 1e3), rngs)
def test_rows_sum_to_one_and_a_shift_changes_nothing(shape, shift, rng):
    logits = rng.standard_normal(shape)
    probs = softmax(logits)
    assert_close(probs.sum(axis=-1), np.ones(shape[:-1]), 1e-15)
    assert_close(softmax(logits + shift), probs, 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_logits_do_not_overflow_and_stay_as_they_are(dtype):
    logits = np.array([[1e30, -1e30, 1e30], [0, -1e4, -np.inf]], dtype)
    given = logits.copy()
    probs = softmax(logits)
    assert probs.dtype == dtype
    np.testing.assert_array_equal(probs, [[0.5, 0, 0.5], [1, 0, 0]])
    np.testing.assert_array_equal(logits, given)
