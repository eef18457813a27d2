"""The experts: one SwiGLU feed-forward each, applied to its own rows."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tinymoe.reference.linear import matmul_transposed

Array = np.ndarray


class SwigluSaved(NamedTuple):
    """What the backward of `swiglu` needs."""

    up: Array  # (S, F)
    sigmoid: Array  # (S, F) σ(gate)
    silu: Array  # (S, F) gate · σ(gate)


class FFNSaved(NamedTuple):
    """What the backward of `ffn` needs."""

    x: Array  # (S, D)
    w1: Array  # (F, D)
    w2: Array  # (D, F)
    w3: Array  # (F, D)
    hidden: Array  # (S, F)
    swiglu: SwigluSaved


class ExpertsSaved(NamedTuple):
    """What the backward of `expert_ffn` needs."""

    x: Array  # (S, D)
    w1: Array  # (E, F, D); the stacks, which may lie on disk, and not the experts that were read from them
    w2: Array  # (E, D, F)
    w3: Array  # (E, F, D)
    offsets: list[int]  # (E + 1,)
    activations: dict[int, tuple[Array, SwigluSaved]]  # by expert, of those that have rows


def swiglu(gate: Array, up: Array) -> tuple[Array, SwigluSaved]:
    """Compute silu(gate) ⊙ up, with silu(z) = z · σ(z) (Shazeer 2020, arXiv 2002.05202); all of shape (S, F)."""
    sigmoid = gate * 0.5  # σ(z) = (1 + tanh(z/2)) / 2, which cannot overflow
    np.tanh(sigmoid, out=sigmoid)
    sigmoid += 1
    sigmoid *= 0.5
    silu = gate * sigmoid
    return silu * up, SwigluSaved(up, sigmoid, silu)


def swiglu_backward(dhidden: Array, saved: SwigluSaved) -> tuple[Array, Array]:
    """Return dgate = dhidden · up · (σ + silu · (1 − σ)) and dup = dhidden · silu."""
    up, sigmoid, silu = saved
    dgate = 1 - sigmoid
    dgate *= silu
    dgate += sigmoid
    dgate *= up
    dgate *= dhidden
    return dgate, dhidden * silu


def ffn(x: Array, w1: Array, w2: Array, w3: Array) -> tuple[Array, FFNSaved]:
    """Compute w2(silu(w1 x) ⊙ w3 x): one expert, or the feed-forward block of a dense model.

    Parameters
    ----------
    x
        (S, D).
    w1, w3
        (F, D).
    w2
        (D, F).

    Returns
    -------
    out
        (S, D).
    saved
        For `ffn_backward`.
    """
    hidden, swiglu_saved = swiglu(matmul_transposed(x, w1), matmul_transposed(x, w3))  # (S, F)
    return matmul_transposed(hidden, w2), FFNSaved(x, w1, w2, w3, hidden, swiglu_saved)


def ffn_backward(
    dout: Array, saved: FFNSaved, into: tuple[Array | None, Array | None, Array | None] = (None, None, None)
) -> tuple[Array, Array, Array, Array]:
    """Return dx (S, D), dw1 (F, D), dw2 (D, F), dw3 (F, D); the last three written to ``into`` where it has arrays."""
    x, w1, w2, w3, hidden, swiglu_saved = saved
    dgate, dup = swiglu_backward(dout @ w2, swiglu_saved)  # (S, F)
    dx = dgate @ w1
    dx += dup @ w3
    dw1 = np.matmul(dgate.T, x, out=into[0])
    dw2 = np.matmul(dout.T, hidden, out=into[1])
    dw3 = np.matmul(dup.T, x, out=into[2])
    return dx, dw1, dw2, dw3


def expert_ffn(x: Array, w1: Array, w2: Array, w3: Array, offsets: list[int]) -> tuple[Array, ExpertsSaved]:
    """Apply to each expert's rows its own `ffn`.

    One expert after the other, so that what a matrix product writes is still in the cache when the next line reads it.

    Parameters
    ----------
    x
        (S, D), rows in expert order.
    w1, w3
        (E, F, D).
    w2
        (E, D, F).
    offsets
        E + 1 integers: expert e owns rows offsets[e] to offsets[e + 1], possibly none.

    Returns
    -------
    out
        (S, D).
    saved
        For `expert_ffn_backward`.

    Notes
    -----
    Section 2.1 of the paper.
    """
    out = np.empty_like(x)
    activations = {}
    for e, rows in _groups(offsets):
        out[rows], saved = ffn(x[rows], w1[e], w2[e], w3[e])
        activations[e] = saved.hidden, saved.swiglu
    return out, ExpertsSaved(x, w1, w2, w3, offsets, activations)


def expert_ffn_backward(dout: Array, saved: ExpertsSaved) -> tuple[Array, Array, Array, Array]:
    """Return dx (S, D), dw1 (E, F, D), dw2 (E, D, F), dw3 (E, F, D); exactly zero for an expert without rows."""
    x, w1, w2, w3, offsets, activations = saved
    dx = np.empty_like(dout)
    dw1, dw2, dw3 = (np.empty(w.shape, dout.dtype) for w in (w1, w2, w3))
    for dw in (dw1, dw2, dw3):
        dw[np.diff(offsets) == 0] = 0
    for e, rows in _groups(offsets):
        ffn_saved = FFNSaved(x[rows], w1[e], w2[e], w3[e], *activations[e])
        dx[rows], *_ = ffn_backward(dout[rows], ffn_saved, into=(dw1[e], dw2[e], dw3[e]))
    return dx, dw1, dw2, dw3


def _groups(offsets: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with its rows."""
    for e, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            yield e, slice(start, end)
