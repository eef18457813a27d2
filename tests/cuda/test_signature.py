"""A kernel's parameters are read from its source as the compiler reads them."""

import re

import numpy as np
import pytest

from tinymoe.cuda.device import BFLOAT16
from tinymoe.cuda.signature import TILE_MAP, Parameter, signature

SOURCE = """
template <int ROWS> constexpr int threads() { return 32 * ROWS; }

// __global__ void commented_out(int *x) {}
__global__ void plain(const float *x, float *y, float eps, int n) {}

template <class T>
__global__ void typed(const T *__restrict__ x, T* __restrict__ y, const int *which, unsigned count, int64_t size) {}

template <class T, int ROWS = 4>
__global__ void __launch_bounds__(threads<ROWS>(), 2) bounded(
    const T *x,  // (N, D), one row (or more) for each warp
    float *sums, /* of a row */
    const int rows
) {}

template <class T, class Sum = float>
__global__ __launch_bounds__(2 * (128 + 32)) void first(T *x, Sum *sum) {}

template <class Tile, class T>
__global__ void tiled(const T *x) {}

__global__ void cut(const __grid_constant__ TileMap a, float *c) {}
__global__ void nothing() {}
__global__ void doubles(const double *x) {}
"""
FLOAT, INT = np.dtype(np.float32), np.dtype(np.int32)


def test_plain_parameters():
    assert signature(SOURCE, "plain") == [
        Parameter("x", FLOAT, is_array=True, is_const=True),
        Parameter("y", FLOAT, is_array=True, is_const=False),
        Parameter("eps", FLOAT, is_array=False, is_const=False),
        Parameter("n", INT, is_array=False, is_const=False),
    ]
    assert signature(SOURCE, "nothing") == []


def test_map_of_tiles():
    assert signature(SOURCE, "cut")[0] == Parameter("a", TILE_MAP, is_array=False, is_const=True)


@pytest.mark.parametrize(("T", "dtype"), [("float", FLOAT), ("bfloat16", BFLOAT16)])
def test_template_types_are_what_the_expression_says(T, dtype):
    found = signature(SOURCE, f"typed<{T}>")
    assert [p.name for p in found] == ["x", "y", "which", "count", "size"]
    assert [p.dtype for p in found] == [dtype, dtype, INT, np.uint32, np.int64]
    assert [p.is_array for p in found] == [True, True, True, False, False]
    assert [p.is_const for p in found] == [True, False, True, False, False]


def test_launch_bounds_comments_and_several_lines():
    found = signature(SOURCE, "bounded<bfloat16, 8>")
    assert [(p.name, p.dtype) for p in found] == [("x", BFLOAT16), ("sums", FLOAT), ("rows", INT)]
    assert [p.dtype for p in signature(SOURCE, "first<bfloat16, int>")] == [BFLOAT16, INT]


def test_commas_inside_a_template_argument_are_not_between_arguments():
    assert signature(SOURCE, "tiled<Tile<64, 32>, bfloat16>")[0].dtype == BFLOAT16
    assert signature(SOURCE, "tiled<Tile<64>, float>")[0].dtype == FLOAT


@pytest.mark.parametrize("name", ["absent", "commented_out", "lain", "threads"])
def test_unknown_kernel(name):
    with pytest.raises(ValueError, match=f"there is no kernel {name}"):
        signature(SOURCE, name)


@pytest.mark.parametrize(
    ("kernel", "parameter"), [("doubles", "const double *x"), ("typed", "const T *__restrict__ x")]
)
def test_parameter_that_no_launch_can_fill(kernel, parameter):
    message = f"the parameter {parameter!r} is none that a launch can fill; types are float,"
    with pytest.raises(ValueError, match=re.escape(message)):
        signature(SOURCE, kernel)
