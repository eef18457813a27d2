"""The grouped GEMM: one product per expert over the rows that were sent to it, in rungs from naive to tensor cores.

Every rung in ``kernels/grouped_gemm/`` is complete and has the same kernels, so that they can be read, tested and timed
side by side. `rung` says which one runs.
"""

from typing import Any, NamedTuple

from tinymoe.cuda import device


class Rung(NamedTuple):
    """A grouped GEMM and the shape of its grid."""

    kernels: device.Kernels
    tile: tuple[int, int]  # rows and columns of y that a block computes
    block: tuple[int, ...]
    shared: int = 0  # bytes of dynamic shared memory


def _kernels(file: str, *more: str, T: str = "{T}") -> device.Kernels:
    forms = (f"grouped_gemm<{T}, true>", f"grouped_gemm<{T}, false>", f"grouped_gemm_dw<{T}>")
    return device.Kernels(f"grouped_gemm/{file}", *forms, *more)


RUNGS = {
    "1_naive": Rung(_kernels("1_naive.cu"), (8, 32), (32, 8)),
    "2_tiled": Rung(_kernels("2_tiled.cu"), (32, 32), (32, 32)),
    "3_register": Rung(_kernels("3_register.cu"), (128, 128), (256,)),
    "4_tensor_core": Rung(
        _kernels("4_tensor_core.cu", "grouped_swiglu<bfloat16>", T="bfloat16"), (128, 128), (256,), 4 * 2 * 128 * 32 * 2
    ),
}


def rung(x: Any, *sizes: int) -> str:
    """Return the highest rung that multiplies arrays of x's dtype and of these inner and outer sizes.

    Tensor cores take bfloat16, and their asynchronous copies 8 elements at a time.
    """
    if device.ctype(x) == "bfloat16" and all(size % 8 == 0 for size in sizes):
        return "4_tensor_core"
    return "3_register"


def grouped_linear(x: Any, w: Any, offsets: Any, rows: Any = None, using: str | None = None) -> Any:
    """Compute y[s] = x[rows[s]] w[e]ᵀ for the slots s of each expert e.

    Parameters
    ----------
    x
        (N, in), or (S, in) without ``rows``.
    w
        (E, out, in).
    offsets
        (E + 1,) int32: expert e owns the slots offsets[e] to offsets[e + 1].
    rows
        (S,) int32, the row of x for each slot; None: slot s reads row s.
    using
        A rung's name; None: `rung` chooses.

    Returns
    -------
    y
        (S, out); zero in the slots beyond offsets[E].
    """
    return _product(x, w, offsets, rows, using, True)


def grouped_swiglu(x: Any, w1: Any, w3: Any, offsets: Any, rows: Any = None) -> tuple[Any, Any, Any]:
    """Compute gate = x[rows] w1[e]ᵀ, up = x[rows] w3[e]ᵀ and silu(gate) ⊙ up in one pass, on tensor cores.

    Returns
    -------
    gate, up, hidden
        (S, out) each.
    """
    kernels, (height, width), block, shared = RUNGS["4_tensor_core"]
    experts, outer, inner = w1.shape
    slots = len(x if rows is None else rows)
    gate, up, hidden = (device.empty((slots, outer), x.dtype) for _ in range(3))
    grid = (slots // height + experts + 1, -(-outer // (width // 2)))
    arguments = (x, rows, w1, w3, offsets, gate, up, hidden, experts, slots, inner, outer)
    kernels.launch("grouped_swiglu<bfloat16>", grid, block, *arguments, shared=shared)
    return gate, up, hidden


def grouped_dx(dy: Any, w: Any, offsets: Any, using: str | None = None) -> Any:
    """Compute dx[s] = dy[s] w[e] for the slots s of each expert e: (S, out), (E, out, in) → (S, in)."""
    return _product(dy, w, offsets, None, using, False)


def grouped_dw(dy: Any, x: Any, offsets: Any, rows: Any = None, using: str | None = None) -> Any:
    """Compute dw[e] = Σ_s dy[s]ᵀ x[rows[s]] over the slots s of e: (E, out, in), zero for an expert without slots."""
    experts, outer, inner = len(offsets) - 1, dy.shape[1], x.shape[1]
    kernels, (height, width), block, shared = RUNGS[using or rung(x, outer, inner)]
    dw = device.empty((experts, outer, inner), dy.dtype)
    grid = (-(-inner // width), -(-outer // height), experts)
    expression = f"grouped_gemm_dw<{device.ctype(x)}>"
    kernels.launch(expression, grid, block, dy, x, rows, offsets, dw, outer, inner, shared=shared)
    return dw


def _product(x: Any, w: Any, offsets: Any, rows: Any, using: str | None, transposed: bool) -> Any:
    experts, slots, inner = len(w), len(x if rows is None else rows), x.shape[1]
    outer = w.shape[1 if transposed else 2]
    kernels, (height, width), block, shared = RUNGS[using or rung(x, inner, outer)]
    y = device.empty((slots, outer), x.dtype)
    tiles = slots // height + experts + 1  # enough for any routing; see ragged.h
    expression = f"grouped_gemm<{device.ctype(x)}, {'true' if transposed else 'false'}>"
    grid = (tiles, -(-outer // width))
    kernels.launch(expression, grid, block, x, rows, w, offsets, y, experts, slots, inner, outer, shared=shared)
    return y
