"""Throughput: the formulas against every routing of a small case, the cache against one that is kept slot by slot."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import Mixtral, MixtralConfig, cli
from tinymoe.experiments import throughput
from tinymoe.experiments.throughput import expected_distinct, lru_hit_rates, weights_read


@given(st.integers(1, 4), st.data())
def test_expected_distinct_is_the_mean_over_every_routing_of_a_batch(E, data):
    k, B = data.draw(st.integers(1, E)), data.draw(st.integers(1, 3))
    choices = list(itertools.combinations(range(E), k))
    mean = np.mean([len(set().union(*batch)) for batch in itertools.product(choices, repeat=B)])
    assert expected_distinct(np.full(E, k / E), B) == pytest.approx(mean)
    assert E * (1 - (1 - k / E) ** B) == pytest.approx(mean)


@given(st.integers(1, 3), st.integers(1, 3), rngs)
def test_expected_distinct_with_a_load_is_the_mean_over_every_routing_by_its_probability(k, B, rng):
    E = 3
    choices = list(itertools.combinations(range(E), k))
    probability = rng.dirichlet(np.ones(len(choices)))
    inclusion = np.array([sum(p for c, p in zip(choices, probability) if e in c) for e in range(E)])
    mean = sum(
        np.prod([probability[i] for i in batch]) * len(set().union(*(choices[i] for i in batch)))
        for batch in itertools.product(range(len(choices)), repeat=B)
    )
    assert expected_distinct(inclusion, B) == pytest.approx(mean)


def test_weights_read_at_batch_1_are_the_active_parameters_without_the_rest_of_the_embedding():
    for config in (MixtralConfig.tiny(), MixtralConfig.mixtral_8x7b()):
        k, L, D, V = config.top_k_experts, config.n_layers, config.dim, config.vocab_size
        read = weights_read(config, L * k, 1, itemsize=2)
        assert read == 2 * (config.count_active_parameters() - V * D + D)
        every = weights_read(config, L * config.num_experts, 128, itemsize=2)
        assert every == pytest.approx(2 * ((config.count_parameters() - V * D) / 128 + D))


@st.composite
def texts(draw):
    """Draw the choices (T, k) of a text, and E; some texts stay with few experts."""
    E, T, rng = draw(st.integers(1, 6)), draw(st.integers(1, 30)), draw(rngs)
    k = draw(st.integers(1, E))
    used = rng.permutation(E)[: draw(st.integers(k, E))]
    return np.array([rng.permutation(used)[:k] for _ in range(T)]), E


def kept_slot_by_slot(experts, num_experts, slots):
    """Count the hits of a cache that holds a time of last use for each of its experts, and evicts the oldest."""
    cache = {e: -e for e in range(slots)}  # expert -> when it was last used
    hits, now = 0, 1
    for asked in experts.tolist():
        hits += sum(e in cache for e in asked)
        for e in reversed(asked):  # the first choice is the last used
            cache[e] = now = now + 1
        while len(cache) > slots:
            del cache[min(cache, key=cache.__getitem__)]
    return hits / experts.size


@given(texts())
def test_lru_hits_are_those_of_a_cache_kept_slot_by_slot(text):
    experts, E = text
    rates = lru_hit_rates(experts, E)
    for slots in range(experts.shape[1], E + 1):
        assert rates[slots - 1] == pytest.approx(kept_slot_by_slot(experts, E, slots))
    assert rates[-1] == pytest.approx(1)


def test_of_a_tokens_experts_the_first_choice_stays_longest():
    text = np.array([[0, 1], [2, 3], [0, 4]])  # three slots hold 2, 3 and 0 when the last token comes
    assert lru_hit_rates(text, 5)[2] == pytest.approx((2 + 1 + 1) / 6)  # at first they hold 0, 1 and 2
    assert kept_slot_by_slot(text, 5, 3) == pytest.approx(4 / 6)
    text[0] = [1, 0]
    assert lru_hit_rates(text, 5)[2] == pytest.approx((2 + 1 + 0) / 6)


@pytest.mark.parametrize(("E", "k", "T"), [(3, 1, 4), (4, 2, 3), (3, 2, 4)])
def test_uniform_choices_hit_n_of_E_on_average_over_every_text(E, k, T):
    choices = list(itertools.permutations(range(E), k))
    mean = np.mean([lru_hit_rates(np.array(t), E) for t in itertools.product(choices, repeat=T)], axis=0)
    np.testing.assert_allclose(mean[k - 1 :], np.arange(k, E + 1) / E)


def test_a_text_that_stays_with_its_experts_always_hits_and_one_that_alternates_never():
    stays = np.tile([[4, 5]], (50, 1))
    assert lru_hit_rates(stays, 6)[1] == pytest.approx(49 / 50)
    alternates = np.tile([[0, 1], [2, 3]], (50, 1))
    assert lru_hit_rates(alternates, 6)[1] == pytest.approx(2 / 200)  # the first token, whose experts are there
    assert lru_hit_rates(alternates, 6)[3] == 1


def test_shuffling_keeps_the_load_of_a_text_and_loses_its_order():
    chosen = np.zeros((4, 60, 1), int)
    chosen[:, 20:40], chosen[:, 40:] = 1, 2  # long runs of three experts
    rates = throughput._hit_rates(chosen, 4, seed=0)
    assert rates["generated"][0] == pytest.approx(58 / 60)
    assert rates["shuffled"][0] == pytest.approx(1 / 3, abs=0.1)
    assert rates["independent"][0] == pytest.approx(1 / 3, abs=0.1)
    assert rates["uniform"] == [0.25, 0.5, 0.75, 1.0]
    assert rates["load"] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_distinct_experts_of_a_trained_model_are_counted_in_texts_of_one_step():
    same = np.tile(np.array([0, 3]), (2, 5, 7, 1))  # (L, texts, T, k): all texts choose alike
    counted = throughput._distinct(same, 4, 8, seed=0)
    assert counted["distinct"] == [2, 2]
    assert counted["distinct_load"] == pytest.approx([2, 2])
    assert counted["distinct_uniform"] == pytest.approx(8 * (1 - 0.75**4))
    apart = np.arange(4).reshape(1, 4, 1, 1).repeat(7, axis=2)  # text i always chooses expert i
    assert throughput._distinct(apart, 4, 8, seed=0)["distinct"] == [4]


def test_decoding_counts_what_the_model_routed():
    model = Mixtral.init(MixtralConfig.tiny(top_k_experts=8))  # every token uses all experts
    line = throughput._decode(model, 2, 1, seed=0)
    assert line["distinct"] == [8, 8]
    assert line["bytes_per_token"] == line["bytes_per_token_uniform"] == weights_read(model.config, 16, 2)
    assert line["tokens_per_second"] > 0


def test_quick_mode_writes_numbers_and_figure(tmp_path):
    assert cli.main(["experiment", "throughput", "--quick", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "throughput.json").read_text())["numbers"]
    assert [line["batch"] for line in numbers["random"]["batches"]] == [1, 2, 4]
    first = numbers["random"]["batches"][0]
    assert first["distinct"] == [2, 2]  # one token uses its k
    assert first["distinct_uniform"] == 2
    assert set(numbers["trained"]) == set(numbers["cache"]) == {"without balancing", "Switch loss"}
    for line in itertools.chain(*numbers["trained"].values()):
        assert all(2 <= distinct <= min(8, 2 * line["batch"]) for distinct in line["distinct"])
    for layer in itertools.chain(*numbers["cache"].values()):
        assert layer["slots"] == list(range(2, 9))
        for name in ("generated", "shuffled", "independent", "uniform"):
            assert layer[name] == sorted(layer[name])
            assert layer[name][-1] == pytest.approx(1)
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
