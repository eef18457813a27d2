"""Dispatch, gather and combine: a permutation and the way back, and each other's adjoints."""

import numpy as np
from gradients import assert_close, check_component
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs, routings

from tinymoe.reference import combine, combine_backward, dispatch, gather, gather_backward

ragged = routings(dropped=True)
widths = st.integers(1, 5)


def test_plan_by_hand():
    plan = dispatch(np.array([[2, 0], [0, -1], [2, 3], [0, 2]]), 5)
    assert plan.tokens.tolist() == [0, 1, 3, 0, 2, 3, 2]
    assert plan.offsets == [0, 3, 3, 6, 7, 7]
    assert plan.slots.tolist() == [[3, 0], [1, -1], [4, 6], [2, 5]]


@given(ragged)
def test_every_pair_has_its_slot_among_its_experts_and_dropped_ones_have_none(routed):
    plan = dispatch(*routed)
    np.testing.assert_array_equal(plan.slots < 0, routed.experts < 0)
    kept = plan.slots[plan.slots >= 0]
    assert sorted(kept) == list(range(len(plan.tokens)))
    assert len(plan.offsets) == routed.num_experts + 1
    assert (plan.offsets[0], plan.offsets[-1]) == (0, len(plan.tokens))
    for (n, choice), e in np.ndenumerate(routed.experts):
        if e >= 0:
            slot = plan.slots[n, choice]
            assert plan.tokens[slot] == n
            assert plan.offsets[e] <= slot < plan.offsets[e + 1]


@given(ragged)
def test_tokens_of_an_expert_stay_in_the_order_of_the_text(routed):
    plan = dispatch(*routed)
    for start, end in zip(plan.offsets[:-1], plan.offsets[1:]):
        assert (np.diff(plan.tokens[start:end]) > 0).all()


@given(ragged, widths, rngs)
def test_gather_copies_rows_and_its_backward_is_its_adjoint(routed, D, rng):
    plan, x = dispatch(*routed), rng.standard_normal((len(routed.experts), D))
    rows, saved = gather(x, plan)
    np.testing.assert_array_equal(rows, x[plan.tokens])
    drows, expected = rng.standard_normal(rows.shape), np.zeros_like(x)
    np.add.at(expected, plan.tokens, drows)
    dx = gather_backward(drows, saved)
    assert_close(dx, expected, 1e-14)
    assert_close(np.vdot(dx, x), np.vdot(drows, rows), 1e-12, floor=1.0)
    check_component(lambda x: gather(x, plan), gather_backward, [x], rng)


@given(ragged, widths, rngs)
def test_combine_mixes_what_the_loop_mixes_and_its_backward_is_its_adjoint(routed, D, rng):
    plan, (N, k) = dispatch(*routed), routed.experts.shape
    out, weights = rng.standard_normal((len(plan.tokens), D)), rng.standard_normal((N, k))
    y, saved = combine(out, weights, plan)
    expected = np.zeros((N, D))
    for (n, choice), slot in np.ndenumerate(plan.slots):
        if slot >= 0:
            expected[n] += weights[n, choice] * out[slot]
    np.testing.assert_array_equal(y, expected)  # the same sums in the same order
    dy = rng.standard_normal((N, D))
    dout, _ = combine_backward(dy, saved)
    assert_close(np.vdot(dout, out), np.vdot(dy, y), 1e-12, floor=1.0)
    check_component(lambda out, weights: combine(out, weights, plan), combine_backward, [out, weights], rng)


@given(ragged, widths, rngs)
def test_dropped_pairs_add_nothing_and_get_exactly_zero_gradient(routed, D, rng):
    plan, dropped = dispatch(*routed), routed.experts < 0
    weights = rng.standard_normal(dropped.shape)
    out = rng.standard_normal((len(plan.tokens), D))
    y, saved = combine(out, weights, plan)
    np.testing.assert_array_equal(combine(out, np.where(dropped, 1e6, weights), plan)[0], y)
    _, dweights = combine_backward(rng.standard_normal(y.shape), saved)
    nowhere = dropped.all(axis=1)
    assert not y[nowhere].any()
    assert not dweights[dropped].any()
    assert dweights[~dropped].all()
    assert not gather_backward(np.ones_like(out), gather(y, plan)[1])[nowhere].any()


@given(ragged, widths, rngs)
def test_permuting_tokens_permutes_outputs_bit_for_bit(routed, D, rng):
    (experts, E), plan = routed, dispatch(*routed)
    N, k = experts.shape
    x, weights, order = rng.standard_normal((N, D)), rng.standard_normal((N, k)), rng.permutation(N)
    y, _ = combine(gather(x, plan)[0], weights, plan)
    permuted = dispatch(experts[order], E)
    np.testing.assert_array_equal(combine(gather(x[order], permuted)[0], weights[order], permuted)[0], y[order])
