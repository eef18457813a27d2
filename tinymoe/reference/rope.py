"""Rotary positions: neighbours in a head are one complex number, turned by an angle that grows with the position."""

import functools
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class RopeSaved(NamedTuple):
    """What the backward of `rope` needs."""

    rotation: Array  # (T, K/2) complex


def rope_table(positions: Array, head_dim: int, theta: float, dtype: np.dtype) -> Array:
    """Return the rotations exp(i · position · θ^(−2j/K)) for j = 0 … K/2 − 1.

    Parameters
    ----------
    positions
        (T,) integers.
    head_dim, theta
        K and θ.
    dtype
        Real dtype of what is to be rotated. The angles are computed in float64 all the same: at position 32,768 a
        float32 angle is off by 2e-3.

    Returns
    -------
    rotation
        (T, K/2), complex, of the precision of ``dtype``.
    """
    rotation = np.exp(positions[:, None] * _exponents(head_dim, theta))  # (T, K/2)
    return rotation.astype(np.complex64 if np.dtype(dtype) == np.float32 else np.complex128)


@functools.cache
def _exponents(head_dim: int, theta: float) -> Array:
    return 1j * theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (K/2,)


def rope(x: Array, rotation: Array) -> tuple[Array, RopeSaved]:
    """Compute z · exp(iφ) for each pair of neighbours z = x[2j] + i x[2j + 1].

    Rotating queries and keys makes their dot product depend on the distance of their positions only.

    Parameters
    ----------
    x
        (B, T, H, K), contiguous.
    rotation
        (T, K/2), from `rope_table`.

    Returns
    -------
    y
        (B, T, H, K).
    saved
        For `rope_backward`.

    Notes
    -----
    Su et al. 2021 (arXiv 2104.09864), with the pairs as in Mistral's own files. transformers pairs the halves of a
    head instead, (j, j + K/2); `tinymoe.checkpoint` reorders the rows of wq and wk on the way in and out.
    """
    return _rotate(x, rotation), RopeSaved(rotation)


def rope_backward(dy: Array, saved: RopeSaved) -> Array:
    """Return dx (B, T, H, K): the transpose of a rotation is the rotation back."""
    return _rotate(dy, saved.rotation.conj())


def _rotate(x: Array, rotation: Array) -> Array:
    z = x.view(rotation.dtype)  # (B, T, H, K/2)
    return (z * rotation[:, None]).view(x.dtype)
