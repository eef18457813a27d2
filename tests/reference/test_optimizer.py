"""AdamW: torch's semantics, whatever the chunks and the workers."""

from unittest import mock

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

import tinymoe.reference.optimizer as module
from tinymoe import AdamW

SHAPES = {"embedding": (5, 7), "norm": (7,), "experts": (2, 3, 5), "single": (1, 1)}


def draw_arrays(rng, dtype=np.float64):
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def plain_adamw(params, all_grads, learning_rates, betas, eps, weight_decay):
    """AdamW as torch's documentation writes it, one tensor and one step at a time."""
    params = {name: p.copy() for name, p in params.items()}
    for name, p in params.items():
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t, (grads, learning_rate) in enumerate(zip(all_grads, learning_rates), start=1):
            g = grads[name]
            if p.ndim > 1:
                p *= 1 - learning_rate * weight_decay
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
            p -= learning_rate * m_hat / (np.sqrt(v_hat) + eps)
    return params


@given(
    rngs,
    st.integers(1, 12),
    st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)]),
    st.sampled_from([1e-8, 0.3]),
    st.sampled_from([0.0, 0.01, 0.5]),
    st.sampled_from([1, 4, 35, 131072]),
    st.sampled_from([("float64", 1e-12), ("float32", 1e-5)]),
)
def test_steps_equal_adamw_written_plainly(rng, steps, betas, eps, weight_decay, chunk, precision):
    dtype, tol = precision
    params, all_grads = draw_arrays(rng, dtype), [draw_arrays(rng, dtype) for _ in range(steps)]
    rates = rng.uniform(1e-4, 1e-1, steps).tolist()
    expected = plain_adamw(params, all_grads, rates, betas, eps, weight_decay)
    optimizer = AdamW(params, betas=betas, eps=eps, weight_decay=weight_decay, workers=2)
    with mock.patch.object(module, "CHUNK", chunk):
        for grads, rate in zip(all_grads, rates):
            optimizer.learning_rate = rate
            optimizer.step(grads)
    assert optimizer.steps == steps
    for name, p in params.items():
        assert p.dtype == optimizer.m[name].dtype == optimizer.v[name].dtype == dtype
        assert_close(p, expected[name], tol)


def test_defaults_are_torchs_but_for_the_learning_rate():
    rng = np.random.default_rng(0)
    params, all_grads = draw_arrays(rng), [draw_arrays(rng) for _ in range(5)]
    expected = plain_adamw(params, all_grads, [3e-4] * 5, (0.9, 0.999), 1e-8, 0.01)
    optimizer = AdamW(params)
    for grads in all_grads:
        optimizer.step(grads)
    for name, p in params.items():
        assert_close(p, expected[name], 1e-14)


def test_first_step_moves_every_element_by_the_learning_rate_against_its_gradient():
    params = {"w": np.array([[1.0, 1.0, 1.0]])}
    AdamW(params, learning_rate=0.1, weight_decay=0.0).step({"w": np.array([[1e-3, -50.0, 0.0]])})
    assert_close(params["w"], [[0.9, 1.1, 1.0]], 1e-5)


def test_norms_do_not_decay_and_all_else_does():
    params = draw_arrays(np.random.default_rng(0))
    before = {name: p.copy() for name, p in params.items()}
    AdamW(params, learning_rate=0.1, weight_decay=0.5).step({name: np.zeros_like(p) for name, p in params.items()})
    np.testing.assert_array_equal(params["norm"], before["norm"])
    for name in SHAPES.keys() - {"norm"}:
        assert_close(params[name], 0.95 * before[name], 1e-15)


@pytest.mark.parametrize("chunk", [1, 3, 131072])
def test_number_of_workers_and_chunks_changes_no_bit(chunk):
    results = []
    for workers in (1, 2, 3):
        rng = np.random.default_rng(0)
        params = draw_arrays(rng, np.float32)
        optimizer = AdamW(params, workers=workers)
        with mock.patch.object(module, "CHUNK", chunk):
            for _ in range(3):
                optimizer.step(draw_arrays(rng, np.float32))
        results.append(params)
    for other in results[1:]:
        assert all(np.array_equal(results[0][name], other[name]) for name in SHAPES)


def test_gradients_may_have_any_layout_and_stay_as_they_are():
    params = {"w": np.ones((3, 4))}
    other = {"w": np.ones((3, 4))}
    grads = np.random.default_rng(0).standard_normal((4, 3))
    given = grads.copy()
    AdamW(params).step({"w": grads.T})
    AdamW(other).step({"w": np.ascontiguousarray(grads.T)})
    np.testing.assert_array_equal(params["w"], other["w"])
    np.testing.assert_array_equal(grads, given)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "c"], []])
def test_gradients_of_other_names_are_refused_before_anything_changes(names):
    params = {"a": np.ones(2), "b": np.ones(2)}
    optimizer = AdamW(params)
    with pytest.raises(ValueError, match=r"differ in \['[bc]" if names else r"differ in \['a', 'b'\]"):
        optimizer.step({name: np.ones(2) for name in names})
    assert optimizer.steps == 0
    assert all((p == 1).all() for p in params.values())


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1,)])
def test_gradients_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        AdamW({"w": np.ones((2, 3))}).step({"w": np.ones(shape)})


def frozen():
    array = np.ones((2, 2))
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "p", [np.ones((4, 3)).T, np.ones((4, 6))[:, ::2], frozen()], ids=["turned", "strided", "frozen"]
)
def test_parameters_that_cannot_be_updated_in_place_are_refused(p):
    with pytest.raises(ValueError, match=r"layers\.0\.w must be a contiguous, writeable array"):
        AdamW({"layers.0.w": p})
