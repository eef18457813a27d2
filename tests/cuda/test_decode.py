"""A step of decoding as one graph: the whole forward's logits for any mix of texts, and no word to the host."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from emulation import EVERYWHERE, Order, assert_same_bits, dtypes, on_device, orders, running
from gradients import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import random_params, rngs, varied_configs

from tinymoe import Mixtral, MixtralConfig, generate
from tinymoe.cuda import decode, device
from tinymoe.reference import softmax

IN_ORDER = Order("forward", 0, 0)
CONFIG = MixtralConfig(
    dim=16,
    n_layers=2,
    head_dim=4,
    hidden_dim=24,
    n_heads=4,
    n_kv_heads=2,
    context_len=200,
    vocab_size=40,
    num_experts=4,
    top_k_experts=2,
)
KINDS = {
    "plain": CONFIG,
    "window": replace(CONFIG, sliding_window=5, tie_embeddings=True),
    "dense": replace(CONFIG, num_experts=0, top_k_experts=0),
    "every other": replace(CONFIG, n_layers=3, moe_every=2),
    "bias": replace(CONFIG, bias_update_rate=0.01),
    "expert choice": replace(CONFIG, expert_choice=True),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
ALONE = {name: config for name, config in KINDS.items() if not config.expert_choice}  # else they compete
tokens_choose = pytest.mark.parametrize("config", ALONE.values(), ids=ALONE)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, device.BFLOAT16], ids=["float32", "bfloat16"])


def make_model(config, dtype=np.float32):
    params = random_params(config, np.random.default_rng(0), np.float32)
    return Mixtral(config, {name: p.astype(dtype) for name, p in params.items()}, backend="cuda")


def margin(model, text):
    """Return by how much the choices of experts are decided."""
    k, gaps = model.config.top_k_experts, [np.inf]
    for layer, (_, _, logits) in zip(model.config.moe_layers, model.routing(text[None])):
        ordered = np.sort(softmax(logits) + model.params.get(f"layers.{layer}.moe.bias", 0))
        if k < ordered.shape[1]:
            gaps.append((ordered[:, -k] - ordered[:, -k - 1]).min())
    return min(gaps)


def make_texts(lengths, config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(config.vocab_size, size=length) for length in lengths]


def prefilled(model, texts, spare=9):
    """Return a cache of each text but its last 4 tokens."""
    caches = [model.cache(len(text) + spare) for text in texts]
    for text, cache in zip(texts, caches):
        model.extend([text[:-4]], [cache])
    return caches


def written(model, texts, spare=9):
    """Return caches of the texts, and what the steps of their last 4 tokens gave: of each the logits and experts."""
    caches = prefilled(model, texts, spare)
    return caches, [model.extend([text[t : t + 1 or None] for text in texts], caches) for t in range(-4, 0)]


@st.composite
def conversations(draw):
    """Draw a model, texts, and in which pieces they are fed: rounds of (which texts, how many tokens of each)."""
    config = draw(varied_configs().filter(lambda config: not config.expert_choice))
    longest = min(config.context_len, 20)
    texts = draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    left, rounds = dict(enumerate(texts)), []
    while left:
        fed = draw(st.just(sorted(left)) | st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        many = draw(st.sampled_from([1, 1, 1, 4]))
        rounds.append({i: min(many, left[i]) for i in fed})
        left = {i: n - rounds[-1].get(i, 0) for i, n in left.items() if n > rounds[-1].get(i, 0)}
    return config, texts, rounds, draw(st.lists(st.integers(0, 70), min_size=len(texts), max_size=len(texts)))


# What a step computes.


@pytest.mark.parametrize("where", EVERYWHERE)
@given(conversations(), orders, rngs)
@settings(max_examples=10)
def test_every_step_gives_the_logits_and_experts_of_the_whole_forward(where, drawn, order, rng):
    config, lengths, rounds, spare = drawn
    params, texts = random_params(config, rng, np.float32), [rng.integers(config.vocab_size, size=n) for n in lengths]
    reference = Mixtral(config, params, num_workers=1)
    assume(all(margin(reference, text) > 1e-4 for text in texts))
    whole, routings = [reference(text[None])[0] for text in texts], [reference.routing(text[None]) for text in texts]
    with running(where, order):
        model = Mixtral(config, params, backend="cuda")
        caches = [model.cache(len(text) + more) for text, more in zip(texts, spare)]
        for fed in rounds:
            ends = {i: caches[i].length + n for i, n in fed.items()}
            new = [texts[i][caches[i].length : end] for i, end in ends.items()]
            logits, experts = model.extend(new, [caches[i] for i in fed])
            for row, (i, end) in zip(logits, ends.items()):
                assert caches[i].length == end
                assert_close(row, whole[i][end - 1], 1e-4, floor=1.0)
            assert len(experts) == len(config.moe_layers)
            for layer, chosen in enumerate(experts):
                expected = [routings[i][layer][1][end - fed[i] : end] for i, end in ends.items()]
                np.testing.assert_array_equal(np.sort(chosen), np.sort(np.concatenate(expected)))


@pytest.mark.parametrize("where", EVERYWHERE)
@every_kind
@every_dtype
def test_a_step_gives_what_a_launch_for_each_sequence_gives(where, config, dtype):
    texts = make_texts([9, 17])
    with running(where, IN_ORDER):
        model = make_model(config, dtype)
        _, steps = written(model, texts)
        caches = prefilled(model, texts)
        for t, (logits, experts) in zip(range(-4, 0), steps, strict=True):
            new = [text[t : t + 1 or None] for text in texts]
            expected, expected_experts = model._extend(np.concatenate(new), new, caches)
            assert logits.dtype == dtype
            tolerance = 1e-5 if dtype is np.float32 else 2e-2
            assert_close(logits.astype(np.float64), expected.astype(np.float64), tolerance)
            assert len(experts) == len(config.moe_layers)
            assert_same_bits(experts, expected_experts)


@pytest.mark.parametrize("where", EVERYWHERE)
@tokens_choose
def test_a_text_has_the_same_bits_alone_in_a_batch_and_in_a_longer_cache(where, config):
    texts = make_texts([9, 17, 12])
    with running(where, Order("shuffled", 0, 0)):
        model = make_model(config)
        _, together = written(model, texts)
        for i, text in enumerate(texts):
            _, alone = written(model, [text], spare=130)
            for (logits, experts), (own_logits, own_experts) in zip(together, alone, strict=True):
                assert_same_bits([logits[i]], own_logits)
                assert_same_bits([chosen[i] for chosen in experts], [chosen[0] for chosen in own_experts])


@pytest.mark.parametrize("where", EVERYWHERE)
@every_kind
def test_repeating_gives_the_bits_of_launching(where, config):
    texts = make_texts([9, 17])
    with running(where, Order("shuffled", 0, 0)):
        caches, _ = written(make_model(config), texts)
        step = caches[0].step
        for positions in ([9, 17], [10, 18]):
            repeated = [device.host(array).copy() for array in step([3, 5], positions)]
            assert_same_bits(step.launch(), repeated)
            assert_same_bits(step([3, 5], positions), repeated)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("kind", ["plain", "dense"])
def test_more_tokens_than_the_kernels_for_few_take_are_decoded_all_the_same(where, kind, monkeypatch):
    texts = make_texts([9, 17, 12])
    with running(where, IN_ORDER):
        model = make_model(KINDS[kind])
        _, few = written(model, texts)
        for module in ("decode", "moe"):
            monkeypatch.setattr(importlib.import_module(f"tinymoe.cuda.{module}"), "FEW_PAIRS", 1)
        monkeypatch.setattr(decode, "few_tokens_ffn", None)
        _, many = written(model, texts)
        for (logits, experts), (expected, expected_experts) in zip(many, few, strict=True):
            assert_close(logits, expected, 1e-5)
            assert_same_bits(experts, expected_experts)


# What it asks of the host, and how often it is recorded.


@pytest.mark.parametrize("where", EVERYWHERE)
@every_kind
def test_a_step_asks_nothing_of_the_host(where, config, monkeypatch):
    """Neither copies there and back nor cuBLAS, which CuPy does not record."""

    def forbidden(*_):
        raise AssertionError("this cannot be recorded")

    with running(where, IN_ORDER):
        caches, _ = written(make_model(config, device.BFLOAT16), make_texts([9, 12]))
        for name in ("array", "host", "synchronize"):
            monkeypatch.setattr(device, name, forbidden)
        monkeypatch.setattr(importlib.import_module("tinymoe.cuda.linear"), "matmul", forbidden)
        caches[0].step.launch()


@pytest.fixture
def recordings(monkeypatch):
    """The number of sequences of each graph that is recorded."""
    counted, graph = [], decode.Graph

    def count(run):
        counted.append(len(run.__self__.tokens))
        return graph(run)

    monkeypatch.setattr(decode, "Graph", count)
    return counted


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_text_is_written_by_one_recording_for_each_set_of_prompts_that_have_not_ended(where, recordings):
    with running(where, IN_ORDER):
        model, prompts = make_model(CONFIG), make_texts([3, 9, 5])
        free = generate(model, prompts, 20)
        assert recordings == [3]
        new = [text[len(prompt) :].tolist() for text, prompt in zip(free, prompts)]
        eos = new[0][4]
        ends = [tokens.index(eos) + 1 if eos in tokens else 20 for tokens in new]
        recordings.clear()
        stopped = generate(model, prompts, 20, eos_token=eos)
        for text, whole, prompt, end in zip(stopped, free, prompts, ends):
            np.testing.assert_array_equal(text, whole[: len(prompt) + end])
        steps = [sum(end > fed for end in ends) for fed in range(1, 20)]
        assert recordings == sorted({living for living in steps if living}, reverse=True)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_other_caches_and_another_order_are_recorded_anew(where, recordings):
    with running(where, IN_ORDER):
        model, texts = make_model(CONFIG), make_texts([9, 12])
        caches, _ = written(model, texts)
        token = np.array([3])
        for chosen in (caches, caches[::-1], caches[1:], caches[1:], caches):
            model.extend([token] * len(chosen), chosen)
        model.extend([token, np.array([1, 2])], caches)  # by ordinary launches, into the same caches
        model.extend([token, token], caches)
        assert recordings == [2, 2, 1, 2]


@pytest.mark.parametrize("where", EVERYWHERE)
def test_parameters_that_were_replaced_are_recorded_anew(where, recordings):
    with running(where, IN_ORDER):
        model, token = make_model(CONFIG), [np.array([3])]
        (cache,), _ = written(model, make_texts([9]))
        before, _ = model.extend(token, [cache])
        model.params["norm"] = device.array(2 * device.host(model.params["norm"]))
        cache.length -= 1  # the same token again
        after, _ = model.extend(token, [cache])
        np.testing.assert_array_equal(after, 2 * before)
        assert recordings == [1, 1]


@pytest.mark.parametrize("where", EVERYWHERE)
def test_what_was_returned_is_not_overwritten_by_the_next_step(where):
    with running(where, IN_ORDER):
        model = make_model(CONFIG)
        caches, _ = written(model, make_texts([9]))
        logits, experts = model.extend([np.array([3])], caches)
        kept = logits.copy(), *(chosen.copy() for chosen in experts)
        model.extend([np.array([4])], caches)
        assert_same_bits((logits, *experts), kept)


# What goes wrong.


@pytest.mark.parametrize("where", EVERYWHERE)
def test_logits_that_are_not_finite_are_found_with_their_layer(where):
    with running(where, IN_ORDER):
        model = make_model(KINDS["every other"])  # of layers 0, 1 and 2 the second has experts
        caches, _ = written(model, make_texts([9, 12]))
        model.params["layers.1.ffn_norm"][...] = np.nan
        with pytest.raises(FloatingPointError, match="layer 1: the router's logits are not finite"):
            model.extend([np.array([3]), np.array([4])], caches)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("kind", ["plain", "window"])
def test_more_positions_than_the_capacity_are_refused_and_nothing_is_written(where, kind):
    with running(where, IN_ORDER):
        model = make_model(KINDS[kind])
        caches, _ = written(model, make_texts([9, 12]), spare=0)
        caches[0].length -= 1
        before = [device.host(array).copy() for array in caches[0].step.keys]
        with pytest.raises(ValueError, match="holds 12 positions; 13 were asked for"):
            model.extend([np.array([3])] * 2, caches)
        assert [cache.length for cache in caches] == [8, 12]
        assert_same_bits(caches[0].step.keys, before)


# The kernel.


@pytest.mark.parametrize("where", EVERYWHERE)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=4),  # slots and position of each
    *(st.integers(0, 3), st.sampled_from([2, 4, 300, 514]), dtypes, orders, rngs),
)
def test_a_key_and_its_value_go_to_the_slot_of_their_position_and_nowhere_else(
    where, caches, spare, size, dtype, order, rng
):
    slots, positions = np.array(caches, np.int32).T
    B, capacity = len(slots), slots.max() + spare
    arrays = [*rng.standard_normal((2, B, size)), *rng.standard_normal((2, B, capacity, size))]
    with running(where, order):
        (k, v, keys, values), _ = on_device(*arrays, dtype=dtype)
        expected = [device.host(array).copy() for array in (keys, values)]
        for b in range(B):
            for cached, new in zip(expected, (k, v)):
                cached[b, positions[b] % slots[b]] = device.host(new)[b]
        of_device = device.array(positions), device.array(slots)
        decode.store(k, v, keys, values, *of_device)
        assert_same_bits([keys, values], expected)
