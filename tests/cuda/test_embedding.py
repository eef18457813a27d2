"""The embedding on the device equals the reference's."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.embedding import embedding, embedding_backward, group_by_token


@st.composite
def texts(draw):
    """Draw tokens, few or many, and the vocabulary's size; the first id and the last one are frequent."""
    N, V, rng = draw(st.integers(1, 40) | st.integers(200, 800)), draw(st.integers(1, 40)), draw(rngs)
    tokens = rng.integers(-V // 2, V + V // 2 + 1, size=N).clip(0, V - 1)
    return tokens.astype(np.int32), V


@pytest.mark.parametrize("where", EVERYWHERE)
@given(texts(), st.integers(1, 40) | st.just(300), dtypes, orders, rngs)
def test_equals_the_reference(where, text, D, dtype, order, rng):
    (tokens, V), N = text, len(text[0])
    with running(where, order):
        (weight, dy), (weight64, dy64) = on_device(
            rng.standard_normal((V, D)), rng.standard_normal((N, D)), dtype=dtype
        )
        y, saved = embedding(device.array(tokens), weight)
        dweight = embedding_backward(dy, saved)
        expected, expected_saved = reference.embedding(tokens, weight64)
        np.testing.assert_array_equal(device.host(y).astype(np.float64), expected)
        assert_equivalent(dweight, reference.embedding_backward(dy64, expected_saved))
        assert not device.host(dweight)[np.bincount(tokens, minlength=V) == 0].any()
        assert_same_bits([embedding_backward(dy, saved)], [dweight])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 900), st.integers(1, 5000), st.sampled_from([0, 0.5, 1]), orders, rngs)
def test_tokens_are_grouped_in_the_order_of_the_text(where, N, V, repeated, order, rng):
    tokens = rng.integers(V, size=N).astype(np.int32)
    tokens[rng.random(N) < repeated] = V - 1
    with running(where, order):
        found, start = group_by_token(device.array(tokens), V)
        np.testing.assert_array_equal(device.host(found), np.argsort(tokens, kind="stable"))
        np.testing.assert_array_equal(device.host(start), np.searchsorted(np.sort(tokens), np.arange(V + 1)))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(texts(), orders, rngs)
def test_gradients_are_summed_in_the_order_of_the_text(where, text, order, rng):
    (tokens, V), dy = text, rng.standard_normal((len(text[0]), 3)).astype(np.float32)
    expected = np.zeros((V, 3), np.float32)
    np.add.at(expected, tokens, dy)
    with running(where, order):
        _, saved = embedding(device.array(tokens), device.zeros((V, 3), np.float32))
        assert_same_bits([embedding_backward(device.array(dy), saved)], [expected])


@pytest.mark.parametrize("where", EVERYWHERE)
def test_no_token_gives_no_row_and_no_gradient(where):
    with device.using(where):
        y, saved = embedding(device.empty(0, np.int32), device.array(np.ones((5, 2), np.float32)))
        assert y.shape == (0, 2)
        np.testing.assert_array_equal(device.host(embedding_backward(y, saved)), np.zeros((5, 2)))


def test_rows_are_copies():
    with device.using("emulated"):
        weight = device.array(np.ones((2, 3), np.float32))
        y, _ = embedding(device.array([0, 1], np.int32), weight)
        y += 1
        assert (weight == 1).all()
