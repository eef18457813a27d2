"""Rotary positions on the device; see `tinymoe.reference.rope`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device

THREADS = 256  # of a block
KERNELS = device.Kernels("rope.cu", "rope_rotate<{T}>")


class RopeSaved(NamedTuple):
    """What the backward of `rope` needs."""

    rotation: Any  # (T, K/2, 2) float32


def rope_table(positions: Any, head_dim: int, theta: float, dtype: Any) -> Any:
    """Return (cos, sin) of position · θ^(−2j/K) as (T, K/2, 2), in float32 for every dtype.

    The positions (T,) and the angles are the host's, since angles need float64.
    """
    angles = np.multiply.outer(positions, theta ** (-np.arange(0, head_dim, 2) / head_dim))  # (T, K/2)
    return device.array(np.stack([np.cos(angles), np.sin(angles)], axis=2), np.float32)


def rope(x: Any, rotation: Any) -> tuple[Any, RopeSaved]:
    """Turn each pair of neighbours in x (B, T, H, K) by its angle."""
    return _rotate(x, rotation, 1), RopeSaved(rotation)


def rope_backward(dy: Any, saved: RopeSaved) -> Any:
    """Return dx (B, T, H, K): the rotation back."""
    return _rotate(dy, saved.rotation, -1)


def _rotate(x: Any, rotation: Any, direction: int) -> Any:
    (B, T, H, K), y = x.shape, device.empty(x.shape, x.dtype)
    KERNELS.launch(f"rope_rotate<{device.ctype(x)}>", B * T, THREADS, x, rotation, y, direction, T, H, K // 2)
    return y
