"""AdamW on the device takes the reference's steps."""

from unittest import mock

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

import tinymoe.cuda.optimizer as module
from tinymoe import InputError, reference
from tinymoe.cuda import device
from tinymoe.cuda.optimizer import AdamW, adamw

SHAPES = {"embedding": (5, 7), "norm": (7,), "experts": (2, 3, 5), "single": (1, 1), "large": (23, 31)}


def draw_arrays(rng, dtype):
    """Return arrays of the device, and what they are in float64."""
    there, doubles = on_device(*(rng.standard_normal(shape) for shape in SHAPES.values()), dtype=dtype)
    return dict(zip(SHAPES, there)), dict(zip(SHAPES, doubles))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(
    rngs,
    st.integers(1, 6),
    st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)]),
    st.sampled_from([1e-8, 0.3]),
    st.sampled_from([0.0, 0.01, 0.5]),
    st.integers(1, 4),
    dtypes,
    dtypes,
    orders,
)
def test_steps_equal_the_references(where, rng, steps, betas, eps, weight_decay, blocks, dtype, grad_dtype, order):
    with running(where, order), mock.patch.object(module, "BLOCKS", blocks):
        params, params64 = draw_arrays(rng, dtype)
        optimizer = AdamW(params, betas=betas, eps=eps, weight_decay=weight_decay, workers=3)
        expected = reference.AdamW(params64, betas=betas, eps=eps, weight_decay=weight_decay, workers=1)
        for rate in rng.uniform(1e-4, 1e-1, steps).tolist():
            grads, grads64 = draw_arrays(rng, grad_dtype)
            optimizer.learning_rate = expected.learning_rate = rate
            optimizer.step(grads)
            expected.step(grads64)
        assert optimizer.steps == steps
        assert optimizer.params is params
        assert optimizer.master.keys() == (params.keys() if dtype == device.BFLOAT16 else set())
        for name, p in params.items():
            assert_equivalent(optimizer.m[name], expected.m[name])
            assert_equivalent(optimizer.v[name], expected.v[name])
            assert_equivalent(optimizer.master.get(name, p), params64[name])
            if name in optimizer.master:
                assert_same_bits([p], [device.host(optimizer.master[name]).astype(device.BFLOAT16)])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 700), st.integers(1, 9), dtypes, orders, rngs)
def test_function_updates_in_place_as_the_references(where, size, step, dtype, order, rng):
    options = dict(step=step, learning_rate=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    with running(where, order):
        (p, m, v), doubles = on_device(*rng.standard_normal((2, size)), rng.random(size), dtype=np.float32)
        (g,), (g64,) = on_device(rng.standard_normal(size), dtype=dtype)
        assert adamw(p, g, m, v, **options) is None
        reference.adamw(doubles[0], g64, *doubles[1:], **options)
        for found, expected in zip((p, m, v), doubles):
            assert_equivalent(found, expected)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_steps_too_small_for_bfloat16_add_up(where):
    with device.using(where):
        params = {"w": device.array(np.ones((3, 5)).astype(device.BFLOAT16))}
        optimizer = AdamW(params, learning_rate=1e-4, weight_decay=0.0)  # from 1 down to its neighbour: 0.0039
        for _ in range(100):
            optimizer.step({"w": device.array(np.ones((3, 5)).astype(device.BFLOAT16))})
        np.testing.assert_array_equal(device.host(params["w"]).astype(np.float64), np.full((3, 5), 0.98828125))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_norms_do_not_decay_and_all_else_does(where):
    with device.using(where):
        params, before = draw_arrays(np.random.default_rng(0), np.float32)
        grads = {name: device.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        AdamW(params, learning_rate=0.1, weight_decay=0.5).step(grads)
        for name, p in params.items():
            assert_equivalent(p, before[name] if name == "norm" else 0.95 * before[name])


def test_gradients_may_have_any_layout_and_stay_as_they_are():
    with device.using("emulated"):
        grads = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
        given, results = grads.copy(), []
        for g in (grads.T, np.ascontiguousarray(grads.T)):
            results.append(device.array(np.ones((3, 4), np.float32)))
            AdamW({"w": results[-1]}).step({"w": g})
        assert_same_bits(results[:1], results[1:])
        np.testing.assert_array_equal(grads, given)


def ones(*shape):
    return device.array(np.ones(shape, np.float32))


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "c"], []])
def test_gradients_of_other_names_are_refused_before_anything_changes(names):
    with device.using("emulated"):
        params = {"a": ones(2), "b": ones(2)}
        optimizer = AdamW(params)
        with pytest.raises(ValueError, match=r"differ in \['[bc]" if names else r"differ in \['a', 'b'\]"):
            optimizer.step({name: ones(2) for name in names})
        assert optimizer.steps == 0
        assert all((p == 1).all() for p in params.values())


def test_gradients_of_another_dtype_are_refused_before_anything_changes():
    with device.using("emulated"):
        params = {"a": ones(2), "b": ones(2)}
        optimizer = AdamW(params)
        with pytest.raises(InputError, match="float64"):
            optimizer.step({"a": ones(2), "b": np.ones(2)})
        assert optimizer.steps == 0
        assert (params["a"] == 1).all()


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1,)])
def test_gradients_of_another_shape_are_refused(shape):
    with device.using("emulated"), pytest.raises(ValueError, match="shape"):
        AdamW({"w": ones(2, 3)}).step({"w": ones(*shape)})


def test_parameters_that_cannot_be_updated_are_refused():
    with device.using("emulated"):
        frozen = ones(2, 2)
        frozen.flags.writeable = False
        for p in (ones(4, 3).T, ones(4, 6)[:, ::2], frozen):
            with pytest.raises(ValueError, match=r"layers\.0\.w must be a contiguous, writeable array"):
                AdamW({"layers.0.w": p})
        with pytest.raises(InputError, match="float64"):
            AdamW({"w": np.ones((2, 2))})
