"""Training: schedule and clipping by hand, runs that stop and resume without a trace, divergence that says where."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tinymoe import InputError, Mixtral, MixtralConfig, runs, training
from tinymoe.corpora import synthetic
from tinymoe.data import Batches
from tinymoe.tokenizer import ByteTokenizer

MICRO = dict(dim=16, n_layers=2, hidden_dim=24, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=4)


@pytest.fixture(scope="module")
def text():
    corpus, tokenizer = synthetic(0, 4000), ByteTokenizer()
    return corpus.train_tokens(tokenizer), corpus.held_out_tokens(tokenizer)


def start(directory, *, workers=2, config=None, **options):
    wanted = training.Options(**dict(batch_size=4, seq_len=16, eval_every=3, save_every=3, warmup=2) | options)
    config = config or MixtralConfig(**MICRO)
    return runs.create(Path(directory), config, vars(wanted), {}, workers, "tinymoe train")


def weights(run):
    return load_file(run.directory / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def without_speed(run):
    lines = runs.read_metrics(run.directory / runs.METRICS)
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_bias_moves_against_the_load_and_is_saved(text, tmp_path):
    config = MixtralConfig(**MICRO, bias_update_rate=0.01, aux_loss_coef=0.0, capacity_factor=1.0)
    whole = start(tmp_path / "whole", config=config, steps=7)
    model, _ = training.train(whole, *text)
    lines = runs.read_metrics(whole.directory / runs.METRICS)
    expected = sum(0.01 * np.sign(0.25 - np.array(line["expert_load"])) for line in lines)  # (L, E)
    for layer in range(2):
        np.testing.assert_allclose(model.params[f"layers.{layer}.moe.bias"], expected[layer], atol=1e-6)
    assert all(0 <= share < 1 for line in lines for share in line["dropped"])
    opened = Mixtral.from_pretrained(whole.directory)
    assert opened.config == config
    assert same(opened.params, model.params)


@pytest.mark.parametrize("balancing", [dict(router_jitter=0.1, noisy_top_k=True), dict(expert_choice=True)])
def test_noise_repeats_so_that_a_resumed_run_is_the_same(text, tmp_path, balancing):
    whole = start(tmp_path / "whole", config=MixtralConfig(**MICRO, **balancing), steps=6)
    training.train(whole, *text)
    stopped = start(tmp_path / "stopped", config=MixtralConfig(**MICRO, **balancing), steps=6)

    def stop(line):
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    assert training.train(stopped, *text, report=stop)[1] == 4
    training.train(runs.open_run(stopped.directory), *text)
    assert same(weights(whole), weights(stopped))
    assert without_speed(whole) == without_speed(stopped)


def test_schedule_warms_up_then_falls_along_a_cosine_to_a_tenth():
    options = training.Options(steps=110, warmup=10, learning_rate=1.0)
    rates = [training.learning_rate(step, options) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)  # halfway down
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_clipping_scales_the_joint_norm_and_keeps_the_direction():
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert training.clip_gradients(grads, 10.0) == 5.0
    assert grads["b"][0, 0] == 4.0
    assert training.clip_gradients(grads, 1.0) == 5.0
    assert np.allclose(grads["a"], [0.6, 0])
    assert np.allclose(grads["b"], [[0.8]])
    assert training.clip_gradients({"a": np.full(2, 30.0)}, 0) == pytest.approx(30 * math.sqrt(2))


def test_training_lowers_the_loss_and_records_every_step(tmp_path, text):
    run = start(tmp_path / "run", steps=40, learning_rate=1e-2)
    model, reached = training.train(run, *text)
    lines = runs.read_metrics(run.directory / runs.METRICS)
    assert reached == 40
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["val_loss"] < lines[2]["val_loss"] - 0.5
    assert {"train_loss", "aux_loss", "learning_rate", "grad_norm", "tokens_per_second"} <= lines[0].keys()
    assert np.allclose(np.sum(lines[5]["expert_load"], axis=1), 1, atol=1e-4)
    assert ["val_loss" in line for line in lines] == [line["step"] % 3 == 0 or line["step"] == 40 for line in lines]
    assert same(weights(run), load_file(run.directory / "model.safetensors"))
    reopened = Mixtral.from_pretrained(run.directory)
    assert all(np.array_equal(reopened.params[name], p) for name, p in model.params.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_is_stopped_anywhere_ends_like_one_that_never_was(tmp_path, text, workers, monkeypatch):
    monkeypatch.setattr("tinymoe.model.LEAST_PART", 1)  # or this batch would be one part
    whole = start(tmp_path / "whole", steps=11, workers=workers)
    training.train(whole, *text)
    cut = start(tmp_path / "cut", steps=11, workers=workers)
    for stop_after in (1, 4, 8):  # of which 3 and 6 were saved on the way

        def interrupt(line, stop_after=stop_after):
            if line["step"] == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        assert training.train(cut, *text, interrupt)[1] < 11
    assert training.train(cut, *text)[1] == 11
    assert same(weights(whole), weights(cut))
    assert without_speed(whole) == without_speed(cut)


def test_steps_after_the_last_save_are_repeated_not_kept(tmp_path, text):
    run = start(tmp_path / "run", steps=10, save_every=4)

    def die(line):
        if line["step"] == 7:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait

    with pytest.raises(KeyboardInterrupt):
        training.train(run, *text, die)
    assert runs.steps_done(run) == 4
    training.train(run, *text)
    assert [line["step"] for line in runs.read_metrics(run.directory / runs.METRICS)] == list(range(1, 11))


def test_metrics_cut_in_the_middle_of_a_line_are_read_up_to_it(tmp_path, text):
    run = start(tmp_path / "run", steps=3)
    training.train(run, *text)
    path = run.directory / runs.METRICS
    path.write_text(path.read_text()[:-20])
    assert [line["step"] for line in runs.read_metrics(path)] == [1, 2]


def test_accumulated_batches_average_their_gradients(text):
    model = Mixtral.init(MixtralConfig(**MICRO), num_workers=1)
    options = training.Options(accumulate=2, batch_size=3, seq_len=8)
    batches = Batches(text[0], 3, 8, seed=0)
    grads, line = training._gradients(model, batches, 5, options)
    parts = [model.loss_and_grads(*batches[i]) for i in (10, 11)]
    for name in grads:
        assert np.allclose(grads[name], (parts[0][1][name] + parts[1][1][name]) / 2, rtol=1e-6, atol=1e-9)
    assert line["train_loss"] < sum(loss for loss, _ in parts) / 2  # without the balance loss


def test_evaluation_is_the_mean_over_all_predicted_tokens(text):
    model = Mixtral.init(MixtralConfig(**MICRO))
    documents = text[1]["words"][:1]
    windows = list(training.held_out_windows(documents, 16, batch_size=3))
    loss, tokens = training.evaluate(model, windows)
    assert tokens == len(documents[0]) - 1
    whole, _ = training.evaluate(model, training.held_out_windows(documents, 16, batch_size=1000))
    assert loss == pytest.approx(whole, rel=1e-5)


def test_bits_per_byte_of_bytes_is_the_loss_in_bits():
    documents = [b"abcd", b"efghijkl"]
    tokens = [np.frombuffer(text, np.uint8) for text in documents]
    assert training.bits_per_byte(1.5, 10, documents, tokens) == pytest.approx(1.5 / math.log(2))


@pytest.mark.parametrize("broken", ["layers.1.moe.w2", "tok_embeddings"])
def test_divergence_names_step_layer_and_advice_and_keeps_the_last_save(tmp_path, text, broken, monkeypatch):
    run, before = start(tmp_path / "run", steps=9), {}
    model = Mixtral.init(run.config)
    monkeypatch.setattr(Mixtral, "init", lambda *_, **__: model)

    def poison(line):
        if line["step"] == 4:
            before.update(weights(run))
            model.params[broken][...] = np.nan

    with pytest.raises(InputError, match=r"diverged at step 5: .*layer.*--learning-rate .*step 3 is saved"):
        training.train(run, *text, poison)
    assert same(before, weights(run))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the workers' threads
def test_a_learning_rate_far_too_high_stops_with_one_line(tmp_path, text):
    run = start(tmp_path / "run", steps=60, learning_rate=1e20, clip=0.0, warmup=0)
    with (
        np.errstate(all="ignore"),
        pytest.raises(InputError, match=r"^training diverged at step \d+: [^\n]*$"),
    ):
        training.train(run, *text)


def test_minutes_become_a_number_of_steps(text):
    config = MixtralConfig(**MICRO)
    options = training.Options(batch_size=2, seq_len=8)
    few, many = (training.steps_within(seconds, config, text[0], options) for seconds in (0.2, 2.0))
    assert 1 <= few < many


def test_a_run_is_never_overwritten(tmp_path):
    run = start(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        start(run.directory)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"already holds model\.safetensors"):
        start(tmp_path / "model")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / runs.STATE).write_bytes(b"junk"),
        lambda d: (d / runs.STATE).write_bytes((d / runs.STATE).read_bytes()[:-9]),
        lambda d: (d / runs.MANIFEST).write_text("{}"),
        lambda d: (d / runs.MANIFEST).write_text("{"),
        lambda d: (d / runs.MANIFEST).write_text(json.dumps(dict(num_workers=1, options={}, data={}))),
        lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace("24", "25")),
        lambda d: (d / "config.json").unlink(),
    ],
)
def test_a_damaged_run_is_refused_with_one_line(tmp_path, text, damage):
    run = start(tmp_path / "run", steps=2)
    training.train(run, *text)
    damage(run.directory)
    with pytest.raises(InputError) as caught:
        training.train(runs.open_run(run.directory), *text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(beta2=1.0), dict(learning_rate=math.nan), dict(clip=-1)])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        training.Options(**wrong)


def test_a_run_killed_at_random_moments_ends_like_one_that_never_was(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number, document in enumerate(synthetic(1, 2000).train["words"]):
        (folder / f"{number}.txt").write_bytes(document.text)
    (tmp_path / "config.json").write_text(json.dumps(MixtralConfig(**MICRO).to_hf()))
    options = [
        "--steps",
        "600",
        "--batch-size",
        "4",
        "--seq-len",
        "16",
        "--save-every",
        "7",
        "--eval-every",
        "50",
        "--warmup",
        "5",
    ]
    fresh = ["--config", str(tmp_path / "config.json"), "--data", str(folder), *options]

    def command(*arguments):
        return [sys.executable, "-m", "tinymoe", "train", *map(str, arguments)]

    subprocess.run(command(*fresh, "--out", tmp_path / "whole"), check=True, capture_output=True)
    cut, rng, kills, finished = tmp_path / "cut", random.Random(0), 0, False
    while not finished:
        begun = (cut / runs.MANIFEST).exists()
        process = subprocess.Popen(
            command("--resume", cut) if begun else command(*fresh, "--out", cut),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if kills < 8:
            time.sleep(rng.uniform(0.1, 1.6))
        else:
            process.wait(timeout=60)
        finished = process.poll() is not None
        process.kill()
        _, errors = process.communicate()
        assert not (finished and process.returncode), errors.decode()
        kills += not finished
    assert same(load_file(tmp_path / "whole" / "model.safetensors"), load_file(cut / "model.safetensors"))
