"""Attention on the device equals the reference's."""

import importlib
from unittest import mock

import numpy as np
import pytest
from emulation import EVERYWHERE, Order, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.attention import attention, attention_backward, attention_cached, attention_decode
from tinymoe.errors import InputError

module = importlib.import_module("tinymoe.cuda.attention")  # as an attribute of the package it is the function
IN_ORDER = Order("forward", 0, 0)
BF16 = device.BFLOAT16
head_dims = st.sampled_from([2, 5, 10, 34])


def make_inputs(rng, B, T, past, groups, repeats, K):
    """Return q, k, v and do; scores of standard deviation 2 make some weights large and some small."""
    q_shape, k_shape = (B, T, groups * repeats, K), (B, past + T, groups, K)
    return [2 * rng.standard_normal(q_shape), *rng.standard_normal((2, *k_shape)), rng.standard_normal(q_shape)]


@st.composite
def inputs(draw):
    """Draw the arrays, of up to two tiles of queries and three of keys, and a window."""
    T, past = draw(st.integers(1, 45)), draw(st.integers(0, 35))
    B, groups, repeats = draw(st.sampled_from([(1, 1, 1), (1, 1, 3), (1, 2, 2), (2, 1, 2), (2, 2, 1)]))
    arrays = make_inputs(draw(rngs), B, T, past, groups, repeats, draw(head_dims))
    return arrays, draw(st.none() | st.integers(1, past + T + 2) | st.integers(1, 5))


def check(arrays, window, dtype):
    (q, k, v, do), (q64, k64, v64, do64) = on_device(*arrays, dtype=dtype)
    o, saved = attention(q, k, v, window)
    grads = attention_backward(do, saved)
    expected, expected_saved = reference.attention(q64, k64, v64, window)
    assert o.dtype == dtype
    assert_equivalent(o, expected)
    # dq and dk are differences dP − δ, small where one key has all the weight: as exact as they are with δ = 0.
    without_delta = reference.attention_backward(do64, expected_saved._replace(o=0 * expected))
    for grad, x, of in zip(grads, reference.attention_backward(do64, expected_saved), without_delta, strict=True):
        assert grad.dtype == dtype
        assert_equivalent(grad, x, floor=np.linalg.norm(of))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(inputs(), dtypes, orders)
def test_equals_the_reference(where, drawn, dtype, order):
    with running(where, order):
        check(*drawn, dtype)


@pytest.mark.parametrize("where", EVERYWHERE[1:])
@given(inputs(), dtypes, orders)
def test_same_input_gives_the_same_bits_in_any_order(where, drawn, dtype, order):
    arrays, window = drawn
    results = []
    for run in (IN_ORDER, order):
        with running(where, run):
            (q, k, v, do), _ = on_device(*arrays, dtype=dtype)
            o, saved = attention(q, k, v, window)
            decoded = attention_decode(q[:1, :1], k[:1], v[:1])
            results.append((o, *attention_backward(do, saved), decoded))
    assert_same_bits(*results)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(
    ("K", "dtype"), [(32, BF16), (64, "float32"), (66, "float32"), (128, BF16), (130, BF16), (256, "float32")]
)
def test_long_head_equals_the_reference(where, K, dtype):
    rng = np.random.default_rng(K)
    with running(where, IN_ORDER):
        check(make_inputs(rng, 1, 5, 30, 1, 2, K), 33, np.dtype(dtype))
        check_decode(*make_inputs(rng, 1, 1, 64, 1, 2, K)[:3], np.dtype(dtype))  # a split of 64 keys and one of 1


@pytest.mark.parametrize("where", EVERYWHERE)
def test_tile_of_one_row_counts(where):
    with running(where, IN_ORDER):
        check(make_inputs(np.random.default_rng(0), 2, 33, 0, 1, 2, 5), None, np.dtype("float32"))


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("window", [None, 1, 2, 31, 32, 33, 34, 70])
def test_token_sees_itself_and_what_came_before_within_the_window_only(where, window):
    T, past = 34, 35
    with running(where, IN_ORDER):
        (q, k, v, _), _ = on_device(*make_inputs(np.random.default_rng(0), 1, T, past, 1, 1, 2), dtype=np.float32)
        base = device.host(attention(q, k, v, window)[0])
        for s in (0, 1, 2, 30, 34, 35, 36, 66, 67, 68):
            other = device.host(v).copy()
            other[:, s] += 100
            changed = (device.host(attention(q, k, device.array(other), window)[0]) != base).any(axis=(0, 2, 3))
            sees = [0 <= past + t - s < (window or past + T) for t in range(T)]
            assert changed.tolist() == sees


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 40), dtypes, orders, rngs)
def test_window_of_one_returns_the_own_value(where, T, dtype, order, rng):
    with running(where, order):
        (q, k, v, _), _ = on_device(*make_inputs(rng, 2, T, 0, 2, 1, 4), dtype=dtype)
        assert_same_bits([attention(q, k, v, 1)[0]], [v])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(dtypes, orders, rngs)
def test_key_that_no_query_sees_gets_exactly_zero_gradient(where, dtype, order, rng):
    with running(where, order):
        (q, k, v, do), _ = on_device(*make_inputs(rng, 1, 2, 40, 1, 1, 4), dtype=dtype)
        _, dk, dv = (device.host(grad) for grad in attention_backward(do, attention(q, k, v, 5)[1]))
        assert not dk[:, :36].any()
        assert not dv[:, :36].any()
        assert dk[:, 36:].any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("window", [None, 5])
def test_huge_scores_do_not_overflow(where, window):
    q, k, v, do = make_inputs(np.random.default_rng(0), 1, 40, 30, 1, 2, 4)
    with running(where, IN_ORDER):
        (q, k, v, do, last), _ = on_device(1e12 * q, 1e12 * k, v, do, 1e12 * q[:, -1:], dtype=np.float32)
        o, saved = attention(q, k, v, window)
        highest = np.abs(device.host(v)).max() * (1 + 1e-6)
        assert np.abs(device.host(o)).max() <= highest
        assert np.abs(device.host(attention_decode(last, k, v))).max() <= highest
        assert all(np.isfinite(device.host(grad)).all() for grad in attention_backward(do, saved))


def check_decode(q, k, v, dtype):
    (q, k, v), (q64, k64, v64) = on_device(q, k, v, dtype=dtype)
    o = attention_decode(q, k, v)
    assert o.dtype == q.dtype
    assert_equivalent(o, reference.attention_decode(q64, k64, v64))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(
    *(st.integers(1, 2), st.integers(1, 300), st.integers(1, 2), st.integers(1, 10), head_dims),
    *(st.sampled_from([1, 2, 64]), dtypes, orders, rngs),
)
def test_decoding_equals_the_reference(where, B, S, G, R, K, most_splits, dtype, order, rng):
    with running(where, order), mock.patch.object(module, "MOST_SPLITS", most_splits):
        q, k, v, _ = make_inputs(rng, B, 1, S - 1, G, R, K)
        check_decode(q, k, v, dtype)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 200), dtypes, orders, rngs)
def test_decoding_a_sequence_gives_the_same_bits_alone_and_in_a_batch(where, S, dtype, order, rng):
    with running(where, order):
        (q, k, v, _), _ = on_device(*make_inputs(rng, 3, 1, S - 1, 1, 2, 4), dtype=dtype)
        alone = [
            device.host(attention_decode(q[b : b + 1].copy(), *(device.array(x[b : b + 1].copy()) for x in (k, v))))
            for b in range(3)
        ]
        assert_same_bits([attention_decode(q, k, v)], [np.concatenate(alone)])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 300)), min_size=1, max_size=3),  # slots and position of each
    *(st.integers(0, 90), st.integers(1, 2), st.integers(1, 9), st.sampled_from([1, 2, 64]), dtypes, orders, rngs),
)
def test_a_cache_is_seen_as_far_as_it_is_filled(where, caches, spare, G, R, most_splits, dtype, order, rng):
    slots, positions = np.array(caches, np.int32).T
    B, S, seen = len(slots), slots.max() + spare, np.minimum(positions + 1, slots)
    with running(where, order), mock.patch.object(module, "MOST_SPLITS", most_splits):
        arrays = make_inputs(rng, B, 1, S - 1, G, R, 4)[:3]
        for array in arrays[1:]:
            for b in range(B):
                array[b, seen[b] :] = np.nan  # what nobody may read
        (q, k, v), (q64, k64, v64) = on_device(*arrays, dtype=dtype)
        o = device.host(attention_cached(q, k, v, device.array(positions), device.array(slots)))
        for b in range(B):
            own, filled = slice(b, b + 1), slice(seen[b])
            expected = reference.attention_decode(q64[own], k64[own, filled], v64[own, filled])
            assert_equivalent(o[own], expected)
            alone = [device.array(device.host(x).copy()) for x in (q[own], k[own, filled], v[own, filled])]
            assert_same_bits([attention_decode(*alone)], [o[own]])  # in splits of the keys, not of the capacity


def test_head_beyond_256_is_refused():
    q, k, v, _ = make_inputs(np.random.default_rng(0), 1, 1, 0, 1, 1, 258)
    (q, k, v), _ = on_device(q, k, v, dtype=np.float32)
    with pytest.raises(InputError, match="up to 256; got 258"):
        attention(q, k, v)
