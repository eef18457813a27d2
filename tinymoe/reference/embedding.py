"""The embedding: a row of the weight for every token."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class EmbeddingSaved(NamedTuple):
    """What the backward of `embedding` needs."""

    tokens: Array  # (N,)
    vocab_size: int


def embedding(tokens: Array, weight: Array) -> tuple[Array, EmbeddingSaved]:
    """Look up y[n] = weight[tokens[n]].

    Parameters
    ----------
    tokens
        (N,) integers in [0, V).
    weight
        (V, D).

    Returns
    -------
    y
        (N, D), a copy.
    saved
        For `embedding_backward`.
    """
    return weight[tokens], EmbeddingSaved(tokens, weight.shape[0])


def embedding_backward(dy: Array, saved: EmbeddingSaved) -> Array:
    """Sum the gradient rows of each token: dweight[v] = Σ_{n: tokens[n] = v} dy[n].

    Sorting the tokens first makes every sum a contiguous segment, in the order of the text: the same bits every time,
    and faster than ``np.add.at``.

    Returns
    -------
    dweight
        (V, D); exactly zero for a token that does not occur.
    """
    tokens, vocab_size = saved
    dweight = np.zeros((vocab_size, dy.shape[1]), dy.dtype)
    order = np.argsort(tokens, kind="stable")
    present, first = np.unique(tokens[order], return_index=True)
    dweight[present] = np.add.reduceat(dy[order], first, axis=0)
    return dweight
