"""Rotary positions: turn the pair (i, i + K/2) of every head by an angle that grows with the position."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class RopeSaved(NamedTuple):
    """What the backward of `rope` needs."""

    cos: Array  # (T, K/2)
    sin: Array  # (T, K/2)


def rope_table(positions: Array, head_dim: int, theta: float, dtype: np.dtype) -> tuple[Array, Array]:
    """Return cos and sin, (T, K/2) each, of the angles position · θ^(−2i/K).

    Computed in float64: at position 32,768 a float32 angle is off by 2e-3.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (K/2,)
    angles = np.multiply.outer(positions, frequencies)  # (T, K/2)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Array, cos: Array, sin: Array) -> tuple[Array, RopeSaved]:
    """Rotate each pair (a, b) = (x[i], x[i + K/2]) to (a cos − b sin, b cos + a sin).

    Rotating queries and keys makes their dot product depend on the distance of their positions only.

    Parameters
    ----------
    x
        (B, T, H, K).
    cos, sin
        (T, K/2), from `rope_table`.

    Returns
    -------
    y
        (B, T, H, K).
    saved
        For `rope_backward`.

    Notes
    -----
    Su et al. 2021 (arXiv 2104.09864), with the pairs as transformers lays them out (halves); Mistral's own files pair
    neighbours instead, and `tinymoe.checkpoint` permutes wq and wk to match.
    """
    return _rotate(x, cos, sin), RopeSaved(cos, sin)


def rope_backward(dy: Array, saved: RopeSaved) -> Array:
    """Return dx (B, T, H, K): a rotation's transpose is the rotation back."""
    return _rotate(dy, saved.cos, -saved.sin)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Return (a, b) · cos + (−b, a) · sin, as long rows: NumPy's loops are slow over half a head."""
    B, T, H, K = x.shape
    a, b = x[..., : K // 2], x[..., K // 2 :]  # (B, T, H, K/2)
    swapped = np.concatenate([b, a], axis=3).reshape(B, T, H * K)
    swapped *= np.tile(np.concatenate([-sin, sin], axis=1), H)  # (T, H·K)
    y = x.reshape(B, T, H * K) * np.tile(cos, 2 * H)
    y += swapped
    return y.reshape(B, T, H, K)
