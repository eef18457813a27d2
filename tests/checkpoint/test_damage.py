"""A damaged tensor, file, shard or directory is refused in one line that names it."""

import os
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    GOLDEN,
    assert_same,
    bounded,
    copy_of,
    edit_json,
    edit_tensors,
    either_way,
    read_parts,
    refusal,
    use,
    write_parts,
)

from tinymoe import Mixtral
from tinymoe.checkpoint import files

SHARD = "model-00002-of-00004.safetensors"
NORM = "model.layers.1.post_attention_layernorm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


# Damaged tensors.


@either_way
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", NORM, EXPERT, "lm_head.weight"])
def test_missing_tensor_is_named(model_dir, name, mmap):
    edit_tensors(model_dir, lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(model_dir, mmap)


@either_way
@pytest.mark.parametrize("case", ["plain", "fused_v5", "mistral_layout"])
def test_extra_tensor_is_named(tmp_path, case, mmap):
    directory = copy_of(case, tmp_path / "model")
    file = "consolidated.safetensors" if case == "mistral_layout" else "model.safetensors"
    name = "layers.1.feed_forward.experts.4.w1.weight"  # a fifth expert
    edit_tensors(directory, lambda tensors: tensors.update({name: np.zeros((14, 16), np.float32)}), file)
    assert name in refusal(directory, mmap)


def test_name_that_spans_lines_is_reported_in_one(model_dir):
    edit_tensors(model_dir, lambda tensors: tensors.update({"evil\nname": np.zeros(1, np.float32)}))
    assert "evil" in refusal(model_dir)


@either_way
@pytest.mark.parametrize("shape", [(15,), (16, 1), (4, 4), (17,), (0,)])
def test_misshapen_tensor_is_named_with_both_shapes(model_dir, shape, mmap):
    edit_tensors(model_dir, lambda tensors: tensors.update({NORM: np.ones(shape, np.float32)}))
    message = refusal(model_dir, mmap)
    assert NORM in message
    assert str(list(shape)) in message
    assert "[16]" in message


@either_way
def test_transposed_expert_is_named(model_dir, mmap):
    edit_tensors(model_dir, lambda tensors: tensors.update({EXPERT: np.ascontiguousarray(tensors[EXPERT].T)}))
    assert EXPERT in refusal(model_dir, mmap)


@either_way
def test_fused_experts_in_the_wrong_number_are_named(tmp_path, mmap):
    directory, name = copy_of("fused_v5", tmp_path / "model"), "model.layers.1.mlp.experts.gate_up_proj"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:3]}))
    assert name in refusal(directory, mmap)


@either_way
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_tensor_of_a_dtype_that_holds_no_weights_is_named(model_dir, dtype, mmap):
    edit_tensors(model_dir, lambda tensors: tensors.update({NORM: np.ones(16).astype(dtype)}))
    message = refusal(model_dir, mmap)
    assert NORM in message
    assert "BF16, F16, F32, F64" in message


@either_way
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_weight_that_is_not_finite_is_named(model_dir, dtype, value, mmap):
    def damage(tensors):
        tensors[NORM] = tensors[NORM].astype(dtype)
        tensors[NORM][5] = value

    edit_tensors(model_dir, damage)
    message = refusal(model_dir, mmap)
    assert NORM in message
    assert "not finite" in message


@either_way
@pytest.mark.parametrize("case", ["plain", "fused_v5", "bfloat16"])
def test_one_expert_that_is_not_finite_is_named(tmp_path, case, mmap):
    directory = copy_of(case, tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj" if case == "fused_v5" else EXPERT.replace("w3", "w2")

    def damage(tensors):
        tensors[name].reshape(-1)[-7:] = np.nan

    edit_tensors(directory, damage)
    assert name in refusal(directory, mmap)


def test_weight_beyond_float32_is_named_without_a_warning(model_dir):
    def enlarge(tensors):
        tensors[NORM] = tensors[NORM].astype(np.float64)
        tensors[NORM][5] = 1e300

    edit_tensors(model_dir, enlarge)
    assert NORM in refusal(model_dir)


@pytest.mark.parametrize("kept", np.linspace(0.02, 0.999, 7))
def test_truncated_file_names_the_first_tensor_that_it_cuts(model_dir, kept):
    path = model_dir / "model.safetensors"
    header, data = read_parts(path)
    size = int(kept * len(data))
    ends = {name: spec["data_offsets"][1] for name, spec in header.items() if name != "__metadata__"}
    cut = min((name for name in ends if ends[name] > size), key=ends.get)
    os.truncate(path, path.stat().st_size - len(data) + size)
    message = refusal(model_dir)
    assert str(path) in message
    assert f"{cut} needs {ends[cut] - size} bytes more" in message


# Damaged files.


NO_SAFETENSORS = {
    "empty": b"",
    "one byte": b"\x10",
    "no header": struct.pack("<Q", 2),
    "no tensors": struct.pack("<Q", 2) + b"{}",
    "no JSON": struct.pack("<Q", 3) + b"{}]",
    "no UTF-8": struct.pack("<Q", 8) + b"\xff" * 8,
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "largest header": struct.pack("<Q", 2**64 - 1) + b"{}",
    "deep header": struct.pack("<Q", 10**6) + b"[" * 10**6,
    "git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff\nsize 123\n",
    "web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "zip": b"PK\x03\x04" + bytes(1000),
}


@pytest.mark.parametrize("content", NO_SAFETENSORS.values(), ids=NO_SAFETENSORS)
@either_way
def test_file_that_is_no_safetensors_file_is_refused(model_dir, content, mmap):
    (model_dir / "model.safetensors").write_bytes(content)
    with bounded(seconds=5, megabytes=16):
        message = refusal(model_dir, mmap)
    assert str(model_dir / "model.safetensors") in message or "tensor model.embed_tokens.weight is missing" in message


def test_damaged_length_of_a_large_file_does_not_make_it_read_whole(model_dir):
    path = model_dir / "model.safetensors"
    write_parts(path, *read_parts(path), length=2**40)
    os.truncate(path, 2**29)  # a hole: nothing is on disk
    with bounded(seconds=5, megabytes=250):
        assert "model.safetensors" in refusal(model_dir)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"[" * 10**5, b'{"a":' + b"9" * 5000]
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_cannot_be_read_is_named(tmp_path, file, content):
    directory = copy_of("sharded", tmp_path / "model")
    (directory / file).write_bytes(content)
    assert str(directory / file) in refusal(directory)


# Shards.


@pytest.fixture
def sharded_dir(tmp_path):
    return copy_of("sharded", tmp_path / "model")


def edit_map(directory, change):
    edit_json(directory / "model.safetensors.index.json", lambda index: change(index["weight_map"]))


@either_way
def test_missing_shard_is_named(sharded_dir, mmap):
    (sharded_dir / SHARD).unlink()
    assert str(sharded_dir / SHARD) in refusal(sharded_dir, mmap)


@either_way
def test_truncated_shard_is_named(sharded_dir, mmap):
    os.truncate(sharded_dir / SHARD, (sharded_dir / SHARD).stat().st_size - 1)
    assert str(sharded_dir / SHARD) in refusal(sharded_dir, mmap)


@either_way
@pytest.mark.parametrize(
    "shard",
    ["../x", ".", "/etc/passwd", "a/../b", "x\0y", "\ud800", "..", ""],
)
def test_index_that_points_elsewhere_is_refused_and_nothing_there_is_opened(sharded_dir, monkeypatch, shard, mmap):
    shutil.copy(sharded_dir / SHARD, sharded_dir.parent / "x")  # a perfectly good shard
    shutil.copy(sharded_dir / SHARD, sharded_dir / "b")
    edit_map(sharded_dir, lambda weight_map: weight_map.update({n: shard for n, s in weight_map.items() if s == SHARD}))
    opened, safe_open = [], files.safe_open
    monkeypatch.setattr(files, "safe_open", lambda path, *args: (opened.append(path), safe_open(path, *args))[1])
    refusal(sharded_dir, mmap)
    assert {os.path.dirname(os.path.normpath(path)) for path in opened} <= {str(sharded_dir)}
    assert sharded_dir / "b" not in map(Path, map(os.path.normpath, opened))


def test_index_with_the_wrong_shard_names_tensor_and_shard(sharded_dir):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    edit_map(sharded_dir, lambda weight_map: weight_map.update({name: SHARD.replace("00002", "00003")}))
    message = refusal(sharded_dir)
    assert name in message
    assert SHARD.replace("00002", "00003") in message


@pytest.mark.parametrize("weight_map", [None, [], 3, {NORM: None}, {NORM: 3}, {NORM: ["x"]}, {}])
def test_index_that_is_no_map_to_files_is_refused(sharded_dir, weight_map):
    edit_json(sharded_dir / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))
    says = str(sharded_dir / "model.safetensors.index.json") if weight_map != {} else "is missing from the checkpoint"
    assert says in refusal(sharded_dir)


def test_shard_that_the_index_does_not_name_is_not_read(sharded_dir):
    (sharded_dir / "model-00009-of-00009.safetensors").write_bytes(b"damaged")
    assert_same(use(sharded_dir)[0].params, Mixtral.from_pretrained(GOLDEN / "sharded").params)


# Directories.


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt", "model.pkl"])
@pytest.mark.parametrize("with_config", [True, False])
def test_pickled_weights_are_refused_with_the_reason(model_dir, file, with_config):
    (model_dir / "model.safetensors").rename(model_dir / file)
    if not with_config:
        (model_dir / "config.json").unlink()
    message = refusal(model_dir)
    assert str(model_dir / file) in message
    assert "unpickling executes code" in message


def test_pickled_weights_beside_safetensors_are_left_alone(model_dir):
    before = use(model_dir)[0].params
    (model_dir / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert_same(use(model_dir)[0].params, before)


def test_directory_that_does_not_exist_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_file_in_place_of_a_directory_is_named(model_dir):
    assert str(model_dir / "model.safetensors") in refusal(model_dir / "model.safetensors")


def test_directory_without_config_is_named(model_dir):
    (model_dir / "config.json").unlink()
    message = refusal(model_dir)
    assert str(model_dir) in message
    assert "config.json" in message


def test_directory_without_weights_is_named(model_dir):
    (model_dir / "model.safetensors").unlink()
    message = refusal(model_dir)
    assert str(model_dir) in message
    assert "model.safetensors" in message
