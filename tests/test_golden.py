"""Checkpoints that others wrote give here the numbers that transformers computed with them (golden/make_golden.py)."""

import functools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tinymoe
from tinymoe import checkpoint

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "expected.safetensors").is_file())
TOP_1_ROUTERS = {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)}

every_case = pytest.mark.parametrize("case", CASES)
both_backends = pytest.mark.parametrize("backend", ["reference", "cuda"])


@functools.cache
def model_of(case, backend="reference"):
    return tinymoe.Mixtral.from_pretrained(GOLDEN / case, backend=backend, num_workers=1)


@functools.cache
def expected_of(case):
    return load_file(GOLDEN / case / "expected.safetensors")


@functools.cache
def loss_and_grads_of(case, backend="reference"):
    """Return the loss, and the gradients under their names on disk."""
    model, expected = model_of(case, backend), expected_of(case)
    loss, grads = model.loss_and_grads(expected["tokens"], expected["targets"], aux_loss_coef=0, z_loss_coef=0)
    return loss, checkpoint.to_hf({name: model.host(grad) for name, grad in grads.items()}, model.config)


def assert_close(actual, expected, tol, floor=0.0):
    assert actual.shape == expected.shape
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    assert difference <= tol * max(np.linalg.norm(expected), floor)  # false for NaN


def test_every_kind_of_checkpoint_has_a_case():
    assert len(CASES) == 16


# What transformers computed.


@both_backends
@every_case
def test_logits_are_transformers(case, backend):
    assert_close(model_of(case, backend)(expected_of(case)["tokens"]), expected_of(case)["logits"], tol=2e-5)


@both_backends
@every_case
def test_loss_is_transformers(case, backend):
    expected = expected_of(case)
    loss, _ = loss_and_grads_of(case, backend)
    assert abs(loss - expected["loss"]) <= 1e-5
    assert abs(model_of(case, backend).loss(expected["tokens"], expected["targets"]) - expected["loss"]) <= 1e-5


@both_backends
@every_case
def test_every_gradient_is_transformers(case, backend):
    expected = {name.removeprefix("grad."): a for name, a in expected_of(case).items() if name.startswith("grad.")}
    _, grads = loss_and_grads_of(case, backend)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        if case == "top_1" and name in TOP_1_ROUTERS:  # where transformers has the rounding errors of an exact zero
            assert np.linalg.norm(expected[name]) < 1e-6
            assert not grad.any()
        elif not expected[name].any():  # an expert without tokens
            assert not grad.any()
        else:
            assert_close(grad, expected[name], tol=2e-4)


def test_top_1_leaves_experts_without_tokens_and_with_exactly_zero_gradient():
    _, grads = loss_and_grads_of("top_1")
    idle = [name for name, grad in grads.items() if ".experts." in name and not grad.any()]
    assert len(idle) >= 2 * 2 * 3  # five tokens among seven experts, in each of two layers


@pytest.mark.parametrize("case", [case for case in CASES if "dense" not in case])
def test_hf_load_balancing_loss_is_transformers(case):
    model = model_of(case)
    router_logits = model.router_logits(expected_of(case)["tokens"])
    loss = tinymoe.hf_load_balancing_loss(router_logits, model.config.top_k_experts)
    assert abs(loss - expected_of(case)["hf_aux_loss"]) <= 1e-5


@every_case
def test_greedy_text_is_transformers_past_the_window(case):
    model, text, prompt = model_of(case), expected_of(case)["text"], expected_of(case)["prompt"]
    assert len(prompt) > (model.config.sliding_window or 0)
    new = len(text) - len(prompt)
    assert tinymoe.generate(model, prompt, max_new_tokens=new).tolist() == text.tolist()


# The same model, however it lies on disk.


@every_case
def test_mapped_model_gives_the_same_bits(case):
    mapped = tinymoe.Mixtral.from_pretrained(GOLDEN / case, mmap=True, num_workers=1)
    tokens = expected_of(case)["tokens"]
    np.testing.assert_array_equal(mapped(tokens), model_of(case)(tokens), strict=True)


@every_case
@pytest.mark.parametrize("dtype", checkpoint.SAVED)
def test_saved_and_loaded_weights_are_the_same_bits(tmp_path, case, dtype):
    model = model_of(case)
    checkpoint.save(tmp_path, model.params, model.config, dtype=dtype)
    config, params = checkpoint.load(tmp_path, dtype="float64")
    assert config == model.config
    assert params.keys() == model.params.keys()
    for name, weight in model.params.items():
        rounded = weight.astype(checkpoint.SAVED[dtype]).astype(np.float64)
        np.testing.assert_array_equal(params[name], rounded, strict=True)


@every_case
def test_save_pretrained_keeps_every_bit(tmp_path, case):
    model = model_of(case)
    model.save_pretrained(tmp_path)
    again = tinymoe.Mixtral.from_pretrained(tmp_path)
    assert again.config == model.config
    for name, weight in model.params.items():
        np.testing.assert_array_equal(again.params[name], weight, strict=True)


@pytest.mark.parametrize("case", ["plain", "odd_sizes", "head_dim", "tied", "bfloat16", "float16", "dense"])
def test_saving_what_transformers_saved_writes_the_same_tensors(tmp_path, case):
    model = model_of(case)
    checkpoint.save(tmp_path, model.params, model.config, dtype=case if case in checkpoint.SAVED else "float32")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / case))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].tobytes() == tensor.tobytes()


@every_case
def test_shards_hold_what_the_single_file_holds(tmp_path, case):
    model = model_of(case)
    checkpoint.save(tmp_path / "one", model.params, model.config)
    checkpoint.save(tmp_path / "many", model.params, model.config, shard_bytes=4000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 4
    assert not (tmp_path / "many" / "model.safetensors").exists()
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = [tensors for shard in shards for tensors in load_file(shard).items()]
    assert sorted(name for name, _ in many) == sorted(one)
    for name, tensor in many:
        np.testing.assert_array_equal(tensor, one[name], strict=True)
    for mmap in (False, True):
        loaded = tinymoe.Mixtral.from_pretrained(tmp_path / "many", mmap=mmap)
        for name, weight in model.params.items():
            np.testing.assert_array_equal(np.asarray(loaded.params[name]), weight, strict=True)
