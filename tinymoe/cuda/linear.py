"""The linear map without bias on the device; see `tinymoe.reference.linear`.

The one component whose product is a library's: on a GPU a dense product goes to cuBLAS through CuPy, since one that
keeps up with it is a subject of its own, and the experts' grouped product, the heart of the model, is ours by hand. So
is one of a few rows, which only reads weights: a step of decoding is recorded as a graph, and CuPy records no cuBLAS.
"""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device
from tinymoe.cuda.few_rows import MOST_WARPS, ROWS, WAYS, instance

KERNELS = device.Kernels("linear.cu", *(f"linear_few<{way}>" for way in WAYS))


class LinearSaved(NamedTuple):
    """What the backward of `linear` needs."""

    x: Any  # (N, D_in)
    w: Any  # (D_out, D_in)


def linear(x: Any, w: Any) -> tuple[Any, LinearSaved]:
    """Compute y = x wᵀ: (N, D_in), (D_out, D_in) → (N, D_out)."""
    return matmul(x, w.T), LinearSaved(x, w)


def linear_few(x: Any, w: Any) -> Any:
    """Compute y = x wᵀ of a few rows: (N, D_in), (D_out, D_in) → (N, D_out).

    Summed in float32 and rounded once, as `linear`; a kernel of ours, which reads w once for every 16 rows of x on
    tensor cores, and for every 12 without them.
    """
    (N, inner), outer = x.shape, len(w)
    y = device.empty((N, outer), x.dtype)
    expression = instance("linear_few", x, inner)
    KERNELS.launch(expression, -(-outer // ROWS), 32 * MOST_WARPS, x, w, y, N, inner, outer)
    return y


def linear_backward(dy: Any, saved: LinearSaved) -> tuple[Any, Any]:
    """Return dx = dy w and dw = dyᵀ x, of the shapes of x and w."""
    x, w = saved
    return matmul(dy, w), matmul(dy.T, x)


def matmul(a: Any, b: Any) -> Any:
    """Return a b of two matrices, transposed views among them: summed in float32, rounded once to their dtype.

    cuBLAS does so. NumPy has no product of bfloat16 matrices: under the emulator it multiplies them as float32.

    Raises
    ------
    TypeError
        The matrices are of two dtypes.
    tinymoe.errors.InputError
        They are neither float32 nor bfloat16.
    """
    if device.ctype(a) != device.ctype(b):
        raise TypeError(f"matmul takes two matrices of one dtype, got {a.dtype} and {b.dtype}")
    if device.current() == "gpu":
        return device.array(a @ b)
    return device.array(a.astype(np.float32, copy=False) @ b.astype(np.float32, copy=False), a.dtype)
