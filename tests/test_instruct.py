"""Instruction tuning: the loss of DPO by hand and by differences, runs by bits, and the command."""

import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
from gradients import assert_close, check_gradients
from hypothesis import given
from hypothesis import strategies as st
from instructions import dpo_lines, sft_lines, written
from safetensors.numpy import load_file
from strategies import rngs

from tinymoe import InputError, Mixtral, MixtralConfig, cli, instruct, runs, training
from tinymoe.examples import ETX, KEYS, read_examples
from tinymoe.tokenizer import ByteTokenizer

MICRO = MixtralConfig(
    dim=16, n_layers=2, hidden_dim=24, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=4, context_len=64
)


# The loss of DPO.


def test_dpo_loss_by_hand():
    log_probs, references = np.array([[-1.0, -4.0], [-3.0, -2.0]]), np.array([[-2.0, -2.0], [-2.0, -2.0]])
    loss, saved = instruct.dpo_loss(log_probs, references, 0.5)
    assert saved.margins.tolist() == [1.0, -1.0]  # 0.5 · (1 − −1), 0.5 · (−2 − 0)
    assert loss == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.e)) / 2)
    pull = 0.5 / 2 / np.array([1 + math.e, 1 + math.exp(-1)])  # β σ(−m) / B
    assert_close(instruct.dpo_loss_backward(1.0, saved), [-pull, pull], 1e-14)


def test_dpo_loss_of_the_reference_model_is_ln_2():
    log_probs = np.random.default_rng(0).normal(-9, 4, (2, 5))
    loss, saved = instruct.dpo_loss(log_probs, log_probs, 0.1)
    assert loss == pytest.approx(math.log(2))
    assert instruct.preferred(np.stack([saved.margins, 0 * saved.margins])) == 0.5


@given(rngs, st.integers(1, 6), st.sampled_from([0.01, 0.3, 4.0]), st.floats(-2, 2))
def test_dpo_backward_equals_differences(rng, count, beta, dloss):
    log_probs, references = rng.normal(-5, 3, (2, 2, count))
    _, saved = instruct.dpo_loss(log_probs, references, beta)
    grad = instruct.dpo_loss_backward(dloss, saved)
    check_gradients(lambda moved: dloss * instruct.dpo_loss(moved, references, beta)[0], [log_probs], [grad])


@pytest.mark.parametrize(("margin", "loss", "pull"), [(1e5, 0.0, 0.0), (-1e5, 1e5, 1.0)])
def test_huge_margins_do_not_overflow(margin, loss, pull):
    found, saved = instruct.dpo_loss(np.array([[margin], [0.0]]), np.zeros((2, 1)), 1.0)
    assert found == pytest.approx(loss)
    assert_close(instruct.dpo_loss_backward(1.0, saved), [[-pull], [pull]], 1e-12)


# Runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    Mixtral.init(MICRO).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"sft": written(folder / "sft.jsonl", sft_lines()), "dpo": written(folder / "dpo.jsonl", dpo_lines())}


def create(directory, objective, base, files, **options):
    wanted = dict(batch_size=4, seq_len=32, eval_every=3, save_every=3, warmup=2, learning_rate=1e-3) | options
    return instruct.create(
        directory, objective, str(base), str(files[objective]), training.Options(**wanted), num_workers=2
    )


def state(run):
    return {name: array.tobytes() for name, array in load_file(run.directory / runs.STATE).items()}


def without_speed(run):
    lines = runs.read_metrics(run.directory / runs.METRICS)
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_metrics_count_the_tokens_of_all_accumulated_batches_without_padding(base, files):
    options = training.Options(batch_size=4, seq_len=32, accumulate=3)
    task = instruct.sft_task(read_examples(files["sft"], "sft", ByteTokenizer(), 32), options)
    model = Mixtral.from_pretrained(base)
    _, line = training._gradients(model, task.batches, 2, options, task.gradients)
    assert line["tokens"] == sum(task.batches[batch].lengths.sum() for batch in (6, 7, 8))


@pytest.mark.parametrize("objective", KEYS)
def test_a_run_that_is_stopped_anywhere_ends_like_one_that_never_was(tmp_path, base, files, objective):
    moved = shutil.copytree(base, tmp_path / "moved")
    whole = create(tmp_path / "whole", objective, moved, files, steps=10, accumulate=2)
    instruct.train(*whole)
    cut, examples = create(tmp_path / "cut", objective, moved, files, steps=10, accumulate=2)
    for stop_after in (1, 4, 8):

        def interrupt(line, stop_after=stop_after):
            if line["step"] == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        cut = runs.open_run(cut.directory)
        assert instruct.train(cut, instruct.examples_of(cut), interrupt)[1] == stop_after
        shutil.rmtree(moved, ignore_errors=True)  # from the first save on, nobody needs it
    instruct.train(runs.open_run(cut.directory), examples)
    assert state(cut) == state(whole[0])
    assert without_speed(cut) == without_speed(whole[0])


def test_sft_learns_the_answers_and_writes_them(tmp_path, base):
    few = {"sft": written(tmp_path / "sft.jsonl", sft_lines(8))}
    run, examples = create(tmp_path / "run", "sft", base, few, steps=200, learning_rate=1e-2, save_every=200)
    model, _ = instruct.train(run, examples)
    lines = runs.read_metrics(run.directory / runs.METRICS)
    assert lines[-1]["train_loss"] < 0.2 * lines[0]["train_loss"]
    assert {"val_loss", "expert_load"} <= lines[-1].keys()
    prompts, accepted = [e.prompt for e in examples.train], [e.answers for e in examples.train]
    assert instruct.exact_match(model, prompts, accepted, ETX) == 1
    assert instruct.exact_match(Mixtral.from_pretrained(base), prompts, accepted, ETX) == 0
    longer = instruct.answers(model, prompts, 9, ETX)
    assert all(np.array_equal(answer, of[0]) for answer, of in zip(longer, accepted)), "the end stops an answer"


def test_dpo_prefers_the_chosen_answers_to_what_the_reference_did(tmp_path, base, files):
    run, examples = create(tmp_path / "run", "dpo", base, files, steps=60, learning_rate=3e-3, save_every=60)
    model, _ = instruct.train(run, examples)
    lines = runs.read_metrics(run.directory / runs.METRICS)
    assert lines[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["val_preference_accuracy"] >= 0.95
    assert lines[-1]["val_margin"] > 0.3
    assert lines[-1]["val_loss"] < lines[2]["val_loss"] < math.log(2)
    reference = load_file(run.directory / instruct.REFERENCE)
    of_base = instruct.log_probs(Mixtral.from_pretrained(base, num_workers=2), examples.held_out)
    assert np.array_equal(reference["held_out"], of_base)
    loss, saved = instruct.dpo_loss(instruct.log_probs(model, examples.held_out), of_base, 0.1)
    assert lines[-1]["val_loss"] == pytest.approx(loss)
    assert lines[-1]["val_margin"] == pytest.approx(saved.margins.mean())


def test_greedy_answers_of_prompts_of_all_lengths_are_each_their_own(base):
    model, rng = Mixtral.from_pretrained(base), np.random.default_rng(0)
    prompts = [rng.integers(256, size=n) for n in (5, 2, 9, 5, 2, 1, 60)]
    found = instruct.answers(model, prompts, 6, ETX)
    for prompt, answer in zip(prompts, found):
        assert len(answer) == min(6, MICRO.context_len - len(prompt))
        assert np.array_equal(answer, instruct.answers(model, [prompt], 6, ETX)[0])
    assert instruct.exact_match(model, prompts, [[found[0]], [], [found[1], found[2]], *[[]] * 4], ETX) == 2 / 7


def test_a_model_that_changed_before_the_first_save_is_refused(tmp_path, base, files):
    moved = shutil.copytree(base, tmp_path / "moved")
    run, examples = create(tmp_path / "run", "sft", moved, files, steps=3)
    Mixtral.init(MICRO, seed=1).save_pretrained(moved)
    with pytest.raises(InputError, match="has changed since the run was made from it"):
        instruct.train(run, examples)


@pytest.mark.parametrize("damage", [b"junk", None])
def test_references_that_are_lost_are_refused(tmp_path, base, files, damage):
    run, examples = create(tmp_path / "run", "dpo", base, files, steps=4)
    instruct.train(run, examples)
    path = run.directory / instruct.REFERENCE
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(InputError, match=r"reference\.safetensors cannot be resumed from"):
        instruct.train(run, examples)


# The command.

SHORT = ["--steps", "4", "--batch-size", "4", "--eval-every", "2", "--seq-len", "32"]


def refused(capsys, *arguments):
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2, out + err
    assert re.fullmatch(r"tinymoe: error: [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("objective", KEYS)
def test_the_command_trains_resumes_and_answers(tmp_path, base, files, capsys, objective):
    run = tmp_path / "run"
    start = ["train", "--objective", objective, "--init", str(base), "--data", str(files[objective]), "--out", str(run)]
    assert cli.main([*start, *SHORT]) == 0
    out = capsys.readouterr().out
    assert "greedy answers that match" in out
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["objective"]["name"] == objective
    assert manifest["objective"]["init"] == str(base)
    assert manifest["objective"].get("beta") == (0.1 if objective == "dpo" else None)
    assert json.loads((run / "config.json").read_text())["eos_token_id"] == ETX
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    before = (run / "model.safetensors").read_bytes()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert (run / "model.safetensors").read_bytes() == before
    assert cli.main(["generate", str(run), "upper: a\n", "--max-new-tokens", "4"]) == 0
    assert "already holds a run" in refused(capsys, *start, *SHORT)
    assert "name at least one file" in refused(capsys, "eval", run)


def test_resume_refuses_examples_that_changed(tmp_path, base, capsys):
    path, run = written(tmp_path / "sft.jsonl", sft_lines()), tmp_path / "run"
    start = ["train", "--objective", "sft", "--init", str(base), "--data", str(path), "--out", str(run)]
    assert cli.main([*start, *SHORT]) == 0
    written(path, sft_lines(29))
    assert "has changed" in refused(capsys, "train", "--resume", run)
    for flag in ("--objective=dpo", f"--init={base}", "--beta=1"):
        assert "cannot go with --resume" in refused(capsys, "train", "--resume", run, flag)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--objective sft --data {sft}", "needs --init"),
        ("--objective sft --init {base}", "needs --data FILE.jsonl"),
        ("--objective sft --init {base} --data {sft} {dpo}", "one file"),
        ("--objective sft --init {base} --data {dpo}", "line 1: it lacks 'answer'"),
        ("--objective dpo --init {base} --data {sft}", "line 1: it lacks 'chosen'"),
        ("--objective dpo --init /nosuch --data {dpo}", "/nosuch"),
        ("--objective dpo --init {base} --data /nosuch.jsonl", "/nosuch.jsonl"),
        ("--objective dpo --init {base} --data {dpo} --beta 0", "beta"),
        ("--objective sft --init {base} --data {sft} --beta 0.5", "--beta goes with"),
        ("--objective sft --init {base} --data {sft} --config tiny", "--config goes with pre-training"),
        ("--objective sft --init {base} --data {sft} --minutes 1", "--minutes goes with pre-training"),
        ("--objective sft --init {base} --data {sft} --seq-len 65", "exceeds the context of 64"),
        ("--objective sft --init {base} --data {sft} --seq-len 9", r"line 1: .*more than --seq-len 9"),
        ("--objective ppo", "ppo"),
        ("--init {base}", "go with --objective sft or dpo"),
        ("--beta 0.2", "go with --objective sft or dpo"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, base, files, capsys, arguments, says):
    new = tmp_path / "new"
    words = [word.format(base=base, **files) for word in arguments.split()]
    assert re.search(says, refused(capsys, "train", *SHORT, *words, "--out", new))
    assert not new.exists()
