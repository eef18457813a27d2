"""The passkey: each text hides exactly one key where it says, retrieval is exact, a window's reach is a hard limit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import Mixtral, MixtralConfig, cli, generate
from tinymoe.experiments import passkey
from tinymoe.experiments.learning import micro
from tinymoe.experiments.passkey import DIGITS, SENTENCE, SHORTEST, STOP, PasskeyBatches, passages
from tinymoe.reference import cross_entropy
from tinymoe.reference.loss import IGNORED

lengths = st.integers(SHORTEST, 150)
depths = st.none() | st.floats(0, 1)


@given(st.integers(1, 4), lengths, depths, rngs)
def test_each_text_hides_one_key_where_it_says_and_ends_with_it(count, length, depth, rng):
    made = passages(count, length, rng, depth)
    assert made.tokens.shape == (count, length)
    for tokens, key, start in zip(made.tokens, made.keys, made.starts):
        text, answer = bytes(tokens.tolist()), bytes(key.tolist())
        assert len(answer) == DIGITS
        assert answer.isdigit()
        assert len(set(answer)) == DIGITS
        assert text[start - len(SENTENCE) :].startswith(SENTENCE + answer + STOP)
        assert text.endswith(SENTENCE + answer)
        assert text.count(SENTENCE) == 2
        assert sum(chr(byte).isdigit() for byte in text) == 2 * DIGITS
        room = length - SHORTEST
        assert start - len(SENTENCE) in (range(room + 1) if depth is None else [round(depth * room)])


def test_a_text_without_room_for_the_key_is_refused():
    with pytest.raises(ValueError, match=f"at least {SHORTEST}"):
        passages(1, SHORTEST - 1, np.random.default_rng(0))


@given(st.integers(0, 9), st.integers(SHORTEST, 90), st.integers(0, 5))
def test_batches_depend_on_seed_and_step_and_ask_for_the_digits_only(step, longest, seed):
    inputs, targets = PasskeyBatches(10, longest, 300, seed)[step]
    again, _ = PasskeyBatches(10, longest, 300, seed)[step]
    np.testing.assert_array_equal(inputs, again)
    assert SHORTEST <= inputs.shape[1] + 1 <= longest
    assert inputs.size <= 300
    assert (targets[:, :-DIGITS] == IGNORED).all()
    np.testing.assert_array_equal(targets[:, -DIGITS:-1], inputs[:, 1 - DIGITS :])  # the answer, one further on
    assert ((targets[:, -DIGITS:] >= ord("0")) & (targets[:, -DIGITS:] <= ord("9"))).all()


def test_texts_grow_to_the_longest_length_and_the_first_are_the_shortest():
    batches = PasskeyBatches(100, 120, 300, 0)
    widths = [batches[step][0].shape[1] + 1 for step in range(100)]
    assert widths[0] == SHORTEST
    assert max(widths) > 110
    assert all(w <= SHORTEST + np.ceil((120 - SHORTEST) * step / 40) for step, w in enumerate(widths))


@given(st.integers(0, 5))
def test_retrieved_is_what_greedy_decoding_would_write(seed):
    model, asked = Mixtral.init(micro(vocab_size=128), seed), passages(3, 60, np.random.default_rng(seed))
    for row, wrong in enumerate((0, 1, None)):  # the key becomes what the model writes; but for one digit; stays
        written = generate(model, asked.tokens[row, :-DIGITS], DIGITS)[-DIGITS:]
        if wrong is not None:
            written[-1] = (written[-1] + wrong) % 128
            asked.keys[row] = asked.tokens[row, -DIGITS:] = written
    assert passkey.retrieved(model, asked).tolist() == [True, False, False]


@given(st.integers(1, 3), st.integers(2, 9), rngs)
def test_nothing_beyond_the_reach_of_a_window_changes_the_answer_and_its_edge_does(layers, window, rng):
    model = Mixtral.init(micro(n_layers=layers, sliding_window=window), dtype="float64")
    for name, p in model.params.items():
        if p.ndim > 1 and not name.endswith(("wq", "wk")):
            p *= 20  # so that what passes through every layer is still seen, and no key is looked away from
    far = passkey.reach(model.config)
    assert far == layers * (window - 1)
    tokens = rng.integers(256, size=(1, far + 5))
    other = tokens.copy()
    other[:, : -far - 1] = (other[:, : -far - 1] + 1) % 256
    before = model(tokens)[0, -1]
    np.testing.assert_allclose(model(other)[0, -1], before, rtol=0, atol=1e-9)
    other[:, -far - 1] = (tokens[:, -far - 1] + 1) % 256
    assert np.abs(model(other)[0, -1] - before).max() > 1e-4


def test_full_attention_has_no_reach():
    assert passkey.reach(MixtralConfig.tiny()) is None


def test_loss_by_context_is_of_the_same_last_tokens_and_of_what_stands_before_them():
    model, windows = Mixtral.init(micro(), 1), np.random.default_rng(1).integers(256, size=(3, 33))
    for context, loss in zip((1, 5, 29), passkey.loss_by_context(model, windows, (1, 5, 29), 4)):
        logits = model(windows[:, 33 - 4 - context : -1])[:, -4:]
        expected, _ = cross_entropy(logits.reshape(12, -1), windows[:, -4:].ravel())
        assert loss == pytest.approx(expected, rel=1e-5)


def test_quick_mode_writes_numbers_and_figure(tmp_path):
    assert cli.main(["experiment", "passkey", "--quick", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "passkey.json").read_text())["numbers"]
    assert set(numbers) == {"digits", "trained_length", "keys_per_cell", "models", "text"}
    assert set(numbers["models"]) == {"full", "window"}
    for of_model in numbers["models"].values():
        assert {cell["length"] for cell in of_model["cells"]} == {48, 64, 80}
        for cell in of_model["cells"]:
            assert 0 <= cell["exact"] <= cell["asked"] == numbers["keys_per_cell"]
            assert cell["distance"] >= DIGITS + len(STOP) + len(SENTENCE) - 1
        assert of_model["inside"].endswith(" of 24")
        assert of_model["beyond"].endswith(" of 12")
    of_text = numbers["text"]
    assert all(len(losses) == len(of_text["contexts"]) for losses in of_text["loss"].values())
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_numbers():
    batches = PasskeyBatches(2, 60, 256, 3)
    config = micro(vocab_size=128)
    (one, losses), (two, again) = (passkey._learn_passkeys(config, batches, 3, True) for _ in range(2))
    assert losses == again
    for name, p in one.params.items():
        np.testing.assert_array_equal(p, two.params[name])
