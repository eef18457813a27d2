"""The experts: one SwiGLU feed-forward each, applied to its own rows."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tinymoe.reference.linear import matmul_transposed, matvec

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
    hidden: Array  # (S, F)
    swiglu: SwigluSaved


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


def ffn_backward(dout: Array, saved: FFNSaved) -> tuple[Array, Array, Array, Array]:
    """Return dx (S, D), dw1 (F, D), dw2 (D, F), dw3 (F, D)."""
    x, w1, w2, w3, hidden, swiglu_saved = saved
    dgate, dup = swiglu_backward(dout @ w2, swiglu_saved)  # (S, F)
    dx = dgate @ w1
    dx += dup @ w3
    return dx, dgate.T @ x, dout.T @ hidden, dup.T @ x


def ffn_decode(x: Array, w1: Array, w2: Array, w3: Array) -> Array:
    """Compute `ffn` of one row x (D,) in few calls, with silu(z) = z/2 · (1 + tanh(z/2))."""
    half = matvec(w1, x) * 0.5  # (F,)
    return matvec(w2, half * (1 + np.tanh(half)) * matvec(w3, x))


def expert_ffn(x: Array, w1: Array, w2: Array, w3: Array, offsets: list[int]) -> tuple[Array, ExpertsSaved]:
    """Apply to each expert's rows its own `ffn`.

    One matrix product per expert and weight; what is done element by element is done to all rows at once, since
    threads that run this side by side wait for the interpreter at each call.

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
    gate, up = _grouped_linear(x, w1, offsets), _grouped_linear(x, w3, offsets)  # (S, F)
    hidden, swiglu_saved = swiglu(gate, up)
    out = _grouped_linear(hidden, w2, offsets)  # (S, D)
    return out, ExpertsSaved(x, w1, w2, w3, offsets, hidden, swiglu_saved)


def expert_ffn_backward(dout: Array, saved: ExpertsSaved) -> tuple[Array, Array, Array, Array]:
    """Return dx (S, D), dw1 (E, F, D), dw2 (E, D, F), dw3 (E, F, D); exactly zero for an expert without rows."""
    x, w1, w2, w3, offsets, hidden, swiglu_saved = saved
    dgate, dup = swiglu_backward(_grouped_dx(dout, w2, offsets), swiglu_saved)  # (S, F)
    dw2 = _grouped_dw(dout, hidden, offsets)
    dw1, dw3 = _grouped_dw(dgate, x, offsets), _grouped_dw(dup, x, offsets)
    dx = _grouped_dx(dgate, w1, offsets)
    dx += _grouped_dx(dup, w3, offsets)
    return dx, dw1, dw2, dw3


def _grouped_linear(x: Array, w: Array, offsets: list[int]) -> Array:
    """y[rows of e] = x[rows of e] w[e]ᵀ: (S, in), (E, out, in) → (S, out)."""
    y = np.empty((len(x), w.shape[1]), x.dtype)
    for e, rows in _groups(offsets):
        matmul_transposed(x[rows], w[e], out=y[rows])
    return y


def _grouped_dx(dy: Array, w: Array, offsets: list[int]) -> Array:
    """dx[rows of e] = dy[rows of e] w[e]: (S, out), (E, out, in) → (S, in)."""
    dx = np.empty((len(dy), w.shape[2]), dy.dtype)
    for e, rows in _groups(offsets):
        np.matmul(dy[rows], w[e], out=dx[rows])
    return dx


def _grouped_dw(dy: Array, x: Array, offsets: list[int]) -> Array:
    """dw[e] = dy[rows of e]ᵀ x[rows of e]: (S, out), (S, in) → (E, out, in)."""
    dw = np.empty((len(offsets) - 1, dy.shape[1], x.shape[1]), dy.dtype)
    dw[np.diff(offsets) == 0] = 0
    for e, rows in _groups(offsets):
        np.matmul(dy[rows].T, x[rows], out=dw[e])
    return dw


def _groups(offsets: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with its rows."""
    for e, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            yield e, slice(start, end)
