"""The embedding: rows out, and the sum of each row's gradients back."""

import numpy as np
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.reference import embedding, embedding_backward


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(1, 5), rngs)
def test_backward_equals_finite_differences_and_add_at(tokens, D, rng):
    tokens, weight = np.array(tokens), rng.standard_normal((7, D))
    check_component(lambda w: embedding(tokens, w), embedding_backward, [weight], rng)
    dy, expected = rng.standard_normal((len(tokens), D)), np.zeros((7, D))
    np.add.at(expected, tokens, dy)
    assert_close(embedding_backward(dy, embedding(tokens, weight)[1]), expected, 1e-14)


def test_no_update_of_a_repeated_token_is_lost():
    _, saved = embedding(np.full(1000, 2), np.zeros((4, 1)))
    np.testing.assert_array_equal(embedding_backward(np.ones((1000, 1)), saved)[:, 0], [0, 0, 1000, 0])


def test_token_that_does_not_occur_gets_exactly_zero_gradient():
    _, saved = embedding(np.array([0, 3, 0]), np.ones((5, 2)))
    dweight = embedding_backward(np.ones((3, 2)), saved)
    assert not dweight[[1, 2, 4]].any()
    assert dweight[[0, 3]].all()


def test_rows_are_copies():
    weight = np.ones((2, 3))
    y, _ = embedding(np.array([0, 1]), weight)
    y += 1
    assert (weight == 1).all()
