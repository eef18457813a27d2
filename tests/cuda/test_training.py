"""Training on kernels: bfloat16 weights over float32 masters, stopped and resumed without a trace."""

import json
import os
import signal

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tinymoe
from tinymoe import InputError, Mixtral, MixtralConfig, cli, cuda, reference, runs, training
from tinymoe.corpora import synthetic
from tinymoe.cuda import device
from tinymoe.data import Batches
from tinymoe.tokenizer import ByteTokenizer

CONFIG = MixtralConfig(dim=8, n_layers=1, hidden_dim=12, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=3)
HERE = ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def text():
    corpus, tokenizer = synthetic(0, 600), ByteTokenizer()
    held_out = corpus.held_out_tokens(tokenizer)
    return corpus.train_tokens(tokenizer), {name: documents[:1] for name, documents in held_out.items()}


def start(directory, dtype="bfloat16", **options):
    options = dict(batch_size=2, seq_len=8, eval_every=3, save_every=2, warmup=2, accumulate=2) | options
    manifest = vars(training.Options(**options))
    return runs.create(directory, CONFIG, manifest, {}, 1, "tinymoe train", "cuda", dtype)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    with device.using("emulated"):
        run = start(tmp_path_factory.mktemp("runs") / "run", steps=2)
        training.train(run, *text)
    return run


def stored(path):
    """Return the bytes of every tensor in a file."""
    return {name: (array.dtype, array.tobytes()) for name, array in load_file(path).items()}


@pytest.mark.parametrize("where", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_is_stopped_anywhere_ends_like_one_that_never_was(where, dtype, tmp_path, text):
    whole, cut = start(tmp_path / "whole", dtype, steps=6), start(tmp_path / "cut", dtype, steps=6)
    with device.using(where):
        training.train(whole, *text)
        for stop_after in (1, 4):

            def interrupt(line, stop_after=stop_after):
                if line["step"] == stop_after:
                    os.kill(os.getpid(), signal.SIGINT)

            assert training.train(runs.open_run(cut.directory), *text, interrupt)[1] == stop_after
        training.train(runs.open_run(cut.directory), *text)
    for file in ("model.safetensors", runs.STATE):
        assert stored(whole.directory / file) == stored(cut.directory / file)


def test_the_state_holds_float32_masters_and_the_model_their_rounding(finished):
    state, model = load_file(finished.directory / runs.STATE), load_file(finished.directory / "model.safetensors")
    names = [name for name, _ in CONFIG.parameter_shapes()]
    assert state.keys() == {f"{kind}.{name}" for kind in ("param", "m", "v", "master") for name in names}
    for name in names:
        assert all(state[f"{kind}.{name}"].dtype == np.float32 for kind in ("m", "v", "master"))
        assert np.array_equal(state[f"param.{name}"], state[f"master.{name}"].astype(BFLOAT16))
    assert any((state[f"param.{name}"] != state[f"master.{name}"]).any() for name in names)
    assert {array.dtype for array in model.values()} == {BFLOAT16}


def test_a_run_says_its_dtype_before_its_first_step_and_after(finished, tmp_path):
    for run in (start(tmp_path / "run"), finished):
        for file in (runs.MANIFEST, "config.json"):
            assert json.loads((run.directory / file).read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("backend", "dtype"), [("reference", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")])
def test_its_model_opens_on_either_backend_with_the_same_weights(finished, backend, dtype):
    state = load_file(finished.directory / runs.STATE)
    with device.using("emulated"):
        model = Mixtral.from_pretrained(finished.directory, backend, dtype)
    for name, p in model.params.items():
        assert p.dtype == dtype
        assert np.array_equal(p, state[f"param.{name}"])


def without_a_master(state):
    del state["master.norm"]


def with_a_short_master(state):
    state["master.norm"] = state["master.norm"][1:]


def with_a_rounded_master(state):
    state["master.norm"] = state["master.norm"].astype(BFLOAT16)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_a_master, r"master\.norm"),
        (with_a_short_master, r"master\.norm has shape \(7,\)"),
        (with_a_rounded_master, r"master\.norm has dtype bfloat16.*asks for float32"),
    ],
)
def test_a_state_whose_masters_are_damaged_is_refused(finished, tmp_path, text, damage, says):
    run = start(tmp_path / "run", steps=3)
    state = load_file(finished.directory / runs.STATE)
    damage(state)
    with safe_open(finished.directory / runs.STATE, "np") as file:
        save_file(state, run.directory / runs.STATE, file.metadata())
    with device.using("emulated"), pytest.raises(InputError, match=f"cannot be resumed from: [^\n]*{says}"):
        training.train(run, *text)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (dict(dtype="float32"), "has dtype bfloat16; the manifest's dtype asks for float32"),
        (dict(dtype="float32", backend="reference"), "has dtype bfloat16"),
        (dict(backend="reference"), "has the dtype 'bfloat16'; reference computes in float32 or float64"),
        (dict(dtype="float8"), "has the dtype 'float8'; cuda computes in float32 or bfloat16"),
    ],
)
def test_a_manifest_of_another_dtype_than_the_state_is_refused(finished, tmp_path, text, manifest, says):
    run = start(tmp_path / "run", steps=3)
    (run.directory / runs.STATE).write_bytes((finished.directory / runs.STATE).read_bytes())
    path = run.directory / runs.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | manifest))
    with device.using("emulated"), pytest.raises(InputError, match=says):
        training.train(runs.open_run(run.directory), *text)


@pytest.mark.parametrize("where", HERE)
def test_bfloat16_gradients_are_summed_and_clipped_in_float32(where, text):
    with device.using(where):
        model = Mixtral.init(CONFIG, backend="cuda", dtype="bfloat16")
        batches = Batches(text[0], 2, 8, seed=0)
        parts = [model.loss_and_grads(*batches[i])[1] for i in (0, 1)]
        exact = {name: sum(model.host(part[name]).astype(np.float64) for part in parts) / 2 for name in model.params}
        options = training.Options(accumulate=2, batch_size=2, seq_len=8)
        grads, _ = training._gradients(model, batches, 0, options)
        norm = training.clip_gradients(grads, 0.01)
        assert norm == pytest.approx(np.sqrt(sum((grad**2).sum() for grad in exact.values())), rel=1e-5)
        for name, grad in grads.items():
            assert np.allclose(model.host(grad), exact[name] * 0.01 / norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", HERE)
@pytest.mark.parametrize("broken", ["layers.0.moe.w2", "output"])
def test_divergence_in_bfloat16_is_named_and_the_last_save_remains(where, broken, tmp_path, text, monkeypatch):
    run, saved = start(tmp_path / "run", steps=4), {}
    with device.using(where):
        model = Mixtral.init(CONFIG, backend="cuda", dtype="bfloat16")
        monkeypatch.setattr(Mixtral, "init", lambda *_, **__: model)

        def poison(line):
            if line["step"] == 3:
                saved.update(stored(run.directory / runs.STATE))
                model.params[broken][...] = np.nan

        with pytest.raises(InputError, match=f"diverged at step 4: the weights {broken} .*step 2 is saved"):
            training.train(run, *text, poison)
    assert stored(run.directory / runs.STATE) == saved


@pytest.mark.parametrize("where", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_public_optimizer_is_the_one_that_the_parameters_need(where, dtype, text):
    inputs, targets = Batches(text[0], 2, 8, seed=0)[0]
    with device.using(where):
        model = Mixtral.init(CONFIG, backend="cuda", dtype=dtype)
        optimizer = tinymoe.AdamW(model.params, learning_rate=3e-3, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.2)
        on_host = dtype == "float32" and where != "gpu"  # the emulator's float32 arrays are NumPy's
        assert type(optimizer) is (reference.AdamW if on_host else cuda.AdamW)
        assert (optimizer.learning_rate, optimizer.betas) == (3e-3, (0.9, 0.95))
        assert (optimizer.eps, optimizer.weight_decay) == (1e-7, 0.2)
        losses = []
        for _ in range(4):
            loss, grads = model.loss_and_grads(inputs, targets)
            optimizer.step(grads)
            losses.append(loss)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.02
        assert model.params["norm"].dtype == dtype


def test_the_public_optimizer_of_arrays_on_a_gpu_is_the_kernels():
    class OnGPU(np.ndarray):
        __cuda_array_interface__ = {"version": 3}  # noqa: RUF012  (what CuPy's arrays have)

    with device.using("emulated"):
        assert type(tinymoe.AdamW({"w": np.ones(3, np.float32).view(OnGPU)})) is cuda.AdamW


def test_the_command_trains_resumes_evaluates_and_writes_in_bfloat16(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TINYMOE_DEVICE", "emulated")
    (tmp_path / "text").mkdir()
    for number, document in enumerate(synthetic(0, 600).train["words"]):
        (tmp_path / "text" / f"{number}.txt").write_bytes(document.text)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    monkeypatch.setattr("tinymoe.report.samples", lambda *_: [])  # long texts
    run, on_cuda = str(tmp_path / "run"), ["--backend", "cuda", "--dtype", "bfloat16"]
    command = f"train --config {tmp_path}/config.json --data {tmp_path}/text --out {run} --steps 3 --batch-size 2"
    assert cli.main([*command.split(), "--seq-len", "8", *on_cuda]) == 0
    before = stored(tmp_path / "run" / "model.safetensors")
    assert {dtype for dtype, _ in before.values()} == {BFLOAT16}
    assert cli.main(["train", "--resume", run]) == 0
    assert stored(tmp_path / "run" / "model.safetensors") == before
    capsys.readouterr()
    losses = []
    for extra in (on_cuda, on_cuda[:2], []):
        assert cli.main(["eval", run, f"{tmp_path}/text/0.txt", *extra]) == 0
        losses.append(float(capsys.readouterr().out.splitlines()[1].split()[0]))
        assert cli.main(["generate", run, "ba", "--max-new-tokens", "3", "--temperature", "1", *extra]) == 0
        assert capsys.readouterr().out.startswith("ba")
    assert losses[1] == pytest.approx(losses[2], abs=2e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-2)
