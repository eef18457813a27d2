"""Which tokens are read, and that what is read of them is what the model does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymoe import Mixtral, MixtralConfig
from tinymoe.analysis.observe import observe, passage, sample

MICRO = MixtralConfig(
    dim=16, n_layers=4, hidden_dim=8, n_heads=2, n_kv_heads=1, vocab_size=50, num_experts=5, top_k_experts=2
)
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def documents_of(sizes):
    """Return documents whose every token is unlike all others."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def read_once(windows, documents):
    for window in windows:
        document = documents[window.document]
        assert (window.tokens == document[window.start : window.start + len(window.tokens)]).all()
    tokens = np.concatenate([window.tokens for window in windows])
    assert len(np.unique(tokens)) == len(tokens)
    return tokens


@given(lengths, st.integers(1, 9), st.integers(1, 300))
def test_a_sample_is_all_of_a_text_or_nearly_as_much_as_was_asked_for(sizes, seq_len, most):
    documents = documents_of(sizes)
    windows = sample(documents, seq_len, most)
    tokens = read_once(windows, documents)
    assert all(1 <= len(window.tokens) <= seq_len for window in windows)
    if sum(sizes) <= most:
        assert len(tokens) == sum(sizes)
    else:
        assert 1 <= len(tokens) <= most


def test_a_sample_is_spread_over_all_documents():
    windows = sample(documents_of([1000] * 10), 10, 1000)
    assert np.bincount([window.document for window in windows]).tolist() == [10] * 10
    assert {window.start for window in windows} == set(range(0, 1000, 100))


@given(lengths, st.integers(1, 9), st.integers(1, 300))
def test_a_passage_reads_the_longest_document_from_its_start(sizes, seq_len, most):
    documents = documents_of(sizes)
    windows = passage(documents, seq_len, most)
    tokens = read_once(windows, documents)
    assert len(tokens) == min(most, sum(sizes))
    assert windows[0].document == np.argmax(sizes)
    assert windows[0].start == 0


@pytest.mark.parametrize("moe_every", [1, 2])
def test_what_is_observed_is_what_the_model_does_window_by_window(moe_every):
    from dataclasses import replace

    model = Mixtral.init(replace(MICRO, moe_every=moe_every), seed=1)
    documents = [np.random.default_rng(n).integers(0, 50, size) for n, size in enumerate([23, 1, 9])]
    windows = sample(documents, 8, 1000)
    observed = observe(model, windows, 8)
    assert observed.tokens.tolist() == np.concatenate(documents).tolist()
    assert np.bincount(observed.document).tolist() == [23, 1, 9]
    assert np.bincount(observed.window).tolist() == [8, 8, 7, 1, 8, 1]
    assert observed.probs.shape == (4 // moe_every, 33, 5)
    assert np.allclose(observed.probs.sum(axis=-1), 1, atol=1e-6)
    start = 0
    for window in windows:
        rows = slice(start, start := start + len(window.tokens))
        for layer, (_, experts, logits) in enumerate(model.routing(window.tokens[None])):
            probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            assert np.allclose(observed.probs[layer, rows], probs, atol=1e-6)
            assert (observed.experts[layer, rows] == experts).all()


def test_the_choices_are_the_model_s_also_where_a_bias_moves_them():
    from dataclasses import replace

    model = Mixtral.init(replace(MICRO, bias_update_rate=0.1))
    for name, p in model.params.items():
        if name.endswith("moe.bias"):
            p[3] = 9
    observed = observe(model, sample([np.arange(30)], 8, 100), 8)
    assert (observed.experts[:, :, 0] == 3).all()
    assert (observed.probs.argmax(axis=2) != 3).any()
