"""The embedding on the device; see `tinymoe.reference.embedding`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device

THREADS, SLICE, COLUMNS, SCAN_THREADS = 256, 256, 128, 1024  # of the blocks; SLICE: tokens, too
KERNELS = device.Kernels(
    "embedding.cu",
    "embedding_forward<{T}>",
    "embedding_count",
    "embedding_slices",
    "embedding_starts",
    "embedding_place",
    "embedding_rows<{T}>",
)


class EmbeddingSaved(NamedTuple):
    """What the backward of `embedding` needs."""

    tokens: Any  # (N,) int32
    vocab_size: int


def embedding(tokens: Any, weight: Any) -> tuple[Any, EmbeddingSaved]:
    """Look up y[n] = weight[tokens[n]]: (N,) int32, (V, D) → (N, D).

    Every token must be in [0, V): on the device nobody checks.
    """
    (N,), (V, D) = tokens.shape, weight.shape
    y = device.empty((N, D), weight.dtype)
    KERNELS.launch(f"embedding_forward<{device.ctype(weight)}>", N, THREADS, tokens, weight, y, D)
    return y, EmbeddingSaved(tokens, V)


def embedding_backward(dy: Any, saved: EmbeddingSaved) -> Any:
    """Return dweight (V, D): the sum of each token's rows of dy, in the order of the text, in float32."""
    tokens, V = saved
    order, start = group_by_token(tokens, V)
    D = dy.shape[1]
    dweight = device.empty((V, D), dy.dtype)
    KERNELS.launch(f"embedding_rows<{device.ctype(dy)}>", V, THREADS, dy, order, start, dweight, D)
    return dweight


def group_by_token(tokens: Any, vocab_size: int) -> tuple[Any, Any]:
    """Sort the positions of a text by their token, stably: a counting sort that stays on the device.

    Returns
    -------
    order
        (N,) int32 positions, those of a token together and in the order of the text.
    start
        (V + 1,) int32: token v has order[start[v] : start[v + 1]].
    """
    (N,), V = tokens.shape, vocab_size
    slices = -(-N // SLICE)
    counts, total = device.zeros((slices, V), np.int32), device.empty(V, np.int32)
    order, start = device.empty(N, np.int32), device.empty(V + 1, np.int32)
    KERNELS.launch("embedding_count", slices, SLICE, tokens, counts, N, V)
    KERNELS.launch("embedding_slices", -(-V // COLUMNS), COLUMNS, counts, total, slices, V)
    KERNELS.launch("embedding_starts", 1, SCAN_THREADS, total, start, V)
    KERNELS.launch("embedding_place", slices, SLICE, tokens, counts, start, order, N, V)
    return order, start
