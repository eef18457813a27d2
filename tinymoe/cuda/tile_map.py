"""What Hopper's copy engine (TMA) must know of a matrix: a kernel's ``const __grid_constant__ TileMap`` parameter."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SWIZZLED_ROW = 64  # elements, as in hopper.h: the most that a box has of a row


class TileMap(NamedTuple):
    """A matrix of bfloat16 on the device, and the box that is cut of it; made by `tile_map`."""

    matrix: Any
    box_rows: int
    box_columns: int


def tile_map(matrix: Any, box_rows: int, box_columns: int = SWIZZLED_ROW) -> TileMap:
    """Describe how a kernel loads boxes of a matrix into shared memory, with the 128-byte swizzle.

    Parameters
    ----------
    matrix
        (rows, columns), bfloat16, contiguous, on the device.
    box_rows, box_columns
        The box: up to 256 rows, and up to 64 elements of each.

    Raises
    ------
    TypeError
        The copy engine cannot load such a matrix, or such a box.
    """
    if matrix.ndim != 2 or matrix.dtype != ml_dtypes.bfloat16 or not matrix.flags.c_contiguous:
        raise TypeError(
            f"tiles are cut of contiguous bfloat16 matrices; got {matrix.dtype} of shape {matrix.shape}, "
            f"{'' if matrix.flags.c_contiguous else 'not '}contiguous"
        )
    if matrix.shape[1] % 8:
        raise TypeError(f"the copy engine loads rows of a multiple of 16 bytes; {matrix.shape[1]} elements are none")
    if not (1 <= box_rows <= 256 and 8 <= box_columns <= SWIZZLED_ROW and box_columns % 8 == 0):
        raise TypeError(f"a box has 1 to 256 rows of 8, 16, … {SWIZZLED_ROW} elements; got {box_rows} x {box_columns}")
    return TileMap(matrix, box_rows, box_columns)


def encoded(tiles: TileMap) -> np.ndarray:
    """Return CUDA's descriptor of a map, CUtensorMap, as one element of 128 bytes; needs a GPU's driver."""
    from cuda.bindings import driver

    rows, columns = tiles.matrix.shape
    status, descriptor = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
        tiles.matrix.data.ptr,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(2 * columns)],  # bytes from row to row
        [driver.cuuint32_t(tiles.box_columns), driver.cuuint32_t(tiles.box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status.value:
        raise TypeError(f"the driver refuses the map of a {rows} x {columns} matrix: {status.name}")
    return np.array([int(word) for word in descriptor.opaque], np.uint64).view("V128")
