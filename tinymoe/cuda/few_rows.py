"""What launchers of kernels that multiply a few rows by weights must know of ``include/few_rows.h``."""

from typing import Any

from tinymoe.cuda import device

TILE, ROWS, MOST_WARPS = 16, 32, 16  # rows of weights of an operand and of a block; warps that a multiprocessor holds
STEP = 64  # elements of a row that a warp multiplies at once on tensor cores
WAYS = "{T}, Lanes<1>", "float, Lanes<4>", "bfloat16, Lanes<8>", "bfloat16, TensorCores"


def instance(kernel: str, x: Any, inner: int) -> str:
    """Return the instantiation for rows of so many elements: on tensor cores, or by loads of 16 bytes, if they fit."""
    T = device.ctype(x)
    if T == "bfloat16" and inner % STEP == 0:
        return f"{kernel}<{T}, TensorCores>"
    width = 16 // x.dtype.itemsize
    return f"{kernel}<{T}, Lanes<{width if inner % width == 0 else 1}>>"
