"""Comparison by norm, and a component's backward against central finite differences of its forward."""

from functools import partial

import numpy as np


def assert_close(found, expected, tol, floor=1e-3):
    """Fail unless ‖found − expected‖ ≤ tol · max(‖expected‖, floor); NaN fails, since no comparison with it holds."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    diff, limit = np.linalg.norm(found - expected), tol * max(np.linalg.norm(expected), floor)
    assert diff <= limit, f"off by {diff:.3g}, allowed {limit:.3g}"


def check_gradients(function, arrays, grads, full=48, directions=3, tol=1e-6):
    """Compare the gradients of ``function(*arrays)``, a number, with its central differences in float64.

    Up to ``full`` elements each is moved by itself; a larger array is moved along a few random directions.
    """
    rng = np.random.default_rng(0)
    for i, (array, grad) in enumerate(zip(arrays, grads, strict=True)):
        assert grad.shape == array.shape

        def moved(way, h, i=i, array=array):
            return function(*arrays[:i], array + h * way.reshape(array.shape), *arrays[i + 1 :])

        size = array.size
        ways = np.eye(size) if size <= full else rng.choice([-1, 1], (directions, size)) / size**0.5
        assert_close(ways @ grad.ravel(), [slope(partial(moved, way)) for way in ways], tol)


def slope(f, h=3e-5):
    """Return f'(0) by the central difference of fourth order: a wide step costs no accuracy and rounds less."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def check_component(forward, backward, arrays, rng, tol32=1e-5):
    """Check a component: its gradients, its float32, and that it leaves alone what it is given.

    ``forward(*arrays)`` gives (y, saved) and ``backward(dy, saved)`` the gradients of the arrays.
    """
    y, saved = forward(*arrays)
    dy = rng.standard_normal(np.shape(y)) if np.ndim(y) else rng.standard_normal()
    given = [np.copy(a) for a in (*arrays, dy)]
    grads = _as_tuple(backward(dy, saved))
    check_gradients(lambda *moved: np.sum(forward(*moved)[0] * dy), arrays, grads)
    again = _as_tuple(backward(dy, saved))
    assert all(np.array_equal(a, b) for a, b in zip(grads, again, strict=True)), "the backward changed what was saved"
    assert all(np.array_equal(a, b) for a, b in zip(given, (*arrays, dy))), "an argument was changed"

    singles = [a.astype(np.float32) for a in arrays]
    doubles = [a.astype(np.float64) for a in singles]  # the same numbers, so that only the arithmetic differs
    dy32 = dy.astype(np.float32) if np.ndim(dy) else dy
    (y32, saved32), (y64, saved64) = forward(*singles), forward(*doubles)
    grads32, grads64 = _as_tuple(backward(dy32, saved32)), _as_tuple(backward(np.float64(dy32), saved64))
    assert isinstance(y32, float) or y32.dtype == np.float32
    assert all(grad.dtype == np.float32 for grad in grads32)
    for single, double in zip((y32, *grads32), (y64, *grads64)):
        assert_close(single, double, tol32, floor=1.0)


def _as_tuple(grads):
    return grads if isinstance(grads, tuple) else (grads,)
