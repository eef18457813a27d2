"""RMSNorm on the device; see `tinymoe.reference.rmsnorm`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device

ROWS, COLUMNS, SLICE = 4, 128, 256  # rows and columns of a block; rows of a partial sum
KERNELS = device.Kernels(
    "rmsnorm.cu",
    "rmsnorm_forward<{T}>",
    "rmsnorm_backward_rows<{T}>",
    "rmsnorm_backward_columns<{T}>",
    "rmsnorm_backward_sum<{T}>",
)


class RMSNormSaved(NamedTuple):
    """What the backward of `rmsnorm` needs."""

    x: Any  # (N, D)
    inverse_rms: Any  # (N,) float32
    weight: Any  # (D,)


def rmsnorm(x: Any, weight: Any, eps: float) -> tuple[Any, RMSNormSaved]:
    """Compute y = x / √(mean(x²) + eps) · weight, row by row: (N, D), (D,) → (N, D)."""
    (rows, D), T = x.shape, device.ctype(x)
    y, inverse_rms = device.empty((rows, D), x.dtype), device.empty(rows, np.float32)
    KERNELS.launch(f"rmsnorm_forward<{T}>", -(-rows // ROWS), 32 * ROWS, x, weight, y, inverse_rms, eps, rows, D)
    return y, RMSNormSaved(x, inverse_rms, weight)


def rmsnorm_backward(dy: Any, saved: RMSNormSaved) -> tuple[Any, Any]:
    """Return dx (N, D) and dweight (D,)."""
    x, inverse_rms, weight = saved
    (rows, D), T = x.shape, device.ctype(x)
    dx, dweight = device.empty((rows, D), x.dtype), device.empty(D, x.dtype)
    KERNELS.launch(f"rmsnorm_backward_rows<{T}>", -(-rows // ROWS), 32 * ROWS, dy, x, inverse_rms, weight, dx, rows, D)
    slices, blocks = -(-rows // SLICE), -(-D // COLUMNS)
    partial = device.empty((slices, D), np.float32)
    KERNELS.launch(
        f"rmsnorm_backward_columns<{T}>", (blocks, slices), COLUMNS, dy, x, inverse_rms, partial, rows, D, SLICE
    )
    KERNELS.launch(f"rmsnorm_backward_sum<{T}>", blocks, COLUMNS, partial, dweight, slices, D)
    return dx, dweight
