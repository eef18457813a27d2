"""Attention: the tiled online softmax against the plain formula, its backward, its mask and its memory."""

import importlib
import math
import tracemalloc
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.reference import attention, attention_backward, attention_decode, attention_plain

module = importlib.import_module("tinymoe.reference.attention")  # as an attribute of the package it is the function
OWN = {name: getattr(module, name) for name in ("QUERY_BLOCK", "KEY_TILE", "KEEP_WEIGHTS")}
SMALL = dict(QUERY_BLOCK=2, KEY_TILE=3, KEEP_WEIGHTS=0)


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    window: int | None


def make_inputs(rng, B, T, past, groups, repeats, K, window):
    kv_shape = (B, past + T, groups, K)
    q = rng.standard_normal((B, T, groups * repeats, K))
    return Inputs(q, rng.standard_normal(kv_shape), rng.standard_normal(kv_shape), window)


@st.composite
def inputs(draw):
    B, T, past = draw(st.integers(1, 2)), draw(st.integers(1, 11)), draw(st.integers(0, 7))
    groups, repeats, K = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    window = draw(st.none() | st.integers(1, past + T + 2))
    return make_inputs(draw(rngs), B, T, past, groups, repeats, K, window)


@st.composite
def tilings(draw):
    """Draw the constants so small that small sizes cross them, or the library's own."""
    block = draw(st.integers(0, 5))
    if block == 0:
        return OWN
    tile = block + draw(st.integers(0, 4))  # at least a block, as the library's own
    return dict(QUERY_BLOCK=block, KEY_TILE=tile, KEEP_WEIGHTS=draw(st.sampled_from([0, tile])))


def tiled(tiling):
    return mock.patch.multiple(module, **tiling)


@given(inputs(), tilings())
def test_tiled_equals_plain(drawn, tiling):
    with tiled(tiling):
        o, _ = attention(*drawn)
    assert_close(o, attention_plain(*drawn), 1e-13)


@given(inputs(), tilings(), rngs)
def test_backward_equals_finite_differences(drawn, tiling, rng):
    with tiled(tiling):
        check_component(lambda q, k, v: attention(q, k, v, drawn.window), attention_backward, drawn[:3], rng)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("T", "past"), [(130, 0), (70, 65), (1, 20)])
def test_kept_and_recomputed_probabilities_give_the_same_gradients(T, past, window):
    rng = np.random.default_rng(0)
    drawn = make_inputs(rng, 2, T, past, 2, 2, 6, window)
    do, grads = rng.standard_normal(drawn.q.shape), []
    for keep in (512, 0):
        with tiled(OWN | dict(KEEP_WEIGHTS=keep)):
            _, saved = attention(*drawn)
        assert (saved.weights is not None) == (keep > 0)
        grads.append(attention_backward(do, saved))
    for kept, recomputed in zip(*grads):
        assert_close(recomputed, kept, 1e-13)


@pytest.mark.parametrize("compute", [lambda *a: attention(*a)[0], attention_plain], ids=["tiled", "plain"])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 8, 9, 20])
@pytest.mark.parametrize("tiling", [OWN, SMALL], ids=["own", "small"])
def test_token_sees_itself_and_what_came_before_within_the_window_only(compute, window, tiling):
    T, past = 9, 3
    q, k, v, _ = make_inputs(np.random.default_rng(0), 1, T, past, 1, 1, 4, None)
    with tiled(tiling):
        base = compute(q, k, v, window)
        for s in range(past + T):
            other_k, other_v = k.copy(), v.copy()
            other_k[:, s] += 1
            other_v[:, s] += 1
            changed = (compute(q, other_k, other_v, window) != base).any(axis=(0, 2, 3))
            sees = [0 <= past + t - s < (window or past + T) for t in range(T)]
            assert changed.tolist() == sees


def test_window_of_one_returns_the_own_value():
    q, k, v, _ = make_inputs(np.random.default_rng(0), 2, 7, 0, 2, 1, 3, None)
    np.testing.assert_array_equal(attention(q, k, v, 1)[0], v)


def test_scores_are_divided_by_the_root_of_head_dim_by_hand():
    q, k = np.zeros((1, 1, 2, 16)), np.zeros((1, 2, 1, 16))  # two heads of 16, so that dim is 32
    q[..., 0], k[0, 1, 0, 0] = 1.0, 4 * math.log(3)  # scores 0 and 4 ln 3 / √16 = ln 3
    v = np.zeros((1, 2, 1, 16))
    v[0, 1] = 1
    assert_close(attention(q, k, v)[0], np.full(q.shape, 0.75), 1e-14)


@given(inputs())
def test_each_key_value_head_serves_its_query_heads_in_order(drawn):
    q, k, v, window = drawn
    repeats = q.shape[2] // k.shape[2]
    alone = attention(q, np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2), window)[0]
    assert_close(attention(*drawn)[0], alone, 1e-13)


@given(inputs(), tilings())
def test_last_queries_alone_equal_the_end_of_all(drawn, tiling):
    q, k, v, window = drawn
    last = q.shape[1] // 2
    with tiled(tiling):
        assert_close(attention(q[:, last:], k, v, window)[0], attention(*drawn)[0][:, last:], 1e-13)


@given(inputs(), rngs)
def test_decoding_one_query_equals_attention_to_all_keys_in_any_order(drawn, rng):
    q, k, v, _ = drawn
    order = rng.permutation(k.shape[1])
    expected, _ = attention(q[:, -1:], k, v)
    for dtype, tol in (("float64", 1e-13), ("float32", 1e-5)):
        o = attention_decode(*(a.astype(dtype) for a in (q[:, -1:], k[:, order], v[:, order])))
        assert o.dtype == dtype
        assert_close(o, expected, tol, floor=1.0)


@given(inputs(), tilings())
def test_huge_scores_do_not_overflow(drawn, tiling):
    q, k, v, window = drawn
    with tiled(tiling):
        o, saved = attention(1e20 * q, 1e20 * k, v, window)
        grads = attention_backward(np.ones_like(o), saved)
    assert np.isfinite(o).all()
    assert np.abs(o).max() <= np.abs(v).max() + 1e-12
    assert all(np.isfinite(grad).all() for grad in grads)


def test_memory_grows_linearly_with_the_sequence():
    peaks = []
    for T in (4096, 8192):
        x = np.random.default_rng(0).standard_normal((1, T, 1, 4), np.float32)
        tracemalloc.start()
        o, saved = attention(x, x, x)
        attention_backward(o, saved)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.1 * peaks[0]
    assert peaks[1] < 8192 * 8192 * 4 / 50
