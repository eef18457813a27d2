"""Attention on the device; see `tinymoe.reference.attention`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device
from tinymoe.errors import InputError

TILE, ROWS, THREADS, PAD = 32, 8, 128, 4  # rows of a tile and of a warp; threads of a block; floats between rows
DELTA_ROWS = 4  # rows of a block of attention_delta
MOST_SPLITS, LEAST_KEYS = 64, 64  # of attention_cached: splits of the keys, and keys of a split
HEADS = (32, 64, 128, 256)  # head_dim is rounded up to one of these
KERNELS = device.Kernels(
    "attention.cu",
    *(f"attention_forward<{{T}}, {head}>" for head in HEADS),
    "attention_delta<{T}>",
    *(f"attention_backward_queries<{{T}}, {head}>" for head in HEADS),
    *(f"attention_backward_keys<{{T}}, {head}>" for head in HEADS),
    *(f"attention_decode_split<{{T}}, {head}>" for head in HEADS),
    "attention_decode_merge<{T}>",
)


class AttentionSaved(NamedTuple):
    """What the backward of `attention` needs: O(T) memory."""

    q: Any  # (B, T, H, K)
    k: Any  # (B, S, G, K)
    v: Any  # (B, S, G, K)
    o: Any  # (B, T, H, K)
    log_sum: Any  # (B, T, H) float32: log Σ exp(score)
    window: int | None


def attention(q: Any, k: Any, v: Any, window: int | None = None) -> tuple[Any, AttentionSaved]:
    """Compute o[t] = Σ_s softmax_s(q[t] · k[s] / √K) v[s] over the keys s that t may see: (B, T, H, K)."""
    (B, T, H, _), o = q.shape, device.empty(q.shape, q.dtype)
    log_sum = device.empty((B, T, H), np.float32)
    KERNELS.launch(
        f"attention_forward<{_instance(q)}>",
        *(-(-T // TILE) * H * B, THREADS, q, k, v, o, log_sum, *_sizes(q, k, window)),
        shared=_shared(q, tile_rows=3 * TILE, weights=TILE),
    )
    return o, AttentionSaved(q, k, v, o, log_sum, window)


def attention_backward(do: Any, saved: AttentionSaved) -> tuple[Any, Any, Any]:
    """Return dq (B, T, H, K), dk and dv (B, S, G, K)."""
    q, k, v, o, log_sum, window = saved
    (B, T, H, K), (_, S, G, _) = q.shape, k.shape
    dq, dk, dv = (device.empty(x.shape, x.dtype) for x in (q, k, v))
    delta = device.empty((B, T, H), np.float32)
    rows, sizes = B * T * H, _sizes(q, k, window)
    KERNELS.launch(
        f"attention_delta<{device.ctype(q)}>", -(-rows // DELTA_ROWS), 32 * DELTA_ROWS, do, o, delta, rows, K
    )
    KERNELS.launch(
        f"attention_backward_queries<{_instance(q)}>",
        *(-(-T // TILE) * H * B, THREADS, q, k, v, do, log_sum, delta, dq, *sizes),
        shared=_shared(q, tile_rows=4 * TILE, weights=TILE),
    )
    KERNELS.launch(
        f"attention_backward_keys<{_instance(q)}>",
        *(-(-S // TILE) * G * B, THREADS, q, k, v, do, log_sum, delta, dk, dv, *sizes),
        shared=_shared(q, tile_rows=4 * TILE, weights=2 * TILE),
    )
    return dq, dk, dv


def attention_decode(q: Any, k: Any, v: Any) -> Any:
    """Compute `attention` of one query (B, 1, H, K) over all keys of a cache (B, S, G, K): (B, 1, H, K)."""
    return attention_cached(q, k, v, None, None)


def attention_cached(q: Any, keys: Any, values: Any, positions: Any, slots: Any) -> Any:
    """Compute `attention_decode` over as much of each sequence's cache as its text has filled.

    How much that is the device reads from its own memory, so that a recorded launch serves every position. The grid is
    that of full caches; blocks beyond a text's end have nothing to do. The splits depend on the number of a sequence's
    keys alone, so that it gives the same bits in every batch and in a cache of any capacity.

    Parameters
    ----------
    q
        (B, 1, H, K).
    keys, values
        (B, S, G, K).
    positions
        (B,) int32, of the queries; None: all S keys are seen.
    slots
        (B,) int32, up to S, how many a cache uses: of those the first min(position + 1, slots) are filled.

    Returns
    -------
    o
        (B, 1, H, K).
    """
    (B, _, H, K), (_, S, G, _) = q.shape, keys.shape
    splits, octets = min(MOST_SPLITS, -(-S // LEAST_KEYS)), -(-(H // G) // ROWS)
    highest, total = (device.empty((B, H, splits), np.float32) for _ in range(2))
    out, o = device.empty((B, H, splits, K), np.float32), device.empty(q.shape, q.dtype)
    KERNELS.launch(
        f"attention_decode_split<{_instance(q)}>",
        *(splits * octets * G * B, 32, q, keys, values, positions, slots, highest, total, out, S, H, G, K, splits),
        shared=_shared(q, tile_rows=ROWS + 2 * TILE, weights=ROWS),
    )
    KERNELS.launch(
        f"attention_decode_merge<{device.ctype(q)}>",
        *(B * H, 128, highest, total, out, positions, slots, o, S, H, K, splits),
    )
    return o


def _sizes(q: Any, k: Any, window: int | None) -> tuple[int, ...]:
    """Return what the kernels call queries, keys, heads, groups, K and window."""
    (_, T, H, K), (_, S, G, _) = q.shape, k.shape
    return T, S, H, G, K, S if window is None else min(window, S)


def _instance(q: Any) -> str:
    return f"{device.ctype(q)}, {_head(q)}"


def _head(q: Any) -> int:
    for head in HEADS:
        if q.shape[3] <= head:
            return head
    raise InputError(f"attention on the device takes a head_dim up to {HEADS[-1]}; got {q.shape[3]}")


def _shared(q: Any, tile_rows: int, weights: int) -> int:
    """Return the bytes of shared memory: rows of K, and rows of a tile's weights."""
    return 4 * (tile_rows * (_head(q) + PAD) + weights * TILE)
