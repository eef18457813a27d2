"""The linear map: y = x wᵀ."""

import importlib
from unittest import mock

import numpy as np
import pytest
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.reference import linear, linear_backward

module = importlib.import_module("tinymoe.reference.linear")  # as an attribute of the package it is the function
sizes = st.integers(1, 9)


@given(sizes, sizes, sizes, rngs)
def test_backward_equals_finite_differences(N, D_in, D_out, rng):
    arrays = [rng.standard_normal((N, D_in)), rng.standard_normal((D_out, D_in))]
    check_component(linear, linear_backward, arrays, rng)


def test_each_output_has_a_row_of_the_weight():
    y, _ = linear(np.array([[1.0, 10.0]]), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    np.testing.assert_array_equal(y, [[21, 43, 65]])


@pytest.mark.parametrize("of_matrix", [{}, {"LARGE": 1}, {"BLOCK": 10}, {"BLOCK": 1}], ids=str)
@pytest.mark.parametrize("N", [2, 4, 7])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_one_row_alone_equals_the_row_among_others(N, given, of_matrix, monkeypatch):
    for name, elements in ({"FEW_ROWS": 7} | of_matrix).items():
        monkeypatch.setattr(module, name, elements)
    x, w = np.random.default_rng(0).standard_normal((2, 7, 5))
    y = module.matmul_transposed(x[:N], w, np.empty((N, 7)) if given else None)
    for n in range(N):
        assert_close(linear(x[n : n + 1], w)[0], y[n : n + 1], 1e-14)


@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-5), ("float64", 1e-13)])
@given(sizes, sizes, rngs)
def test_a_product_cut_as_a_complex_one_is_the_real_one(dtype, tol, D_in, D_out, rng):
    w, x = rng.standard_normal((D_out, D_in)).astype(dtype), rng.standard_normal(D_in).astype(dtype)
    with mock.patch.object(module, "SPLIT", 0):
        y = module.matvec(w, x)
        assert y.dtype == dtype
        assert_close(y, w @ x, tol)
        assert_close(module.matvec(w[:, ::-1], x), w @ x[::-1], tol)  # where no pairs lie side by side


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_of_a_product_cut_as_a_complex_one(bad, monkeypatch):
    monkeypatch.setattr(module, "SPLIT", 0)
    w = np.ones((4, 6), np.float32)
    w[2, 3] = bad
    y = module.matvec(w, np.ones(6, np.float32))
    np.testing.assert_array_equal(y[[0, 1, 3]], 6)
    assert not np.isfinite(y[2])
