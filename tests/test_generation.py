"""Generation: the cache against the whole forward, sampling against the softmax, and where a text ends."""

import dataclasses

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, random_params, rngs

from tinymoe import InputError, Mixtral, MixtralConfig, generate, generation
from tinymoe.cache import KVCache

SMALL = MixtralConfig.tiny(dim=12, head_dim=4, hidden_dim=10, vocab_size=11, context_len=40, num_experts=4)
WINDOW = dataclasses.replace(SMALL, sliding_window=5)
DENSE = dataclasses.replace(SMALL, num_experts=0, top_k_experts=0)
KINDS = {"plain": SMALL, "window": WINDOW, "dense": DENSE, "tied": dataclasses.replace(WINDOW, tie_embeddings=True)}
PROMPTS = [np.array(prompt) for prompt in ([3], [1, 4, 1, 5, 9, 2, 6], [2, 7])]

every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def make_model(config=SMALL, seed=0):
    return Mixtral(config, random_params(config, np.random.default_rng(seed)), num_workers=1)


def greedy_without_cache(model, prompt, new):
    """Feed the whole text anew for every token."""
    text = prompt.tolist()
    for _ in range(new):
        text.append(int(model(np.array([text]))[0, -1].argmax()))
    return text


# The cache.


@given(configs(), rngs, st.data())
def test_decoding_and_prefill_in_chunks_equal_the_whole_forward_at_every_position(config, rng, data):
    model = Mixtral(config, random_params(config, rng), num_workers=1)
    tokens = rng.integers(config.vocab_size, size=data.draw(st.integers(1, 25)))
    expected = model(tokens[None])[0]  # (T, V)
    one_by_one = [1] * len(tokens)
    chunks = data.draw(st.lists(st.integers(1, 9), min_size=1).filter(lambda chunks: sum(chunks) >= len(tokens)))
    for lengths in (one_by_one, chunks, [len(tokens)]):
        cache = KVCache(config, len(tokens), model.dtype)
        while cache.length < len(tokens):
            new = tokens[cache.length :][: lengths[0]]
            lengths = lengths[1:]
            logits, experts = model.extend([new], [cache])
            assert_close(logits[0], expected[cache.length - 1], 1e-9, floor=1.0)
            assert len(experts) == (config.n_layers if config.num_experts else 0)
            assert all(chosen.shape == (len(new), config.top_k_experts) for chosen in experts)


@given(configs(), rngs, st.data())
def test_sequences_packed_together_do_not_see_each_other(config, rng, data):
    model = Mixtral(config, random_params(config, rng), num_workers=1)
    lengths = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=1, max_size=4))
    texts = [rng.integers(config.vocab_size, size=sum(of_text)) for of_text in lengths]
    caches = [KVCache(config, len(text), model.dtype) for text in texts]
    model.extend([text[:first] for text, (first, _) in zip(texts, lengths)], caches)
    logits, _ = model.extend([text[first:] for text, (first, _) in zip(texts, lengths)], caches)
    for text, row, cache in zip(texts, logits, caches):
        assert cache.length == len(text)
        assert_close(row, model(text[None])[0, -1], 1e-9, floor=1.0)


@every_kind
def test_greedy_text_equals_the_one_written_without_a_cache(config):
    model = make_model(config)
    for prompt in PROMPTS:
        text = generate(model, prompt, max_new_tokens=15)
        assert text.tolist() == greedy_without_cache(model, prompt, 15)


@every_kind
def test_prompts_of_a_batch_are_written_on_as_if_alone(config):
    model = make_model(config)
    together = generate(model, PROMPTS, max_new_tokens=12)
    for text, prompt in zip(together, PROMPTS, strict=True):
        np.testing.assert_array_equal(text, generate(model, prompt, max_new_tokens=12))


def test_rolling_buffers_stay_as_long_as_the_window(monkeypatch):
    caches, model = [], make_model(WINDOW)
    make = model.cache
    monkeypatch.setattr(model, "cache", lambda capacity: caches.append(make(capacity)) or caches[-1])
    generate(model, PROMPTS, max_new_tokens=30)
    for cache, prompt in zip(caches, PROMPTS, strict=True):
        assert cache.length == len(prompt) + 29  # the last token is not fed
        assert cache.keys[0].shape[1] == cache.values[0].shape[1] == 5


# What goes in and comes out.


def test_shapes_of_prompts():
    model = make_model()
    one = generate(model, [3, 1], max_new_tokens=2)
    assert one.dtype == np.int64
    assert one.shape == (4,)
    for batch in ([[3, 1]], np.array([[3, 1]]), (np.array([3, 1]),)):
        (text,) = generate(model, batch, max_new_tokens=2)
        np.testing.assert_array_equal(text, one)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_new_tokens_return_the_prompt(temperature):
    np.testing.assert_array_equal(generate(make_model(), PROMPTS[1], 0, temperature), PROMPTS[1])


def test_same_seed_writes_the_same_text_and_another_seed_another():
    model = make_model()
    first, again, other = (generate(model, PROMPTS, 20, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, other))
    twins = generate(model, [PROMPTS[0]] * 2, 20, temperature=2.0, seed=1)
    assert not np.array_equal(*twins), "each prompt draws from its own stream"
    unseeded = [generate(model, PROMPTS[0], 20, temperature=2.0) for _ in range(2)]
    assert not np.array_equal(*unseeded)


@every_kind
def test_stream_yields_what_generate_collects(config):
    model, steps = make_model(config), list(generation.stream(make_model(config), PROMPTS, 9, 1.5, seed=3))
    texts = generate(model, PROMPTS, 9, 1.5, seed=3)
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts)):
        assert [step.tokens[i] for step in steps] == text[len(prompt) :].tolist()
    fed = [sum(map(len, PROMPTS))] + [len(PROMPTS)] * 8
    for step, rows in zip(steps, fed, strict=True):
        assert [len(chosen) for chosen in step.experts] == [rows] * (config.n_layers if config.num_experts else 0)


def test_end_of_text_stays_and_stops_its_own_prompt_only():
    model = make_model()
    free = generate(model, PROMPTS, 20, temperature=3.0, seed=4)
    written = [text[len(prompt) :].tolist() for text, prompt in zip(free, PROMPTS)]
    eos = written[0][3]
    ends = [new.index(eos) + 1 if eos in new else len(new) for new in written]
    assert len(set(ends)) > 1
    stopped = generate(model, PROMPTS, 20, temperature=3.0, seed=4, eos_token=eos)
    for text, whole, prompt, end in zip(stopped, free, PROMPTS, ends):
        np.testing.assert_array_equal(text, whole[: len(prompt) + end])


def test_stream_ends_when_all_texts_have_ended():
    model = make_model()
    eos = int(generate(model, PROMPTS[0], 1)[-1])
    assert len(list(generation.stream(model, [PROMPTS[0]], 20, eos_token=eos))) == 1


# Sampling.


@given(st.integers(1, 9).flatmap(lambda V: st.permutations(range(V))), rngs)
def test_narrowest_choices_are_greedy(ranks, rng):
    logits, best = np.array(ranks) / 2, ranks.index(len(ranks) - 1)
    for temperature, top_k, top_p in ((0.0, None, None), (1.0, 1, None), (1.0, None, 1e-12), (1e-6, None, None)):
        assert generation.sample(logits, temperature, top_k, top_p, rng) == best


def test_least_temperature_is_greedy():
    assert generation.sample(np.array([1.0, 2.0]), 5e-324, None, None, np.random.default_rng(0)) == 1


@every_kind
@pytest.mark.parametrize(
    "named", [dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-9)], ids=lambda d: next(iter(d))
)
def test_narrowest_options_write_the_greedy_text(config, named):
    model = make_model(config)
    text = generate(model, PROMPTS[1], 12, **(dict(temperature=1.0, seed=0) | named))
    np.testing.assert_array_equal(text, generate(model, PROMPTS[1], 12))


LOGITS = np.log([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "weights"),
    [
        (1.0, None, None, [5, 40, 10, 30, 15]),
        (0.5, None, None, [0.25, 16, 1, 9, 2.25]),  # squares
        (2.0, None, None, np.sqrt([5, 40, 10, 30, 15])),
        (1.0, 3, None, [0, 40, 0, 30, 15]),
        (1.0, 99, None, [5, 40, 10, 30, 15]),
        (1.0, None, 0.39, [0, 40, 0, 0, 0]),
        (1.0, None, 0.41, [0, 40, 0, 30, 0]),
        (1.0, None, 0.72, [0, 40, 0, 30, 15]),
        (1.0, None, 1.0, [5, 40, 10, 30, 15]),
        (1.0, 4, 0.88, [0, 40, 0, 30, 15]),  # of the four that are left, three hold 85/95
        (2.0, 2, 0.99, [0, 40**0.5, 0, 30**0.5, 0]),
    ],
)
def test_samples_are_as_frequent_as_the_softmax_says(temperature, top_k, top_p, weights):
    draws, rng = 3000, np.random.default_rng(0)
    counts = np.bincount([generation.sample(LOGITS, temperature, top_k, top_p, rng) for _ in range(draws)], minlength=5)
    expected = draws * np.array(weights) / np.sum(weights)
    assert not counts[expected == 0].any()
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < 18.5  # one in a thousand with four degrees of freedom


def test_ties_go_to_the_lowest_token():
    rng = np.random.default_rng(0)
    logits = np.array([0.0, 1.0, 1.0, 1.0])
    assert generation.sample(logits, 0.0, None, None, rng) == 1
    assert {generation.sample(logits, 1.0, 2, None, rng) for _ in range(50)} == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_raise(temperature):
    with pytest.raises(FloatingPointError, match="not finite"):
        generation.sample(np.array([0.0, np.nan]), temperature, None, None, np.random.default_rng(0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[0.0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_overflowed_raise(logits, temperature):
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="not finite"):
        generation.sample(np.array(logits), temperature, None, None, np.random.default_rng(0))


# What is refused.


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens is -1; give an integer of at least 0"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=np.nan), "temperature is nan"),
        (dict(temperature=np.inf), "temperature is inf"),
        (dict(top_k=0), "top_k is 0; give an integer of at least 1"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(top_p=np.nan), "top_p is nan"),
        (dict(max_new_tokens=40), "a prompt of 1 tokens and 40 new ones exceed the context of 40"),
        (dict(prompt_tokens=[]), "a prompt must be a non-empty"),
        (dict(prompt_tokens=[[1], []]), "a prompt must be a non-empty"),
        (dict(prompt_tokens=[[[1]]]), "a prompt must be a non-empty"),
        (dict(prompt_tokens=[0.5]), "a prompt must be a non-empty"),
        (dict(prompt_tokens="abc"), "a prompt must be a non-empty"),
        (dict(prompt_tokens=[11]), "token 11 is outside the vocabulary of 11"),
        (dict(prompt_tokens=[[1], [-1]]), "token -1 is outside"),
    ],
)
def test_what_cannot_be_done_is_refused(named, says):
    with pytest.raises(InputError, match=says):
        generate(make_model(), **(dict(prompt_tokens=[1], max_new_tokens=2) | named))


def test_stream_refuses_at_once_and_not_at_the_first_token():
    with pytest.raises(InputError, match="top_k is 0"):
        generation.stream(make_model(), PROMPTS, top_k=0)
    with pytest.raises(InputError, match="exceed the context"):
        generation.stream(make_model(), PROMPTS, max_new_tokens=40)


@pytest.mark.parametrize(
    "named", [dict(top_k=2.5), dict(max_new_tokens=2.5), dict(seed=-1)], ids=lambda d: next(iter(d))
)
def test_options_of_the_wrong_kind_are_refused(named):
    with pytest.raises(InputError):
        generate(make_model(), [1], **(dict(temperature=1.0, max_new_tokens=2) | named))


def test_prompts_may_differ_in_dtype():
    prompts = [np.array([3], np.uint64), np.array([1, 4])]
    expected = generate(make_model(), [[3], [1, 4]], 3)
    assert all(map(np.array_equal, generate(make_model(), prompts, 3), expected))


def test_text_may_fill_the_context_exactly():
    assert len(generate(make_model(), PROMPTS[1], 40 - len(PROMPTS[1]))) == 40
