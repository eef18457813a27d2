"""`tinymoe analyze` as a user meets it: what it writes and says, for any shape, and what it refuses."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from tinymoe import Mixtral, MixtralConfig, cli

MICRO = MixtralConfig(
    dim=16, n_layers=3, hidden_dim=8, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=4, top_k_experts=2
)
FILES = {"routing.json", "explorer.html", "shares.png", "repetition.png", "confidence.png", "text.png", "pairs.png"}


def saved(directory, **changes):
    Mixtral.init(replace(MICRO, **changes)).save_pretrained(directory)
    return directory


def analyze(*arguments):
    return cli.main(["analyze", *map(str, arguments)])


def refused(capsys, *arguments):
    try:
        status = analyze(*arguments)
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2, out + err
    assert re.fullmatch(r"tinymoe: error: [^\n]+\n", err), err
    return err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return path


def test_it_writes_numbers_figures_and_the_explorer_and_says_what_it_found(model, text, tmp_path, capsys):
    odd = tmp_path / "_$odd$ <b>.txt"
    odd.write_text("日本語 </script> $x_1$ \x07\u202e\r\n" * 9)
    assert analyze(model, text, odd, "--seq-len", 32) == 0
    folder = model / "analysis"
    assert {path.name for path in folder.iterdir()} == FILES
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith("png"))
    numbers = json.loads((folder / "routing.json").read_text())
    assert list(numbers["domains"]) == ["words.txt", odd.name]
    assert numbers["layers"] == [0, 1, 2]
    words = numbers["domains"]["words.txt"]
    assert words["tokens"] == 880
    assert words["pairs"] == 880 - 28  # 28 windows, each without a neighbour before its first
    assert len(words["layers"]) == 3
    out = capsys.readouterr().out
    assert "read 880 of 880 tokens of words.txt" in out
    assert "25.0 and 83.3" in out  # chance: 1/4, and 1 − C(2, 2)/C(4, 2)
    assert "explorer.html" in out
    assert "</script> $" not in (folder / "explorer.html").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        dict(top_k_experts=1),
        dict(top_k_experts=4),
        dict(num_experts=1, top_k_experts=1, n_layers=1),
        dict(num_experts=40, top_k_experts=3),
        dict(moe_every=2),
    ],
    ids=str,
)
def test_any_number_of_experts_and_choices(changes, text, tmp_path, capsys):
    one = tmp_path / "one.txt"
    one.write_text("a")
    out = tmp_path / "out"
    assert analyze(saved(tmp_path / "model", **changes), one, text, "--out", out) == 0
    numbers = json.loads((out / "routing.json").read_text())
    assert numbers["layers"] == list(replace(MICRO, **changes).moe_layers)
    assert numbers["domains"]["one.txt"]["layers"][0]["repeat_first"]["share"] is None
    assert (FILES - {path.name for path in out.iterdir()}) == ({"pairs.png"} if numbers["top_k"] == 1 else set())


def test_long_texts_are_sampled(model, text, tmp_path, capsys):
    assert analyze(model, text, "--tokens", 100, "--seq-len", 10, "--out", tmp_path) == 0
    assert "read 100 of 880 tokens" in capsys.readouterr().out


def test_the_same_call_writes_the_same_files(model, text, tmp_path, capsys):
    for name in ("a", "b"):
        assert analyze(model, text, "--out", tmp_path / name) == 0
    for name in ("routing.json", "explorer.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_two_files_of_one_name_are_told_apart(model, text, tmp_path, capsys):
    other = tmp_path / text.name
    other.write_text("another")
    assert analyze(model, text, other, "--out", tmp_path / "out") == 0
    assert list(json.loads((tmp_path / "out" / "routing.json").read_text())["domains"]) == [str(text), str(other)]


def test_a_run_has_text_of_its_own(tmp_path, text, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MICRO.to_hf()))
    run = tmp_path / "run"
    train = f"train --config {config} --data {text} --out {run} --steps 1 --batch-size 2 --seq-len 16"
    assert cli.main(train.split()) == 0
    assert analyze(run) == 0
    numbers = json.loads((run / "analysis" / "routing.json").read_text())
    assert numbers["seq_len"] == 16
    assert list(numbers["domains"]) == ["words.txt"]
    assert numbers["domains"]["words.txt"]["tokens"] == 88  # the last tenth, held out


def test_bad_input_is_one_line(model, text, tmp_path, capsys):
    dense = saved(tmp_path / "dense", num_experts=0, top_k_experts=0)
    assert "dense" in refused(capsys, dense, text)
    choosing = saved(tmp_path / "choosing", expert_choice=True)
    assert "choose their tokens" in refused(capsys, choosing, text)
    assert "no text is given" in refused(capsys, model)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "is empty" in refused(capsys, model, empty)
    assert "neither a file" in refused(capsys, model, tmp_path / "absent")
    assert "--tokens is 0" in refused(capsys, model, text, "--tokens", 0)
    assert "--seq-len is 0" in refused(capsys, model, text, "--seq-len", 0)
    assert "--out DIR" in refused(capsys, model, text, "--out", empty)
    assert "absent" in refused(capsys, tmp_path / "absent", text)
    assert not list(dense.glob("analysis"))


def test_a_run_that_cannot_be_written_to_says_to_give_another_folder(tmp_path, text, capsys):
    model = saved(tmp_path / "model")
    (model / "analysis").write_text("in the way")
    assert "--out DIR" in refused(capsys, model, text)
    assert (model / "analysis").read_text() == "in the way"


def test_weights_that_are_not_finite_are_one_line_and_leave_nothing_behind_but_the_folder(tmp_path, text, capsys):
    model = Mixtral.init(MICRO)
    model.params["layers.1.moe.gate"][:] = np.nan
    model.save_pretrained(tmp_path)
    assert "layer 1" in refused(capsys, tmp_path, text)
