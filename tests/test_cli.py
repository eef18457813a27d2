"""The command as a user meets it: what it prints, what it refuses, and that a refusal loses nothing."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tinymoe import Mixtral, MixtralConfig, cli
from tinymoe.corpora import synthetic

MICRO = MixtralConfig(dim=16, n_layers=2, hidden_dim=24, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number, document in enumerate(synthetic(0, 3000).train["words"]):
        (folder / f"{number}.txt").write_bytes(document.text)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "micro.json"
    path.write_text(json.dumps(MICRO.to_hf()))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text, config):
    run = tmp_path_factory.mktemp("runs") / "run"
    arguments = f"train --config {config} --data {text} --out {run} --steps 8 --batch-size 4 --seq-len 16"
    assert cli.main([*arguments.split(), "--eval-every", "4"]) == 0
    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    Mixtral.init(MICRO).save_pretrained(directory)
    return directory


def refused(capsys, *arguments):
    """Run the command, require status 2 and exactly one line on stderr, and return that line."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse's way out
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2, out + err
    assert re.fullmatch(r"tinymoe: error: [^\n]+\n", err), err
    return err


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_training_leaves_a_run_that_anyone_can_open(trained):
    assert set(contents(trained)) == {
        "config.json",
        "model.safetensors",
        "training_state.safetensors",
        "metrics.jsonl",
        "manifest.json",
        "loss.png",
    }
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["options"]["steps"] == 8
    assert manifest["data"]["domains"]
    assert Mixtral.from_pretrained(trained).config == MICRO


def test_resuming_a_finished_run_reports_it_again_and_changes_no_weight(trained, capsys):
    before = contents(trained)
    assert cli.main(["train", "--resume", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out
    assert out.count("a sample") == 2
    assert contents(trained)["model.safetensors"] == before["model.safetensors"]


def test_balancing_is_chosen_on_the_command_line(text, config, tmp_path):
    chosen = ["--capacity-factor", "1.25", "--router-jitter", "0.01", "--noisy-top-k", "--bias-update-rate", "0.001"]
    chosen += ["--aux-loss-coef", "0", "--z-loss-coef", "0.001", "--moe-every", "2"]
    arguments = ["train", "--config", str(config), "--data", str(text), "--out", str(tmp_path / "run"), *chosen]
    assert cli.main([*arguments, "--steps", "2", "--batch-size", "2", "--seq-len", "8"]) == 0
    found = Mixtral.from_pretrained(tmp_path / "run").config
    assert found.capacity_factor == 1.25
    assert found.noisy_top_k
    assert (found.router_jitter, found.bias_update_rate) == (0.01, 0.001)
    assert (found.aux_loss_coef, found.z_loss_coef, found.moe_every) == (0, 0.001, 2)


def test_generate_streams_the_prompt_and_what_follows(trained, capsys):
    arguments = ["generate", str(trained), "ba", "--max-new-tokens", "12", "--temperature", "0.9", "--seed", "3"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("ba")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_generate_continues_several_prompts_together(trained, capsys):
    assert cli.main(["generate", str(trained), "ba", "gogo", "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- 1 ---\nba")
    assert "--- 2 ---\ngogo" in out


def test_show_routing_colours_every_token_and_keeps_the_text(trained, capsys):
    assert cli.main(["generate", str(trained), "baño ", "--max-new-tokens", "9"]) == 0
    plain = capsys.readouterr().out
    assert cli.main(["generate", str(trained), "baño ", "--max-new-tokens", "9", "--show-routing"]) == 0
    legend, coloured = capsys.readouterr().out.split("\n", 1)
    assert legend.count("█") == MICRO.num_experts
    assert "\x1b[38;" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_eval_prints_loss_perplexity_and_bits_per_byte(trained, text, capsys):
    assert cli.main(["eval", str(trained), str(text / "0.txt"), "--seq-len", "16"]) == 0
    loss, perplexity, bits, name = capsys.readouterr().out.splitlines()[1].split()
    assert float(perplexity) == pytest.approx(np.exp(float(loss)), rel=1e-3)
    assert float(bits) == pytest.approx(float(loss) / np.log(2), rel=1e-3)
    assert name == str(text / "0.txt")


def test_eval_of_a_run_without_files_takes_its_held_out_text(trained, text, capsys):
    assert cli.main(["eval", str(trained)]) == 0
    assert text.name in capsys.readouterr().out


def test_memory_mapped_generation_writes_the_same(trained, capsys):
    for extra in ([], ["--mmap"]):
        assert cli.main(["generate", str(trained), "ba", "--max-new-tokens", "8", *extra]) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


@pytest.mark.parametrize(
    "command", [["plan", "tiny", "--device", "h200"], ["doctor"], ["plan", "mistral_7b", "--device", "h200", "--json"]]
)
def test_plan_and_doctor_print_something(command, capsys):
    assert cli.main(command) == 0
    assert len(capsys.readouterr().out) > 200


def test_train_refuses_an_existing_run_and_leaves_it_alone(trained, text, config, capsys):
    before = contents(trained)
    assert "--resume" in refused(capsys, "train", "--config", config, "--data", text, "--out", trained)
    assert contents(trained) == before


def test_resume_refuses_changed_text_and_changed_options(trained, text, capsys, tmp_path):
    before = contents(trained)
    assert "--steps" in refused(capsys, "train", "--resume", trained, "--steps", "9")
    assert "--backend" in refused(capsys, "train", "--resume", trained, "--backend", "cuda")
    assert "--noisy-top-k" in refused(capsys, "train", "--resume", trained, "--noisy-top-k")
    assert "--dtype" in refused(capsys, "train", "--resume", trained, "--dtype", "float32")
    assert "holds no run" in refused(capsys, "train", "--resume", tmp_path)
    extra = text / "more.txt"
    extra.write_text("other words\n" * 9)
    assert "has changed" in refused(capsys, "train", "--resume", trained)
    extra.unlink()
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train --config nosuch", "nosuch"),
        ("train --data /nosuch --out {new}", "/nosuch"),
        ("train --steps 0 --out {new}", "steps"),
        ("train --steps many --out {new}", "many"),
        ("train --minutes -1", "--minutes"),
        ("train --learning-rate nan --out {new}", "learning_rate"),
        ("train --config mixtral_8x7b --out {new}", "tokenizer"),
        ("train --config {config} --data {text} --seq-len 99999 --out {new}", "context"),
        ("train --config {config} --data {text} --seq-len 9000 --out {new}", "too|shorter"),
        ("train --dtype bfloat16 --out {new}", "needs --backend cuda"),
        ("train --dtype bfloat16 --backend reference --out {new}", "needs --backend cuda"),
        ("train --dtype float16 --backend cuda --out {new}", "float16"),
        ("train --no-such-option", "no-such-option"),
        ("generate /nosuch hello", "/nosuch"),
        ("generate {model} ''", "empty"),
        ("generate {model} hello --temperature -1", "temperature"),
        ("generate {model} hello --top-p 2", "top_p"),
        ("generate {model} hello --top-k 0", "top_k"),
        ("generate {model} hello --max-new-tokens -3", "max_new_tokens"),
        ("generate {model} hello --max-new-tokens 40000", "context"),
        ("generate {model} hello --seed -1", "--seed"),
        ("generate {model} hello --show-routing --layer 7", "from 0 to 1"),
        ("generate {model} hello there --show-routing", "single prompt"),
        ("generate {model} hello --dtype bfloat16", "needs --backend cuda"),
        ("eval {model} {config} --dtype bfloat16", "needs --backend cuda"),
        ("eval {model}", "no text"),
        ("eval {model} /nosuch.txt", "/nosuch.txt"),
        ("eval {model} {config} --seq-len 0", "--seq-len"),
        ("plan nosuch", "nosuch"),
        ("plan tiny --batch 0", "batch"),
        ("plan tiny --dtype int3", "int3"),
        ("plan tiny --device abacus", "abacus"),
        ("bench model --size huge", "huge"),
        ("bench everything", "everything"),
        ("dance", "dance"),
        ("", "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, says, capsys, tmp_path, text, config, model):
    new = tmp_path / "new"
    words = [
        word.format(new=new, text=text, config=config, model=model).strip("'") for word in arguments.split(" ") if word
    ]
    assert re.search(says, refused(capsys, *words))
    assert not new.exists(), "a refused run left a folder behind"


def test_a_model_directory_may_be_read_only(model, capsys):
    model.chmod(0o555)
    try:
        assert cli.main(["generate", str(model), "x", "--max-new-tokens", "2"]) == 0
    finally:
        model.chmod(0o755)
    assert capsys.readouterr().out.startswith("x")


def test_text_is_written_as_it_comes_with_characters_whole(tmp_path, capsys, monkeypatch):
    model = Mixtral.init(MICRO)
    fixed = iter("né😀!".encode())
    monkeypatch.setattr("tinymoe.generation.sample", lambda *_: next(fixed))
    from tinymoe import writing
    from tinymoe.tokenizer import ByteTokenizer

    pieces = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: pieces.extend(text))
    writing.write(model, ByteTokenizer(), ["a"], max_new_tokens=8)
    assert "".join(pieces) == "ané😀!"
    assert {"é", "😀"} <= set(pieces)


def test_generation_stops_at_the_end_of_the_text(tmp_path, capsys):
    Mixtral.init(MICRO).save_pretrained(tmp_path)
    assert cli.main(["generate", str(tmp_path), "a", "--max-new-tokens", "9"]) == 0
    first = capsys.readouterr().out.encode()[1]
    values = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": first}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert cli.main(["generate", str(tmp_path), "a", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == "a\n"


def test_help_and_import_load_next_to_nothing():
    script = (
        "import sys, tinymoe.cli; tinymoe.cli.make_parser();"
        "print([m for m in ('numpy', 'rich', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_closed_pipe_is_no_mistake(trained):
    command = f"{sys.executable} -m tinymoe generate {trained} ba --max-new-tokens 300 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
