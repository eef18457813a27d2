"""`tinymoe analyze` as a user meets it: what it writes and says, for any shape, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest

from tinymoe import Mixtral, MixtralConfig, analysis, cli
from tinymoe.analysis import explorer, summary
from tinymoe.data import Document
from tinymoe.tokenizer import ByteTokenizer

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
        dict(num_experts=1, top_k_experts=1, n_layers=1),
        dict(top_k_experts=4),
        dict(num_experts=40, top_k_experts=3, moe_every=2),
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


def analysed(texts, **options):
    documents = {name: [Document(name, name, text)] for name, text in texts.items()}
    return analysis.analyse(Mixtral.init(MICRO), ByteTokenizer(), documents, 32, "model", **options)


def test_long_texts_are_sampled():
    numbers, passages = analysed({"long": b"abc " * 1000}, tokens=100)
    assert numbers["domains"]["long"]["tokens"] == 100
    assert len(passages["long"].pieces) == 2000


def test_the_same_text_gives_the_same_page():
    pages = [explorer.page(*analysed({"a": b"the same " * 9, "b": b"text"})) for _ in range(2)]
    assert pages[0] == pages[1]


def test_a_terminal_in_colour_shows_tokens_in_the_colours_of_their_experts(capsys, monkeypatch):
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    numbers, passages = analysed({"[bold]name": b"[red]ab"})
    summary.show(numbers, passages)
    lines = capsys.readouterr().out.splitlines()
    assert "[bold]name:" in lines[-2]
    experts = passages["[bold]name"].experts[1, :, 0]
    codes = [";".join(str(int(numbers["colours"][expert][i : i + 2], 16)) for i in (1, 3, 5)) for expert in experts]
    assert re.findall(r"48;2;(\d+;\d+;\d+)m(.)", lines[-1]) == list(zip(codes, "[red]ab"))


def test_two_files_of_one_name_are_told_apart():
    assert list(analysed({"a/x.txt": b"one", "b/y.txt": b"two"})[0]["domains"]) == ["x.txt", "y.txt"]
    assert list(analysed({"a/x.txt": b"one", "b/x.txt": b"two"})[0]["domains"]) == ["a/x.txt", "b/x.txt"]


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


def test_a_failed_analysis_leaves_the_one_before(model, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "routing.json").write_text("before")
    monkeypatch.setattr(analysis.figures, "share_figure", lambda numbers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        analyze(model, text, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["routing.json"]
    assert (tmp_path / "routing.json").read_text() == "before"
