"""The linear map without bias, y = x wᵀ: attention's projections, the router's gate, the output head."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray
ONE_CORE = 2**18  # elements of a matrix; with fewer, a second core costs more than it saves
FEW_ROWS, LARGE = 32, 2**16  # rows of x, elements of w


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


def matmul_transposed(x: Array, w: Array, out: Array | None = None) -> Array:
    """Return x wᵀ, written to ``out`` if given.

    One row is a matrix–vector product, bound by reading w: dot products row by row stream it fastest on one core, and
    a large one is worth BLAS's threads. For a few rows OpenBLAS is up to twice as fast at (w xᵀ)ᵀ, the same sums, as at
    x wᵀ; for many there is no difference.
    """
    rows = len(x)
    if rows == 1 and w.size < ONE_CORE:
        return np.vecdot(w, x, out=None if out is None else out[0])[None]  # (1, D_out)
    if 1 < rows <= FEW_ROWS and w.size >= LARGE:
        y = np.matmul(w, x.T).T
        if out is None:
            return np.ascontiguousarray(y)
        out[:] = y
        return out
    return np.matmul(x, w.T, out=out)
