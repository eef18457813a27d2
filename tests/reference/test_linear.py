"""The linear map: y = x wᵀ."""

import importlib

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


@pytest.mark.parametrize("block", [module.BLOCK, 10, 1], ids=["small", "large", "a row is a block"])
@pytest.mark.parametrize("N", [2, 7])
def test_one_row_alone_equals_the_row_among_others(N, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "FEW_ROWS", 7)
    x, w = np.random.default_rng(0).standard_normal((2, 7, 5))
    y, _ = linear(x[:N], w)
    for n in range(N):
        assert_close(linear(x[n : n + 1], w)[0], y[n : n + 1], 1e-14)
