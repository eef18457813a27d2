"""The grouped GEMM: one product per expert over the rows that were sent to it, in rungs from naive to tensor cores.

Every rung in ``kernels/grouped_gemm/`` is complete and has the same kernels, so that they can be read, tested and timed
side by side. `rung` says which one runs.
"""

import math
from typing import Any, NamedTuple

from tinymoe.cuda import device
from tinymoe.cuda.dispatch import gather_rows
from tinymoe.cuda.tile_map import tile_map


class Rung(NamedTuple):
    """A grouped GEMM and the shape of its grid."""

    kernels: device.Kernels
    tile: tuple[int, int]  # rows and columns of y that a block computes
    block: tuple[int, ...]
    shared: int = 0  # bytes of dynamic shared memory
    only_bfloat16: bool = False  # and sizes that are multiples of 8


def _kernels(file: str, *more: str, T: str = "{T}") -> device.Kernels:
    forms = (f"grouped_gemm<{T}, true>", f"grouped_gemm<{T}, false>", f"grouped_gemm_dw<{T}>")
    return device.Kernels(f"grouped_gemm/{file}", *forms, *more)


DEEP = 64  # of a stage on rung 5
FOR_HOPPER = ("grouped_gemm<true>", "grouped_gemm<false>", "grouped_gemm_dw", "grouped_swiglu")
WGMMA = device.Kernels("grouped_gemm/5_wgmma.cu", *FOR_HOPPER, only_for="sm_90a")
HOPPER = device.Kernels("grouped_gemm/5_hopper.cu", *FOR_HOPPER, "gathered_gemm", "gathered_swiglu", only_for="sm_90a")


RUNGS = {
    "1_naive": Rung(_kernels("1_naive.cu"), (8, 32), (32, 8)),
    "2_tiled": Rung(_kernels("2_tiled.cu"), (32, 32), (32, 32)),
    "3_register": Rung(_kernels("3_register.cu"), (128, 128), (256,)),
    "4_tensor_core": Rung(
        _kernels("4_tensor_core.cu", "grouped_swiglu<bfloat16>", T="bfloat16"),
        *((128, 128), (256,), 4 * 2 * 128 * 32 * 2, True),
    ),
    "5_wgmma": Rung(WGMMA, (128, 128), (256,), 3 * ((128 + 128) * DEEP * 2 + 8), True),
    "5_hopper": Rung(HOPPER, (128, 256), (384,), 4 * ((128 + 256) * DEEP * 2 + 16), True),
    # Where x[rows] w^T is computed, it gathers rows as it loads them; else it is 5_hopper.
    "5_hopper_gather": Rung(HOPPER, (128, 256), (384,), 4 * ((128 + 256) * DEEP * 2 + 16), True),
}


def rung(x: Any, *sizes: int) -> str:
    """Return the highest rung that multiplies arrays of x's dtype and of these inner and outer sizes, on this device.

    Tensor cores take bfloat16, and copies go 8 elements at a time. The emulator, which is asked for speed of another
    kind, runs rung 5 only where it is named. Its first step and its variant run nowhere else.
    """
    if device.ctype(x) != "bfloat16" or any(size % 8 for size in sizes):
        return "3_register"
    return "5_hopper" if device.architecture() == "sm_90a" else "4_tensor_core"


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


def grouped_swiglu(
    x: Any, w1: Any, w3: Any, offsets: Any, rows: Any = None, using: str | None = None
) -> tuple[Any, Any, Any]:
    """Compute gate = x[rows] w1[e]ᵀ, up = x[rows] w3[e]ᵀ and silu(gate) ⊙ up in one pass, on tensor cores.

    Returns
    -------
    gate, up, hidden
        (S, out) each.
    """
    experts, outer, inner = w1.shape
    slots, name = len(x if rows is None else rows), using or rung(x, inner, outer)
    gate, up, hidden = (device.empty((slots, outer), x.dtype) for _ in range(3))
    kernels, (height, width), block, shared, _ = RUNGS[name]
    grid = (_most_tiles(slots, experts, height), -(-outer // (width // 2)))
    results = (gate, up, hidden, experts, slots, inner, outer)
    if name.startswith("5"):
        maps = _rows_map(w1, width // 2), _rows_map(w3, width // 2)
        if name == "5_hopper_gather":
            _launch_hopper(name, "gathered_swiglu", grid, x, rows, *maps, offsets, *results)
        else:
            _launch_hopper(name, "grouped_swiglu", grid, _slots_map(x, rows), *maps, offsets, *results)
        return gate, up, hidden
    arguments = (x, rows, w1, w3, offsets, *results)
    kernels.launch("grouped_swiglu<bfloat16>", grid, block, *arguments, shared=shared)
    return gate, up, hidden


def grouped_dx(dy: Any, w: Any, offsets: Any, using: str | None = None) -> Any:
    """Compute dx[s] = dy[s] w[e] for the slots s of each expert e: (S, out), (E, out, in) → (S, in)."""
    return _product(dy, w, offsets, None, using, False)


def grouped_dw(dy: Any, x: Any, offsets: Any, rows: Any = None, using: str | None = None) -> Any:
    """Compute dw[e] = Σ_s dy[s]ᵀ x[rows[s]] over the slots s of e: (E, out, in), zero for an expert without slots."""
    experts, outer, inner = len(offsets) - 1, dy.shape[1], x.shape[1]
    name = using or rung(x, outer, inner)
    kernels, (height, width), block, shared, _ = RUNGS[name]
    dw = device.empty((experts, outer, inner), dy.dtype)
    grid = (-(-inner // width), -(-outer // height), experts)
    if name.startswith("5"):
        maps = tile_map(dy, DEEP), tile_map(x if rows is None else gather_rows(x, rows), DEEP)
        sizes = (outer, inner) if name == "5_wgmma" else (experts, outer, inner)
        _launch_hopper(name, "grouped_gemm_dw", grid, *maps, offsets, dw, *sizes)
        return dw
    expression = f"grouped_gemm_dw<{device.ctype(x)}>"
    kernels.launch(expression, grid, block, dy, x, rows, offsets, dw, outer, inner, shared=shared)
    return dw


def _product(x: Any, w: Any, offsets: Any, rows: Any, using: str | None, transposed: bool) -> Any:
    experts, slots, inner = len(w), len(x if rows is None else rows), x.shape[1]
    outer, form = w.shape[1 if transposed else 2], "true" if transposed else "false"
    name = using or rung(x, inner, outer)
    kernels, (height, width), block, shared, _ = RUNGS[name]
    y = device.empty((slots, outer), x.dtype)
    grid = (_most_tiles(slots, experts, height), -(-outer // width))
    sizes = (experts, slots, inner, outer)
    if name.startswith("5"):
        map_of_w = _rows_map(w, width if transposed else DEEP)
        if name == "5_hopper_gather" and transposed:
            _launch_hopper(name, "gathered_gemm", grid, x, rows, map_of_w, offsets, y, *sizes)
        else:
            _launch_hopper(name, f"grouped_gemm<{form}>", grid, _slots_map(x, rows), map_of_w, offsets, y, *sizes)
        return y
    expression = f"grouped_gemm<{device.ctype(x)}, {form}>"
    kernels.launch(expression, grid, block, x, rows, w, offsets, y, *sizes, shared=shared)
    return y


def _most_tiles(slots: int, experts: int, height: int) -> int:
    """Return how many row tiles are enough for any routing; see ragged.h."""
    return slots // height + experts + 1


def _launch_hopper(name: str, expression: str, tiles: tuple[int, ...], *arguments: Any) -> None:
    """Launch a kernel of rung 5: a block for each tile, or on every multiprocessor one that takes tile after tile."""
    kernels, _, block, shared, _ = RUNGS[name]
    grid = tiles if name == "5_wgmma" else min(device.multiprocessors(), math.prod(tiles))
    kernels.launch(expression, grid, block, *arguments, shared=shared)


def _slots_map(x: Any, rows: Any) -> Any:
    """Return the copy engine's map of x in expert order, 128 rows to a tile."""
    return tile_map(x if rows is None else gather_rows(x, rows), 128)


def _rows_map(w: Any, height: int) -> Any:
    """Return the map of all experts' weights below one another."""
    return tile_map(w.reshape(-1, w.shape[2]), height)
