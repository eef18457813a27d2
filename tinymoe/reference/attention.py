"""Causal attention with grouped queries and a sliding window, block by block with an online softmax."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tinymoe.reference.softmax import softmax

Array = np.ndarray

QUERY_BLOCK = 128  # queries in a block: long enough for the matrix products, short enough to skip most hidden keys
KEY_TILE = 1024  # keys in a tile, at least QUERY_BLOCK so that each query sees some key of its first tile
KEEP_WEIGHTS = 512  # up to this many keys the weights are kept for the backward: 15 % faster than recomputing


class AttentionSaved(NamedTuple):
    """What the backward of `attention` needs: O(T) memory, but for the weights of short sequences."""

    q: Array  # (B, T, H, K)
    k: Array  # (B, S, G, K)
    v: Array  # (B, S, G, K)
    o: Array  # (B, T, H, K)
    highest: Array  # (B, G, R, T, 1) the largest score
    total: Array  # (B, G, R, T, 1) Σ exp(score − highest)
    window: int | None
    weights: list[Array] | None  # exp(score − highest) of each tile, in the order of _tiles


def attention(q: Array, k: Array, v: Array, window: int | None = None) -> tuple[Array, AttentionSaved]:
    """Compute o[t] = Σ_s softmax_s(q[t] · k[s] / √K) v[s] over the keys s that t may see.

    The queries are the last T of the S positions. A query sees itself and what came before: all of it, or with a
    window of W itself and the W − 1 positions before.

    Queries are taken in blocks and keys in tiles; a tile that no query of the block sees is skipped. Over the tiles
    runs an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867): a new maximum rescales what was summed so
    far. No (T, S) array exists, so memory is O(T) (Dao et al. 2022, FlashAttention, arXiv 2205.14135).

    Parameters
    ----------
    q
        (B, T, H, K), rotated.
    k, v
        (B, S, G, K), S ≥ T; key/value head g serves the R = H/G query heads g·R … g·R + R − 1.
    window
        W, or None.

    Returns
    -------
    o
        (B, T, H, K).
    saved
        For `attention_backward`.
    """
    T, S, groups = q.shape[1], k.shape[1], k.shape[2]
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # (B, G, K, S), (B, G, S, K)
    queries = _by_group(q, groups)  # (B, G, R, T, K)
    o = np.empty(q.shape, q.dtype)
    outputs = _by_group(o, groups)
    highests, totals = (np.empty((*queries.shape[:4], 1), q.dtype) for _ in range(2))
    weights: list[Array] | None = [] if S <= KEEP_WEIGHTS else None
    for rows, tiles in _tiles(T, S, window):
        q_block = _fold(queries, rows, q.shape[3] ** -0.5)  # (B, G, R·n, K)
        highest: Any = None
        total: Any = None
        out: Any = None
        for cols in tiles:
            scores = q_block @ keys[..., cols]  # (B, G, R·n, m)
            _hide(scores, rows, cols, S - T, window)
            before = highest
            highest = scores.max(axis=-1, keepdims=True)  # (B, G, R·n, 1)
            if before is not None:
                np.maximum(before, highest, out=highest)
            scores -= highest
            np.exp(scores, out=scores)
            if before is None:
                total = scores.sum(axis=-1, keepdims=True)
                out = scores @ values[:, :, cols]  # (B, G, R·n, K)
            else:
                rescale = np.exp(before - highest)
                total = total * rescale + scores.sum(axis=-1, keepdims=True)
                out = out * rescale + scores @ values[:, :, cols]
        outputs[:, :, :, rows] = _unfold(out / total, queries)
        highests[:, :, :, rows], totals[:, :, :, rows] = _unfold(highest, queries), _unfold(total, queries)
        if weights is not None:  # so few keys are one tile, and its maximum is final
            weights.append(scores)
    return o, AttentionSaved(q, k, v, o, highests, totals, window, weights)


def attention_backward(do: Array, saved: AttentionSaved) -> tuple[Array, Array, Array]:
    """Return dq (B, T, H, K), dk and dv (B, S, G, K).

    With P the probabilities and dP = do vᵀ: dv = Pᵀ do, and the scores' gradient is dS = P ⊙ (dP − δ) with
    δ = Σ_s P dP = do · o, which needs no second pass over the keys. Then dq = dS k / √K and dk = dSᵀ q / √K.
    P is weights / total; dividing do and δ by total instead is the same, and they are smaller.
    """
    q, k, v, o, highests, totals, window, weights = saved
    T, S, groups = q.shape[1], k.shape[1], k.shape[2]
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, G, S, K)
    dq, dk, dv = np.empty(q.shape, q.dtype), np.zeros(k.shape, k.dtype), np.zeros(v.shape, v.dtype)
    dkeys, dvalues = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    queries, dqueries, doutputs = _by_group(q, groups), _by_group(dq, groups), _by_group(do, groups)
    deltas = _by_group(np.vecdot(do, o)[..., None], groups)  # (B, G, R, T, 1)
    scale = q.shape[3] ** -0.5
    kept = iter(weights) if weights is not None else None
    for rows, tiles in _tiles(T, S, window):
        q_block, do_block = _fold(queries, rows, scale), _fold(doutputs, rows)  # (B, G, R·n, K)
        delta, highest, total = _fold(deltas, rows), _fold(highests, rows), _fold(totals, rows)  # (B, G, R·n, 1)
        do_block /= total
        delta /= total
        dq_block = np.zeros_like(q_block)
        for cols in tiles:
            if kept is not None:
                w = next(kept)
            else:
                w = q_block @ keys[:, :, cols].swapaxes(2, 3)  # (B, G, R·n, m)
                _hide(w, rows, cols, S - T, window)
                w -= highest
                np.exp(w, out=w)
            dvalues[:, :, cols] += w.swapaxes(2, 3) @ do_block
            ds = do_block @ values[:, :, cols].swapaxes(2, 3)
            ds -= delta
            ds *= w
            dq_block += ds @ keys[:, :, cols]
            dkeys[:, :, cols] += ds.swapaxes(2, 3) @ q_block
        dq_block *= scale
        dqueries[:, :, :, rows] = _unfold(dq_block, queries)
    return dq, dk, dv


def attention_decode(q: Array, k: Array, v: Array) -> Array:
    """Compute `attention` of one query over the keys of a cache: it sees them all, so there is nothing to hide.

    Parameters
    ----------
    q
        (B, 1, H, K).
    k, v
        (B, S, G, K), those that the query sees, in any order.

    Returns
    -------
    o
        (B, 1, H, K).
    """
    B, _, H, K = q.shape
    queries = q.reshape(B, k.shape[2], -1, K) * K**-0.5  # (B, G, R, K)
    probs = softmax(queries @ k.transpose(0, 2, 3, 1))  # (B, G, R, S)
    return (probs @ v.transpose(0, 2, 1, 3)).reshape(B, 1, H, K)


def attention_plain(q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """Compute what `attention` computes with the whole (T, S) matrix: the formula, and the tests' oracle."""
    T, S, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2)  # (B, S, H, K)
    scores = np.moveaxis(q, 1, 2) @ k.transpose(0, 2, 3, 1) / np.sqrt(q.shape[3])  # (B, H, T, S)
    back = np.arange(S - T, S)[:, None] - np.arange(S)  # (T, S) how far back the key lies
    scores = np.where((back >= 0) & (back < (window or S)), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.moveaxis(probs / probs.sum(axis=-1, keepdims=True) @ np.moveaxis(v, 1, 2), 1, 2)


def _tiles(T: int, S: int, window: int | None) -> Iterator[tuple[slice, list[slice]]]:
    """Yield each block of queries with the tiles of keys that some query in it sees."""
    past = S - T
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        first = 0 if window is None else max(0, past + start - window + 1)
        last = past + end
        yield slice(start, end), [slice(c, min(c + KEY_TILE, last)) for c in range(first, last, KEY_TILE)]


def _hide(scores: Array, rows: slice, cols: slice, past: int, window: int | None) -> None:
    """Set the scores (…, R·n, m) of keys that a query does not see to −∞, touching only the columns that hold some."""
    n = rows.stop - rows.start
    scores = scores.reshape(*scores.shape[:2], -1, n, scores.shape[3])  # (B, G, R, n, m)
    first_query, last_query = past + rows.start, past + rows.stop - 1
    ahead = max(first_query + 1, cols.start)  # from this key on, some query looks ahead
    if ahead < cols.stop:
        hidden = np.arange(ahead, cols.stop) > np.arange(first_query, last_query + 1)[:, None]
        scores[..., ahead - cols.start :] += np.where(hidden, -np.inf, 0).astype(scores.dtype)
    if window is not None and (behind := min(last_query - window + 1, cols.stop)) > cols.start:
        hidden = np.arange(cols.start, behind) <= np.arange(first_query, last_query + 1)[:, None] - window
        scores[..., : behind - cols.start] += np.where(hidden, -np.inf, 0).astype(scores.dtype)


def _by_group(x: Array, groups: int) -> Array:
    """View (B, T, H, K) as (B, G, R, T, K): the query heads that share a key/value head side by side."""
    B, T, H, K = x.shape
    return x.reshape(B, T, groups, H // groups, K).transpose(0, 2, 3, 1, 4)


def _fold(x: Array, rows: slice, scale: float = 1.0) -> Array:
    """Copy a block of (B, G, R, T, K) as (B, G, R·n, K): one matrix product serves all heads of the group."""
    block = np.multiply(x[:, :, :, rows], scale, order="C")
    return block.reshape(*block.shape[:2], -1, block.shape[4])


def _unfold(block: Array, queries: Array) -> Array:
    """View (B, G, R·n, ·) as (B, G, R, n, ·)."""
    return block.reshape(*queries.shape[:3], -1, block.shape[3])
