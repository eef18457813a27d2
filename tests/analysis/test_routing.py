"""The numbers of routing, against enumeration, simulation and closed forms."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs, routings

from tinymoe.analysis import routing
from tinymoe.analysis.observe import Observed


@st.composite
def windows(draw, size):
    """Draw the window of each of N tokens: runs of any length."""
    return np.cumsum(draw(st.lists(st.booleans(), min_size=size, max_size=size)))


# Chance.


@given(st.integers(1, 7), st.data())
def test_chance_is_that_of_all_pairs_of_sets(num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    sets = [set(chosen) for chosen in itertools.combinations(range(num_experts), top_k)]
    common = sum(bool(a & b) for a in sets for b in sets)
    assert math.isclose(routing.repetition_by_chance(num_experts, top_k), common / len(sets) ** 2)


def test_chance_is_the_paper_s():
    assert routing.repetition_by_chance(8, 1) == 1 / 8
    assert math.isclose(routing.repetition_by_chance(8, 2), 1 - (6 / 8) * (5 / 7))
    assert routing.repetition_by_chance(8, 8) == routing.repetition_by_chance(8, 5) == 1


@given(routings())
def test_chance_at_the_load_is_that_of_all_pairs_of_tokens(routed):
    sets = [set(chosen) for chosen in routed.experts.tolist()]
    common = sum(bool(a & b) for a in sets for b in sets)
    found = routing.repetition_by_load(routed.experts, routed.num_experts)
    assert math.isclose(found, common / len(sets) ** 2, abs_tol=1e-12)


def test_chance_at_the_load_is_the_sum_of_squares_for_one_choice():
    load = np.array([50, 30, 20])
    found = routing.repetition_by_load(np.repeat([0, 1, 2], load)[:, None], 3)
    assert math.isclose(found, 0.5**2 + 0.3**2 + 0.2**2)


def test_more_sets_than_can_be_compared_are_sampled():
    experts = np.argsort(np.random.default_rng(0).random((6000, 64)), axis=1)[:, :4]
    assert abs(routing.repetition_by_load(experts, 64) - routing.repetition_by_chance(64, 4)) < 0.01


# Repetition.


@given(routings(), st.data())
def test_repetition_is_that_of_a_loop_over_neighbours(routed, data):
    experts = routed.experts
    window = data.draw(windows(len(experts)))
    pairs = [n for n in range(len(experts) - 1) if window[n] == window[n + 1]]
    repeated, first = routing.repeats(experts, window)
    assert first.tolist() == pairs
    assert repeated.tolist() == [bool({*experts[n]} & {*experts[n + 1]}) for n in pairs]


def test_tokens_that_are_drawn_independently_repeat_as_often_as_chance_says():
    rng = np.random.default_rng(1)
    experts = np.argsort(rng.random((40_000, 8)), axis=1)[:, :2]
    window = np.zeros(len(experts), int)
    for k in (1, 2):
        repeated, _ = routing.repeats(experts[:, :k], window)
        assert abs(repeated.mean() - routing.repetition_by_chance(8, k)) < 0.01
        assert abs(routing.repetition_by_load(experts[:, :k], 8) - routing.repetition_by_chance(8, k)) < 0.01


# Load and its intervals.


@given(routings(), st.data())
def test_tally_counts_every_choice_of_every_block(routed, data):
    block = data.draw(windows(len(routed.experts)))
    counted = Counter((b, e) for b, chosen in zip(block.tolist(), routed.experts.tolist()) for e in chosen)
    found = routing.tally(routed.experts, block, routed.num_experts)
    assert {cell: n for cell, n in np.ndenumerate(found) if n} == counted


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 40), rngs)
def test_intervals_hold_the_share_and_stay_between_0_and_1(B, C, most, rng):
    counts = rng.integers(0, most + 1, (B, C)) * (rng.random(C) < 0.7)
    counts[0, 0] += 1
    share, low, high = routing.shares(counts)
    assert np.allclose(share, counts.sum(axis=0) / counts.sum())
    assert (low >= 0).all()
    assert (low <= share + 1e-12).all()
    assert (share <= high + 1e-12).all()
    assert (high <= 1).all()
    assert ((high - low) > 0).all()


def test_a_single_block_tells_nothing():
    _, low, high = routing.shares(np.array([[900, 100], [0, 0]]))
    assert low.tolist() == [0, 0]
    assert high.tolist() == [1, 1]


def test_independent_tokens_have_wilson_s_interval():
    tokens = np.random.default_rng(2).choice(4, 4000, p=[0.1, 0.2, 0.3, 0.4])
    share, low, high = routing.shares(np.eye(4, dtype=int)[tokens])
    wide = 2 * routing.Z * np.sqrt(share * (1 - share) / len(tokens))
    assert np.allclose(high - low, wide, rtol=0.02)


def test_the_design_effect_of_two_blocks_by_hand():
    _, low, high = routing.shares(np.array([[8, 2], [2, 8]]))
    design_effect = (2 * 2 * (3**2 + 3**2) / 20**2) / (2 * 0.5 * 0.5 / 20)
    expected_low, expected_high = routing.wilson(np.array([0.5, 0.5]), 20 / design_effect)
    assert np.allclose(low, expected_low)
    assert np.allclose(high, expected_high)


def coverage(stay, trials=300):
    """Return how often the interval holds the true share if a token keeps its neighbour's expert that often."""
    rng = np.random.default_rng(3)
    p = np.array([0.5, 0.3, 0.15, 0.05])
    held = naive = 0
    for _ in range(trials):
        fresh = rng.choice(4, 2048, p=p)
        last = np.maximum.accumulate(np.where(rng.random(2048) < stay, 0, np.arange(2048)))
        tokens, window = fresh[last], np.arange(2048) // 256
        share, low, high = routing.shares(routing.tally(tokens, routing.blocks(window, window), 4))
        held += ((low <= p) & (p <= high)).mean() / trials
        low, high = routing.wilson(share, 2048)
        naive += ((low <= p) & (p <= high)).mean() / trials
    return held, naive


def test_intervals_of_independent_tokens_cover_95_percent():
    held, _ = coverage(stay=0.0)
    assert 0.93 < held < 0.985


def test_intervals_of_dependent_tokens_cover_95_percent_where_naive_ones_fail():
    held, naive = coverage(stay=0.8)
    assert 0.92 < held < 0.98
    assert naive < 0.6


def test_blocks_are_documents_if_there_are_enough_and_runs_within_windows_otherwise():
    document = np.repeat(np.arange(20), 3)
    assert routing.blocks(document, np.arange(60)).tolist() == document.tolist()
    window = np.repeat([0, 1], [100, 30])
    blocks = routing.blocks(np.zeros(130, int), window)
    assert np.bincount(blocks).tolist() == [64, 36, 30]
    assert routing.blocks(np.zeros(1, int), np.zeros(1, int)).tolist() == [0]


# Pairs.


def test_pairs_are_counted_by_first_and_second_choice():
    counts = routing.pair_counts(np.array([[0, 1, 2], [0, 1, 3], [2, 0, 1]]), 4)
    assert counts[0, 1] == 2
    assert counts[2, 0] == 1
    assert counts.sum() == 3


@given(st.integers(2, 7), st.integers(0, 400), rngs)
def test_expected_pairs_have_the_margins_of_those_seen_and_none_on_the_diagonal(E, N, rng):
    experts = np.argsort(rng.random((N, E)) * rng.random(E), axis=1)[:, :2]
    counts = routing.pair_counts(experts, E)
    expected = routing.expected_pairs(counts)
    assert (np.diag(expected) == 0).all()
    assert np.abs(expected.sum(axis=0) - counts.sum(axis=0)).max() <= 1e-6 * N
    assert np.abs(expected.sum(axis=1) - counts.sum(axis=1)).max() <= 0.02 * N  # slow where one expert has half of all


def test_pairs_that_do_not_depend_are_as_expected():
    rng, a, b = np.random.default_rng(4), np.array([4, 3, 2, 1]), np.array([1, 1, 3, 5])
    weight = np.outer(a, b) * (1 - np.eye(4))
    cells = rng.choice(16, 200_000, p=(weight / weight.sum()).ravel())
    counts = routing.pair_counts(np.stack([cells // 4, cells % 4], axis=1), 4)
    expected = routing.expected_pairs(counts)
    off = ~np.eye(4, dtype=bool)
    assert np.allclose(counts[off] / expected[off], 1, atol=0.06)


# Confidence.


@given(st.integers(1, 40), st.integers(1, 9), rngs)
def test_entropy_is_between_0_and_ln_E(N, E, rng):
    probs = rng.dirichlet(np.full(E, 0.3), N)
    found = routing.entropy(probs)
    assert -1e-12 <= found <= math.log(E) + 1e-9
    assert math.isclose(found, np.mean([-sum(p * math.log(p) for p in row if p > 0) for row in probs]), abs_tol=1e-9)


def test_entropy_has_its_extremes():
    assert math.isclose(routing.entropy(np.full((3, 8), 1 / 8)), math.log(8))
    assert routing.entropy(np.eye(8)) == 0


def test_margins():
    probs = np.array([[0.5, 0.1, 0.4], [0.2, 0.2, 0.6]])
    assert math.isclose(routing.margin(probs, 1), (0.1 + 0.4) / 2)
    assert math.isclose(routing.margin(probs, 2), (0.3 + 0.0) / 2)
    assert routing.margin(probs, 3) is None


# All of it.


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_summary_is_plain_numbers_and_knows_what_is_undefined(top_k):
    rng = np.random.default_rng(5)
    probs = rng.dirichlet(np.ones(3), (2, 200))
    experts = np.argsort(-probs, axis=2)[:, :, :top_k]
    window = np.repeat([0, 1], 100)
    found = routing.summarise(Observed(np.zeros(200), window, window, experts, probs))
    assert (found["tokens"], found["pairs"], found["blocks"], len(found["layers"])) == (200, 198, 4, 2)
    for layer in found["layers"]:
        assert math.isclose(sum(layer["first"]["share"]), 1)
        assert math.isclose(sum(layer["chosen"]["share"]), 1)
        assert layer["repeat_first"]["low"] < layer["repeat_first"]["share"] < layer["repeat_first"]["high"]
        assert (layer["margin_chosen"] is None) == (top_k == 3)
        assert (layer["pairs"] is None) == (top_k == 1)
    if top_k == 3:
        assert found["layers"][0]["repeat_chosen"]["share"] == found["layers"][0]["repeat_chosen"]["by_load"] == 1


def test_a_single_token_has_a_load_but_no_repetition():
    zero = np.zeros(1, int)
    found = routing.summarise(Observed(zero, zero, zero, np.array([[[1, 0]]]), np.array([[[0.2, 0.8]]])))
    (layer,) = found["layers"]
    assert layer["first"] == {"share": [0, 1], "low": [0, 0], "high": [1, 1]}
    assert layer["repeat_first"]["share"] is None
