"""The linear map without bias, y = x wᵀ: attention's projections, the router's gate, the output head."""

from typing import NamedTuple

import numpy as np

from tinymoe.workers import usable_cores

Array = np.ndarray
FEW_ROWS, BLOCK = 6, 2**19  # rows of x; elements of w: what two cores' caches hold and BLAS cuts over the cores
SPLIT = 2**16 if usable_cores() > 1 else BLOCK  # elements of w from which on `matvec` makes BLAS cut it
SOME_ROWS, LARGE = 32, 2**16  # rows of x, elements of w


class LinearSaved(NamedTuple):
    """What the backward of `linear` needs."""

    x: Array  # (N, D_in)
    w: Array  # (D_out, D_in)


def linear(x: Array, w: Array) -> tuple[Array, LinearSaved]:
    """Compute y = x wᵀ.

    Parameters
    ----------
    x
        (N, D_in).
    w
        (D_out, D_in): one row per output, as checkpoints store it.

    Returns
    -------
    y
        (N, D_out).
    saved
        For `linear_backward`.
    """
    return matmul_transposed(x, w), LinearSaved(x, w)


def linear_backward(dy: Array, saved: LinearSaved) -> tuple[Array, Array]:
    """Return dx = dy w and dw = dyᵀ x, of the shapes of x and w."""
    x, w = saved
    return dy @ w, dy.T @ x


def matvec(w: Array, x: Array) -> Array:
    """Return w x, (D_out, D_in) · (D_in,) → (D_out,): bound by reading w, which two cores do twice as fast as one.

    OpenBLAS leaves a real product with fewer than 460,800 elements of w to one core, but cuts a complex one from 4,096
    on. With neighbours as real and imaginary part, w x is the real part of w conj(x). An infinite w x becomes NaN.
    """
    if SPLIT <= w.size < BLOCK and x.size % 2 == 0 and w.flags.c_contiguous and x.flags.c_contiguous:
        pairs = np.complex64 if w.dtype == np.float32 else np.complex128
        with np.errstate(invalid="ignore"):
            return np.dot(w.view(pairs), x.view(pairs).conj()).real
    return np.dot(w, x)


def matmul_transposed(x: Array, w: Array, out: Array | None = None) -> Array:
    """Return x wᵀ, written to ``out`` if given.

    One row is a matrix–vector product, bound by reading w. So are a few rows, but BLAS's matrix product copies w first:
    when w is large it is faster to take blocks of w that stay in the cores' caches, and with each the rows one by one.
    For some more rows, or a smaller w, OpenBLAS is up to twice as fast at (w xᵀ)ᵀ, the same sums, as at x wᵀ, and no
    slower with four rows than with three: rows of zeros fill up the last four.
    """
    rows = len(x)
    if rows == 1:
        y = matvec(w, x[0])[None]  # (1, D_out)
        if out is None:
            return y
        out[:] = y
        return out
    if rows <= FEW_ROWS and w.size >= BLOCK:
        y = np.empty((rows, len(w)), np.result_type(x, w)) if out is None else out
        for start in range(0, len(w), step := max(1, BLOCK // w.shape[1])):
            block = slice(start, start + step)
            for row in range(rows):
                np.dot(w[block], x[row], y[row, block])
        return y
    if 1 < rows <= SOME_ROWS and w.size >= LARGE:
        filled = np.zeros((rows + -rows % 4, x.shape[1]), x.dtype)
        filled[:rows] = x
        y = np.matmul(w, filled.T).T[:rows]
        if out is None:
            return np.ascontiguousarray(y)
        out[:] = y
        return out
    return np.matmul(x, w.T, out=out)
