"""The KV cache: what a sequence's next tokens may see, in bounded memory."""

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import given
from hypothesis import strategies as st

from tinymoe import MixtralConfig
from tinymoe.cache import KVCache
from tinymoe.reference import attention

LAYERS, HEADS, HEAD_DIM = 2, 2, 4


def make_config(window=None):
    return MixtralConfig.tiny(n_layers=LAYERS, n_heads=4, n_kv_heads=HEADS, head_dim=HEAD_DIM, sliding_window=window)


def rows(positions, sign=1):
    """Return keys or values (1, T, G, K) that carry their position."""
    return sign * np.broadcast_to(np.array(positions, float)[None, :, None, None], (1, len(positions), HEADS, HEAD_DIM))


windows = st.none() | st.integers(1, 9)
chunks = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(windows, chunks)
def test_update_returns_what_the_new_positions_may_see(window, lengths):
    cache = KVCache(make_config(window), sum(lengths), "float64")
    for new in lengths:
        start, end = cache.length, cache.length + new
        for layer in range(LAYERS):
            sign = layer + 1
            keys, values = cache.update(layer, rows(range(start, end), sign), rows(range(start, end), -sign))
            np.testing.assert_array_equal(keys, -values)
            assert (keys == keys[:, :, :1, :1]).all()
            positions = (keys[0, :, 0, 0] / sign).astype(int).tolist()
            if new == 1:  # in any order
                assert sorted(positions) == list(range(max(0, end - (window or end)), end))
            else:
                assert positions == list(range(positions[0], end))
                assert positions[0] <= max(0, start - (window or end) + 1)
        cache.advance(new)
        assert cache.length == end


@given(windows, chunks)
def test_attention_over_the_cache_equals_attention_over_everything(window, lengths):
    T, rng = sum(lengths), np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, T, heads, HEAD_DIM)) for heads in (4, HEADS, HEADS))
    expected, _ = attention(q, k, v, window)
    cache = KVCache(make_config(window), T, "float64")
    for new in lengths:
        part = slice(cache.length, cache.length + new)
        keys, values = cache.update(0, k[:, part], v[:, part])
        assert_close(attention(q[:, part], keys, values, window)[0], expected[:, part], 1e-13)
        cache.advance(new)


@pytest.mark.parametrize(("window", "slots"), [(None, 50), (8, 8), (50, 50), (80, 50)])
def test_buffer_holds_the_window_and_no_more(window, slots):
    cache = KVCache(make_config(window), 50, "float32")
    keys, values = list(cache.keys), list(cache.values)
    assert len(keys) == len(values) == LAYERS
    for buffer in (*keys, *values):
        assert buffer.shape == (1, slots, HEADS, HEAD_DIM)
        assert buffer.dtype == np.float32
    for new in (20, 1, 29):
        for layer in range(LAYERS):
            cache.update(layer, rows(range(new)), rows(range(new)))
        cache.advance(new)
    assert all(a is b for a, b in zip((*cache.keys, *cache.values), (*keys, *values), strict=True))


@pytest.mark.parametrize("window", [None, 2])
def test_more_positions_than_the_capacity_are_refused(window):
    cache = KVCache(make_config(window), 5, "float64")
    cache.update(0, rows(range(4)), rows(range(4)))
    cache.advance(4)
    with pytest.raises(ValueError, match="holds 5 positions; 6 were asked for"):
        cache.update(0, rows([4, 5]), rows([4, 5]))
    cache.update(0, rows([4]), rows([4]))
    cache.advance(1)
    with pytest.raises(ValueError, match="holds 5 positions; 6 were asked for"):
        cache.update(0, rows([5]), rows([5]))
