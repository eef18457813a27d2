"""What is held out, and which batches come of the rest."""

import hashlib
import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymoe.data import Batches, Corpus, Document, held_out_windows
from tinymoe.errors import InputError
from tinymoe.tokenizer import ByteTokenizer


def chosen(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:2], 16) < 26


TRAINED = [name for name in map(str, range(200)) if not chosen(name)]
CHOSEN = [name for name in map(str, range(200)) if chosen(name)]


def documents(*names, domain="d"):
    return [Document(domain, name, f"{domain}, the text of {name}".encode()) for name in names]


class BosTokenizer(ByteTokenizer):
    def encode(self, text):
        return np.concatenate([[0], super().encode(text)])


# What is held out.


def test_documents_are_held_out_by_the_hash_of_their_name():
    corpus = Corpus.split(documents(*CHOSEN, *TRAINED), {})
    assert [document.name for document in corpus.held_out["d"]] == CHOSEN
    assert [document.name for document in corpus.train["d"]] == TRAINED


TEXTS = st.integers(0, 7).map(lambda number: f"{number}, ünï🎉 " * 4)
NAMES = st.tuples(st.sampled_from("ab"), st.sampled_from(TRAINED + CHOSEN))


@given(st.dictionaries(NAMES, TEXTS))
def test_every_text_is_kept_once_whole_or_in_two_parts(drawn):
    texts = {(domain, name): f"{domain}{text}".encode() for (domain, name), text in drawn.items()}
    corpus = Corpus.split([Document(*key, text) for key, text in texts.items()], {})
    kept = defaultdict(bytes)
    for part in (corpus.train, corpus.held_out):
        assert list(part) == list(dict.fromkeys(domain for domain, _ in texts))
        for document in (document for domain in part for document in part[domain]):
            assert document.start == len(kept[document.domain, document.name])
            kept[document.domain, document.name] += document.text
            document.text.decode()  # no character is cut
    assert sorted(kept.values()) == sorted(set(texts.values()))
    assert all(texts[key] == text for key, text in kept.items())


def test_text_on_both_sides_is_for_training_only():
    twice = [Document("a", CHOSEN[0], b"twice"), *documents(*TRAINED[:2], CHOSEN[1], domain="a")]
    twice += [Document("b", TRAINED[0], b"twice"), *documents(TRAINED[1], CHOSEN[0], domain="b")]
    corpus = Corpus.split(twice, {})
    assert b"twice" in [document.text for document in corpus.train["b"]]
    assert [document.name for document in corpus.held_out["a"]] == [CHOSEN[1]]


@pytest.mark.parametrize("names", [TRAINED[:3], CHOSEN[:3], TRAINED[:1]])
def test_last_tenth_is_held_out_where_names_hold_out_nothing_or_everything(names):
    whole = documents(*names)
    corpus = Corpus.split(whole, {})
    for document, head, tail in zip(whole, corpus.train["d"], corpus.held_out["d"], strict=True):
        assert head.text + tail.text == document.text
        assert tail.start == len(head.text) == len(document.text) * 9 // 10
    listed = corpus.manifest()["domains"]["d"]["held_out"]["from_byte"]
    assert listed == {document.name: document.start for document in corpus.held_out["d"]}


@pytest.mark.parametrize("text", [b"x", "🎉".encode()])
def test_one_character_is_too_little_text(text):
    with pytest.raises(InputError, match=f"d has {len(text)} bytes"):
        Corpus.split([Document("d", "name", text)], {})


def test_empty_documents_are_dropped():
    corpus = Corpus.split([Document("d", TRAINED[0], b""), *documents(TRAINED[1], CHOSEN[0])], {})
    assert [document.name for document in corpus.train["d"]] == [TRAINED[1]]


def test_manifest_has_the_hashes_of_the_bytes_and_is_json():
    corpus = Corpus.split(documents(*TRAINED[:3], *CHOSEN[:2]), {"source": "here"})
    manifest = json.loads(json.dumps(corpus.manifest()))
    train = "".join(f"d, the text of {name}" for name in TRAINED[:3]).encode()
    assert manifest["source"] == "here"
    assert manifest["domains"]["d"]["train"] == {
        "files": 3,
        "bytes": len(train),
        "sha256": hashlib.sha256(train).hexdigest(),
    }
    assert manifest["domains"]["d"]["held_out"]["from_byte"] == {CHOSEN[0]: 0, CHOSEN[1]: 0}


# Tokens.


def test_training_text_is_the_documents_in_order_each_ending_in_one_newline():
    texts = [b"one", b"two\n", b"three\n\n"]
    corpus = Corpus.split([Document("d", *pair) for pair in zip(TRAINED, texts)] + documents(CHOSEN[0]), {})
    assert corpus.train_tokens(ByteTokenizer()).tobytes() == b"one\ntwo\nthree\n\n"


def test_every_document_starts_with_the_tokenizers_bos():
    corpus = Corpus.split(documents(*TRAINED[:3], *CHOSEN[:2]), {})
    train, held_out = corpus.train_tokens(BosTokenizer()), corpus.held_out_tokens(BosTokenizer())
    assert bytes(train.tolist()).split(b"\0")[1:] == [document.text + b"\n" for document in corpus.train["d"]]
    assert [bytes(tokens.tolist()) for tokens in held_out["d"]] == [b"\0" + d.text for d in corpus.held_out["d"]]


def test_held_out_text_without_anything_to_predict_is_an_error():
    corpus = Corpus.split([*documents(TRAINED[0]), Document("d", CHOSEN[0], b"x")], {})
    with pytest.raises(InputError, match="d is single tokens"):
        corpus.held_out_tokens(ByteTokenizer())


# Batches.

SIZES = st.integers(1, 9)


@given(SIZES, SIZES, st.integers(0, 30), st.integers(0, 2**40), st.integers(0, 2**40))
def test_batch_is_windows_of_the_text_with_the_next_tokens_as_targets(batch_size, seq_len, more, seed, step):
    tokens = np.arange(seq_len + 1 + more)
    inputs, targets = Batches(tokens, batch_size, seq_len, seed)[step]
    assert inputs.shape == targets.shape == (batch_size, seq_len)
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs - inputs[:, :1], np.broadcast_to(np.arange(seq_len), inputs.shape))
    np.testing.assert_array_equal(targets, inputs + 1)
    assert inputs.min() >= 0
    assert targets.max() < len(tokens)


def test_windows_start_at_every_token_that_has_room_behind_it():
    batches = Batches(np.arange(8, dtype=np.uint8), batch_size=100, seq_len=5, seed=0)
    assert set(batches[0][0][:, 0]) == {0, 1, 2}


def test_batch_depends_only_on_seed_and_step():
    tokens = np.arange(1000)
    forward = [inputs.tolist() for inputs, _ in (Batches(tokens, 4, 16, seed=1)[step] for step in range(5))]
    batches = Batches(tokens, 4, 16, seed=1)
    assert [batches[step][0].tolist() for step in reversed(range(5))] == forward[::-1]
    assert all(forward[step] != forward[other] for step in range(5) for other in range(step))
    assert Batches(tokens, 4, 16, seed=2)[0][0].tolist() not in forward


@pytest.mark.parametrize(
    ("length", "arguments", "message"),
    [
        (5, (2, 5, 0), "has 5 tokens, and sequences of 5 need 6"),
        (0, (2, 5, 0), "has 0 tokens"),
        (9, (0, 5, 0), "batch_size is 0; give at least 1"),
        (9, (2, -1, 0), "seq_len is -1; give at least 1"),
        (9, (2, 5, -1), "seed is -1; give at least 0"),
    ],
)
def test_batches_of_too_little_are_an_error(length, arguments, message):
    with pytest.raises(InputError, match=message):
        Batches(np.zeros(length, np.uint8), *arguments)


# Held-out windows.


@given(st.lists(st.integers(0, 20), max_size=6), SIZES, SIZES)
def test_held_out_windows_predict_every_token_but_the_first_exactly_once(lengths, seq_len, batch_size):
    starts = np.cumsum([1, *lengths])
    texts = [np.arange(start, start + length) for start, length in zip(starts, lengths)]
    predicted = []
    for inputs, targets in (batches := list(held_out_windows(texts, seq_len, batch_size))):
        assert inputs.shape == targets.shape
        assert inputs.shape[1:] == (seq_len,)
        assert inputs.dtype == targets.dtype == np.int64
        counts = targets != -100
        assert not inputs[~counts].any()
        predicted += zip(inputs[counts].tolist(), targets[counts].tolist())
    assert predicted == [(token - 1, token) for text in texts for token in text[1:].tolist()]
    assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
    windows = sum(-(-max(length - 1, 0) // seq_len) for length in lengths)
    assert sum(len(inputs) for inputs, _ in batches) == windows
    assert all(0 < len(inputs) <= batch_size for inputs, _ in batches)


def test_held_out_window_i_starts_at_token_i_times_its_length():
    ((inputs, targets),) = held_out_windows([np.arange(10, 20, dtype=np.uint8)], seq_len=4)
    assert inputs.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 0, 0, 0]]
    assert targets.tolist() == [[11, 12, 13, 14], [15, 16, 17, 18], [19, -100, -100, -100]]
