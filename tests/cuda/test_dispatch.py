"""Dispatch on the device makes the reference's plan, slot by slot, and carries the same rows."""

from unittest import mock

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_equivalent, assert_same_bits, doubles, dtypes, on_device, orders, running
from hypothesis import given
from hypothesis import strategies as st
from strategies import Routed, rngs, routings

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.dispatch import (
    FEW_PAIRS,
    PAIRS,
    combine,
    combine_backward,
    dispatch,
    drop_overflow,
    dropped_share,
    gather,
    gather_backward,
)
from tinymoe.errors import InputError

ragged = routings(dropped=True)
widths = st.integers(1, 150) | st.integers(1, 40).map(lambda packs: 4 * packs)


@st.composite
def long_routings(draw):
    """Draw a routing of several blocks of pairs: few experts or many, of which some may get everything or nothing."""
    E, rng = draw(st.integers(1, 9) | st.integers(1, 300)), draw(rngs)
    k = draw(st.integers(1, min(E, 4)))
    N, used = draw(st.integers(1, 1800 // k)), draw(st.integers(k, E))
    experts = rng.permutation(E)[rng.random((N, used)).argsort(axis=1)[:, :k]]
    experts[rng.random((N, k)) < draw(st.sampled_from([0, 0.3, 1]))] = -1
    return Routed(experts, E)


def littered(shape, dtype, empty=device.empty):
    """Return what `device.empty` might on a GPU: the emulator fills integers with −1, which here is an answer."""
    array = empty(shape, dtype)
    array[...] = 77
    return array


def plans(routed, few=FEW_PAIRS):
    """Return the plan that the device makes, and the reference's."""
    with mock.patch.object(device, "empty", littered), mock.patch("tinymoe.cuda.dispatch.FEW_PAIRS", few):
        plan = dispatch(device.array(routed.experts, np.int32), routed.num_experts)
    return plan, reference.dispatch(*routed)


def assert_same_plan(plan, expected):
    tokens, offsets, slots = map(device.host, plan)
    S = len(expected.tokens)
    np.testing.assert_array_equal(tokens[:S], expected.tokens)
    assert (tokens[S:] == -1).all()
    assert len(tokens) == slots.size
    assert offsets.tolist() == expected.offsets
    np.testing.assert_array_equal(slots, expected.slots)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(ragged | long_routings(), st.sampled_from([0, FEW_PAIRS, PAIRS]), orders)  # few: by one block
def test_plan_is_the_reference_s_slot_by_slot(where, routed, few, order):
    with running(where, order):
        plan, expected = plans(routed, few)
        assert_same_plan(plan, expected)
        assert_same_bits(plans(routed, few)[0], plan)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_one_block_sorts_as_many_pairs_as_it_has_threads(where):
    experts = np.random.default_rng(0).integers(-1, 9, (PAIRS // 2, 2))
    with running(where, ("shuffled", 0, 0)):
        assert_same_plan(*plans(Routed(experts, 9), PAIRS))


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("E", [683, 1000, 1024])
def test_plan_of_very_many_experts(where, E):  # the scan takes 3 E counts, 1024 at a time; of 683, one is left over
    experts = np.random.default_rng(0).integers(-1, E, (700, 1))
    with running(where, ("shuffled", 0, 0)):
        assert_same_plan(*plans(Routed(experts, E)))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_ids_that_name_no_expert_go_nowhere(where):
    with running(where, ("forward", 0, 0)):
        plan = dispatch(device.array([[0, 3], [1 << 30, 1], [-(1 << 30), -1]], np.int32), 3)
    assert device.host(plan.slots).tolist() == [[0, -1], [-1, 1], [-1, -1]]
    assert device.host(plan.offsets).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("E", [0, 1025])
def test_more_experts_than_fit_are_refused(E):
    with running("emulated", ("forward", 0, 0)), pytest.raises(InputError, match="1024"):
        dispatch(device.zeros((3, 2), np.int32), E)


def in_slots(rows, plan, dtype):
    """Return rows (S, D) in as many slots as the device has, NaN in those that no pair has; and what they became."""
    padded = np.full((plan.slots.size, rows.shape[1]), np.nan)
    padded[: len(rows)] = rows
    (there,), _ = on_device(padded, dtype=dtype)
    return there, doubles(there)[: len(rows)]


@pytest.mark.parametrize("where", EVERYWHERE)
@given(ragged, widths, dtypes, orders, rngs)
def test_gather_copies_rows_and_its_backward_adds_them(where, routed, D, dtype, order, rng):
    with running(where, order):
        plan, expected_plan = plans(routed)
        (x,), (x64,) = on_device(rng.standard_normal((len(routed.experts), D)), dtype=dtype)
        rows, saved = gather(x, plan)
        expected, expected_saved = reference.gather(x64, expected_plan)
        np.testing.assert_array_equal(doubles(rows)[: len(expected)], expected)
        assert not doubles(rows)[len(expected) :].any()
        assert_same_bits(gather(x, plan)[:1], [rows])

        drows, drows64 = in_slots(rng.standard_normal(expected.shape), expected_plan, dtype)
        dx = gather_backward(drows, saved)
        assert dx.dtype == dtype
        assert_equivalent(dx, reference.gather_backward(drows64, expected_saved), floor=np.linalg.norm(drows64))
        assert_same_bits([gather_backward(drows, saved)], [dx])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(ragged, widths, dtypes, orders, rngs)
def test_combine_and_its_backward_equal_the_reference(where, routed, D, dtype, order, rng):
    with running(where, order):
        plan, expected_plan = plans(routed)
        N, k = routed.experts.shape
        out, out64 = in_slots(rng.standard_normal((len(expected_plan.tokens), D)), expected_plan, dtype)
        (dy,), (dy64,) = on_device(rng.standard_normal((N, D)), dtype=dtype)
        (weights,), (weights64,) = on_device(rng.random((N, k)), dtype=np.float32)
        y, saved = combine(out, weights, plan)
        expected, expected_saved = reference.combine(out64, weights64, expected_plan)
        assert y.dtype == dtype
        assert_equivalent(y, expected, floor=np.linalg.norm(out64))
        assert_same_bits(combine(out, weights, plan)[:1], [y])

        dout, dweights = combine_backward(dy, saved)
        expected_dout, expected_dweights = reference.combine_backward(dy64, expected_saved)
        assert_equivalent(doubles(dout)[: len(out64)].astype(dtype), expected_dout)
        assert not doubles(dout)[len(out64) :].any()
        products = np.linalg.norm(dy64) * np.linalg.norm(out64)
        assert_equivalent(dweights, expected_dweights, floor=products / (N * k))
        assert not device.host(dweights)[routed.experts < 0].any()
        assert_same_bits(combine_backward(dy, saved), (dout, dweights))


@pytest.mark.parametrize("where", EVERYWHERE)
@given(ragged, widths, orders, rngs)
def test_equal_experts_give_back_what_was_gathered(where, routed, D, order, rng):
    kept = (routed.experts >= 0).sum(axis=1, keepdims=True)
    with running(where, order):
        plan, _ = plans(routed)
        (x, weights), (x64, _) = on_device(
            rng.standard_normal((len(kept), D)), np.full(routed.experts.shape, 0.5), dtype=np.float32
        )
        y, _ = combine(gather(x, plan)[0], weights, plan)
    assert_equivalent(y, x64 * kept / 2)


# Capacity.


@pytest.mark.parametrize("where", EVERYWHERE)
@given(ragged | long_routings(), st.integers(0, 20) | st.integers(0, 500), orders)
def test_drop_overflow_keeps_the_reference_s_pairs(where, routed, capacity, order):
    with running(where, order), mock.patch.object(device, "empty", littered):
        experts = device.array(routed.experts, np.int32)
        kept = drop_overflow(experts, routed.num_experts, capacity)
        expected = reference.drop_overflow(routed.experts, routed.num_experts, capacity)
        np.testing.assert_array_equal(device.host(kept), expected)
        assert_same_bits([drop_overflow(experts, routed.num_experts, capacity)], [kept])
        share = dropped_share(dispatch(kept, routed.num_experts))
        np.testing.assert_allclose(device.host(share), [np.mean(expected < 0)], rtol=1e-6)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_ids_that_name_no_expert_fill_no_capacity(where):
    with running(where, ("forward", 0, 0)):
        kept = drop_overflow(device.array([[3, 0], [-7, 1 << 30], [0, 2], [1, 0]], np.int32), 3, 1)
    assert device.host(kept).tolist() == [[-1, -1], [-1, -1], [0, 2], [1, -1]]


@pytest.mark.parametrize("where", EVERYWHERE)
@given(ragged, widths, dtypes, orders, rngs, st.data())
def test_a_plan_may_have_as_few_slots_as_are_filled(where, routed, D, dtype, order, rng, data):
    with running(where, order):
        plan, expected_plan = plans(routed)
        (N, k), filled = routed.experts.shape, len(expected_plan.tokens)
        S = data.draw(st.integers(filled, N * k))
        cut = plan._replace(tokens=plan.tokens[:S])
        (x, dy), _ = on_device(*rng.standard_normal((2, N, D)), dtype=dtype)
        (weights,), _ = on_device(rng.random((N, k)), dtype=np.float32)
        out, _ = in_slots(rng.standard_normal((filled, D)), expected_plan, dtype)
        few, many = (gather(x, p)[0] for p in (cut, plan))
        assert few.shape == (S, D)
        assert_same_bits([few], [many[:S]])
        (y, saved), (expected, expected_saved) = combine(out[:S], weights, cut), combine(out, weights, plan)
        assert_same_bits([y], [expected])
        (dout, dweights), (all_dout, all_dweights) = (combine_backward(dy, s) for s in (saved, expected_saved))
        assert_same_bits([dout, dweights], [all_dout[:S], all_dweights])
        assert dout.shape == (S, D)
