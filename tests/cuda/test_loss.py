"""Cross-entropy on the device equals the reference's."""

import math

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.loss import cross_entropy, cross_entropy_backward
from tinymoe.reference.loss import IGNORED

sizes = st.tuples(st.integers(1, 30), st.integers(1, 40)) | st.sampled_from([(2, 1300), (3, 256), (1, 257), (300, 2)])


@st.composite
def logits_and_targets(draw):
    """Draw logits of any spread and height, and targets, all, some or none of which count."""
    (N, V), rng = draw(sizes), draw(rngs)
    logits = draw(st.sampled_from([1, 5])) * rng.standard_normal((N, V)) + draw(st.sampled_from([0, -300, 3000]))
    targets = rng.integers(V, size=N).astype(np.int32)
    targets[rng.random(N) < draw(st.sampled_from([0, 0.5, 1]))] = IGNORED
    return logits, targets


@pytest.mark.parametrize("where", EVERYWHERE)
@given(logits_and_targets(), st.sampled_from([1.0, -0.3]), dtypes, orders)
def test_equals_the_reference(where, drawn, dloss, dtype, order):
    targets = drawn[1]
    with running(where, order):
        (logits,), (logits64,) = on_device(drawn[0], dtype=dtype)
        loss, saved = cross_entropy(logits, device.array(targets))
        dlogits = cross_entropy_backward(dloss, saved)
        expected, expected_saved = reference.cross_entropy(logits64, targets)
        assert_equivalent(loss, [expected])
        of_one_hots = abs(dloss) / math.sqrt(max(expected_saved.counted, 1))
        expected = reference.cross_entropy_backward(dloss, expected_saved)
        assert_equivalent(dlogits, expected, floor=of_one_hots)
        assert not device.host(dlogits)[targets == IGNORED].any()
        assert device.host(saved.counted).tolist() == [expected_saved.counted]
        assert_same_bits([cross_entropy(logits, device.array(targets))[0]], [loss])
        assert_same_bits([cross_entropy_backward(dloss, saved)], [dlogits])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 700), st.floats(0, 1), orders, rngs)
def test_mean_is_over_the_rows_that_count(where, N, ignored, order, rng):
    targets = np.where(rng.random(N) < ignored, IGNORED, 0).astype(np.int32)
    logits = np.where(targets[:, None] == IGNORED, rng.standard_normal((N, 2)), [0, 1]).astype(np.float32)
    counted = int((targets != IGNORED).sum())
    with running(where, order):
        loss, saved = cross_entropy(device.array(logits), device.array(targets))
        assert device.host(saved.counted).tolist() == [counted]
        assert_equivalent(loss, [math.log1p(math.e) if counted else 0])


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("V", [1, 2, 256, 32000])
def test_uniform_logits_give_ln_V(where, V):
    with device.using(where):
        loss, _ = cross_entropy(
            device.array(np.full((3, V), -7.5, np.float32)), device.array([0, V - 1, V // 2], np.int32)
        )
        assert float(device.host(loss)[0]) == pytest.approx(math.log(V), rel=1e-6)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_do_not_overflow(where, size):
    with device.using(where):
        logits = device.array(np.array([[size, -size], [size, -size]], np.float32))
        loss, saved = cross_entropy(logits, device.array([0, 1], np.int32))
        assert float(device.host(loss)[0]) == pytest.approx(size)
        np.testing.assert_array_equal(device.host(cross_entropy_backward(1.0, saved)), [[0, 0], [0.5, -0.5]])


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("V", [3, 700])
def test_a_logit_of_minus_infinity_has_no_probability(where, V):
    logits = np.full((1, V), -np.inf, np.float32)
    logits[0, [0, V - 1]] = 2, 2 + math.log(3)
    with device.using(where):
        loss, saved = cross_entropy(device.array(logits), device.array([0], np.int32))
        assert float(device.host(loss)[0]) == pytest.approx(math.log(4), rel=1e-6)
        dlogits = device.host(cross_entropy_backward(1.0, saved))
        assert dlogits[0, [0, V - 1]] == pytest.approx([-0.75, 0.75], rel=1e-6)
        assert not dlogits[0, 1:-1].any()


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("at", [0, 1, 299])
def test_NaN_shows_in_the_loss_unless_its_row_is_ignored(where, at):
    logits = np.zeros((2, 300), np.float32)
    logits[1, at] = np.nan
    with device.using(where):
        loss, _ = cross_entropy(device.array(logits), device.array([0, 2], np.int32))
        assert math.isnan(device.host(loss)[0])
        loss, saved = cross_entropy(device.array(logits), device.array([0, IGNORED], np.int32))
        assert float(device.host(loss)[0]) == pytest.approx(math.log(300), rel=1e-6)
        assert not device.host(cross_entropy_backward(1.0, saved))[1].any()
