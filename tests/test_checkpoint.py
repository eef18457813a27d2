"""Damaged checkpoints are refused in one line, a model is replaced whole or not at all, mapping reads what it needs."""

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinymoe import Mixtral, atomic, checkpoint
from tinymoe.cache import KVCache
from tinymoe.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
SHARD = "model-00002-of-00004.safetensors"
NORM = "model.layers.1.post_attention_layernorm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

either_way = pytest.mark.parametrize("mmap", [False, True], ids=["whole", "mapped"])


def copy_of(case, folder):
    """Copy a golden checkpoint into a folder, to be damaged."""
    folder.mkdir(exist_ok=True)
    for file in (GOLDEN / case).iterdir():
        if file.name != "expected.safetensors":
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def model_dir(tmp_path):
    return copy_of("plain", tmp_path / "model")


def read_parts(path):
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(path, header, data, length=None):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)


def use(directory, mmap=False):
    """Open a model and compute something of every weight that is used."""
    model = Mixtral.from_pretrained(directory, mmap=mmap, num_workers=1)
    return model, model(np.arange(min(9, model.config.vocab_size))[None])


def refusal(directory, mmap=False):
    """Return the one line with which a model directory is refused."""
    with pytest.raises(InputError) as caught:
        use(directory, mmap)
    return one_line(caught.value)


def one_line(error):
    assert str(error).strip()
    assert len(str(error).splitlines()) == 1
    return str(error)


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, strict=True)


def same(params, expected):
    return params.keys() == expected.keys() and all(np.array_equal(params[name], expected[name]) for name in expected)


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
    opened, safe_open = [], checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda path, *args: (opened.append(path), safe_open(path, *args))[1])
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


# Two hundred mutations.


@contextlib.contextmanager
def bounded(seconds, megabytes):
    """Fail where the block takes longer, or at some moment more memory."""

    def too_long(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def flip(rng, path, start, stop):
    """Change one to four bytes in a stretch of a file."""
    content = bytearray(path.read_bytes())
    for position in set(rng.integers(start, stop, rng.integers(1, 5)).tolist()):
        content[position] ^= int(rng.integers(1, 256))
    path.write_bytes(content)


def retype(rng, path, start, stop):
    """Change one or two digits or letters in a stretch of a file into others, so that it remains JSON."""
    content = bytearray(path.read_bytes())
    alphabets = [b"0123456789", b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    alphabet = alphabets[rng.choice(3, p=[0.6, 0.3, 0.1])]
    positions = [position for position in range(start, stop) if content[position] in alphabet]
    for position in rng.choice(positions, rng.integers(1, 3)) if positions else []:
        content[position] = alphabet[rng.integers(len(alphabet))]
    path.write_bytes(content)


def header_length(path):
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


def flip_header(rng, path):
    flip(rng, path, 8, 8 + header_length(path))


def retype_header(rng, path):
    retype(rng, path, 8, 8 + header_length(path))


def flip_length(rng, path):
    flip(rng, path, 0, int(rng.choice([2, 8])))


def flip_data(rng, path):
    flip(rng, path, 8 + header_length(path), path.stat().st_size)


def overwrite_data(rng, path):
    """Fill some weights with the largest numbers there are, or with NaN."""
    content = bytearray(path.read_bytes())
    length = int(rng.integers(4, 65))
    start = int(rng.integers(8 + header_length(path), len(content) - length))
    content[start : start + length] = bytes([rng.choice([0x7F, 0xFF])]) * length
    path.write_bytes(content)


def flip_text(rng, path):
    flip(rng, path, 0, path.stat().st_size)


def retype_text(rng, path):
    retype(rng, path, 0, path.stat().st_size)


def cut(rng, path):
    os.truncate(path, int(rng.integers(0, path.stat().st_size)))


def lengthen(rng, path):
    path.write_bytes(path.read_bytes() + rng.bytes(rng.integers(1, 100)))


ODD_VALUES = [None, True, -1, 0, 1, 3, 7, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308]
ODD_VALUES += [math.nan, math.inf, "", "x", "16", "F64", "BF16", "I8", [], [0], [2**62, 4], [-1], [[1]], {}, {"a": 1}]


def change_spec(rng, path):
    """Give a tensor in the header another dtype, shape, place or name, or none."""
    header, data = read_parts(path)
    name = str(rng.choice([name for name in header if name != "__metadata__"]))
    key = ["dtype", "shape", "data_offsets", "name", "all"][rng.integers(5)]
    value = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    if key == "name":
        header[name[: rng.integers(len(name))]] = header.pop(name)
    elif key == "all":
        header[name] = value
    elif key != "dtype" and rng.random() < 0.7:
        numbers = header[name][key]
        numbers[rng.integers(len(numbers))] = value if rng.random() < 0.5 else int(rng.integers(0, 2 * len(data)))
    else:
        header[name][key] = value
    write_parts(path, header, data)


def change_value(rng, path):
    """Change or drop one value of a config, or of an index's map."""

    def change(values):
        values = values.get("weight_map", values)
        key = str(rng.choice(list(values)))
        if rng.random() < 0.15:
            del values[key]
        elif isinstance(values[key], int | float) and rng.random() < 0.4:
            values[key] = values[key] * 2 if rng.random() < 0.5 else values[key] + 1
        else:
            values[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]

    edit_json(path, change)


OF_WEIGHTS = [flip_header, retype_header, flip_length, cut, lengthen, change_spec]
OF_JSON = [flip_text, retype_text, change_value, change_value]
MUTATIONS = [(kind, ".safetensors") for kind in OF_WEIGHTS] + [(kind, ".json") for kind in OF_JSON]
MUTATED_CASES = ["plain", "sharded", "fused_v5", "tied", "dense", "bfloat16", "mistral_layout"]


def mutated(kind, suffix, seed, folder):
    """Return a copy of a golden checkpoint in which one file of that suffix was changed, and the name of the case."""
    rng = np.random.default_rng(seed)
    case = str(rng.choice(MUTATED_CASES))
    directory = copy_of(case, folder)
    path = directory / str(rng.choice(sorted(file.name for file in directory.iterdir() if file.suffix == suffix)))
    before = path.read_bytes()
    while path.read_bytes() == before:
        kind(rng, path)
    return directory, case


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # absurd values in a config may overflow
@pytest.mark.parametrize("seed", range(160))
def test_mutated_checkpoint_is_the_same_weights_or_one_line(tmp_path, seed):
    kind, suffix = MUTATIONS[seed % len(MUTATIONS)]
    directory, case = mutated(kind, suffix, seed, tmp_path / "model")
    with bounded(seconds=2, megabytes=16):
        try:
            model, _ = use(directory)
        except (InputError, FloatingPointError) as error:
            one_line(error)
            return
    original = Mixtral.from_pretrained(GOLDEN / case)
    assert_same(model.params, original.params)
    if suffix == ".safetensors":
        assert model.config == original.config


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a flipped exponent may overflow
@pytest.mark.parametrize("seed", range(40))
def test_damaged_weights_compute_or_are_refused_in_one_line(tmp_path, seed):
    kind = flip_data if seed < 20 else overwrite_data
    directory, case = mutated(kind, ".safetensors", 1000 + seed, tmp_path / "model")
    with bounded(seconds=2, megabytes=16):
        try:
            model, logits = use(directory, mmap=bool(seed % 2))
        except (InputError, FloatingPointError) as error:
            one_line(error)
            return
    assert logits.shape == (1, 9, model.config.vocab_size)
    original = Mixtral.from_pretrained(GOLDEN / case)
    assert not same({name: np.asarray(model.params[name]) for name in model.params}, original.params)


def test_both_outcomes_occur_among_the_mutations(tmp_path):
    outcomes = []
    for seed in range(30):
        directory, _ = mutated(change_value, ".json", seed, tmp_path / str(seed))
        try:
            checkpoint.load(directory)
            outcomes.append("loaded")
        except InputError:
            outcomes.append("refused")
    assert min(outcomes.count("loaded"), outcomes.count("refused")) >= 5


# Saving: the old model or the new, never a mixture.

SINGLE, SMALL_SHARDS, LARGER_SHARDS = 10**9, 6000, 12000


def old_and_new():
    """Return the config and two sets of weights of a small model."""
    config, old = checkpoint.load(GOLDEN / "plain")
    return config, old, {name: array + np.float32(1) for name, array in old.items()}


def saved(folder, params, shard_bytes):
    checkpoint.save(folder, params, old_and_new()[0], shard_bytes=shard_bytes)
    (folder / "tokenizer.json").write_text("not ours")
    return folder


def assert_old_or_new(folder):
    """Check that a folder holds one of the two models, and return whether it is the new one."""
    config, old, new = old_and_new()
    found_config, found = checkpoint.load(folder)
    assert found_config == config
    assert same(found, old) or same(found, new)
    assert (folder / "tokenizer.json").read_text() == "not ours"
    return same(found, new)


def partials(folder):
    return [file.name for file in folder.iterdir() if "partial" in file.name or file.name.startswith(".")]


# The child of this script saves and is killed at its nth step: before it opens, renames or removes a file, or when half
# of a file's bytes are written. The next is killed at step n + 1, until one arrives.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from test_checkpoint import atomic, checkpoint, old_and_new

root, shard_bytes = Path(sys.argv[1]), int(sys.argv[2])
config, _, new = old_and_new()


def save_until(last_step, folder):
    steps = 0
    write = atomic.save_file

    def step(event, *_):
        nonlocal steps
        if event in ("open", "os.rename", "os.remove", "os.mkdir"):
            steps += 1
            if steps == last_step:
                os.kill(os.getpid(), signal.SIGKILL)

    def write_half(tensors, path, metadata):
        nonlocal steps
        steps += 1
        write(tensors, path, metadata)
        if steps == last_step:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.save_file = write_half
    sys.addaudithook(step)
    checkpoint.save(folder, new, config, shard_bytes=shard_bytes)
    os._exit(0)


for step in range(1, 1000):
    folder = shutil.copytree(root / "old", root / str(step))
    child = os.fork()
    if child == 0:
        try:
            save_until(step, folder)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SINGLE, SINGLE),
        (SINGLE, SMALL_SHARDS),
        (SMALL_SHARDS, SINGLE),
        (SMALL_SHARDS, SMALL_SHARDS),
        (SMALL_SHARDS, LARGER_SHARDS),
        (LARGER_SHARDS, SMALL_SHARDS),
    ],
)
def test_save_killed_at_any_step_leaves_the_old_model_or_the_new(tmp_path, before, after):
    saved(tmp_path / "old", old_and_new()[1], before)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(after)], env=environment, check=True, timeout=60)
    folders = sorted((f for f in tmp_path.iterdir() if f.name != "old"), key=lambda f: int(f.name))
    outcomes = [assert_old_or_new(folder) for folder in folders]
    assert len(outcomes) > 6
    assert outcomes == sorted(outcomes)  # old up to some step, new from there on
    assert not outcomes[0]
    assert outcomes[-1]


def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    _, old, new = old_and_new()
    folder = saved(tmp_path / "model", old, SINGLE)
    (folder / ".model.safetensors.partial").write_bytes(b"half")
    (folder / ".config.json.partial").write_bytes(b"half")
    saved(folder, new, SINGLE)
    assert assert_old_or_new(folder)
    assert not partials(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SINGLE, SMALL_SHARDS),
        (SMALL_SHARDS, SINGLE),
        (SMALL_SHARDS, LARGER_SHARDS),
    ],
)
def test_saving_over_a_model_leaves_none_of_its_files(tmp_path, before, after):
    _, old, new = old_and_new()
    folder = saved(tmp_path / "model", old, before)
    saved(folder, new, after)
    assert assert_old_or_new(folder)
    weights, index = {"model.safetensors"}, set()
    if after != SINGLE:
        index = {"model.safetensors.index.json"}
        weights = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert {file.name for file in folder.iterdir()} == weights | index | {"config.json", "tokenizer.json"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("place", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SINGLE, SINGLE),
        (SINGLE, SMALL_SHARDS),
        (SMALL_SHARDS, SINGLE),
        (SMALL_SHARDS, SMALL_SHARDS),
    ],
)
def test_save_that_fails_at_any_call_leaves_the_old_model_or_the_new(
    tmp_path, monkeypatch, before, after, place, error
):
    config, old, new = old_and_new()
    holder = atomic if place == "save_file" else os
    original = getattr(holder, place)

    def failing_at(last):
        calls = itertools.count(1)

        def call(*args):
            if next(calls) == last:
                raise error
            return original(*args)

        return call

    for last in range(1, 100):
        folder = saved(tmp_path / str(last), old, before)
        with monkeypatch.context() as patch:
            patch.setattr(holder, place, failing_at(last))
            try:
                checkpoint.save(folder, new, config, shard_bytes=after)
                break
            except InputError as refused:
                assert isinstance(error, OSError)
                message = one_line(refused)
                assert str(folder) in message
                assert "No space left" in message
            except KeyboardInterrupt:
                assert isinstance(error, KeyboardInterrupt)
        assert_old_or_new(folder)
        assert not partials(folder)
    assert last > 1
    assert assert_old_or_new(folder)


@pytest.mark.parametrize("room", [0, 100, 5000, 38000])
def test_disk_that_fills_up_leaves_the_old_model(tmp_path, room):
    config, old, new = old_and_new()
    folder = saved(tmp_path / "model", old, SINGLE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # Python ignores the signal: writing fails instead
    try:
        with pytest.raises(InputError) as caught:
            checkpoint.save(folder, new, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder) in one_line(caught.value)
    assert not assert_old_or_new(folder)
    assert not partials(folder)


def test_place_where_nothing_can_be_written_is_named(model_dir):
    config, old, _ = old_and_new()
    with pytest.raises(InputError) as caught:
        checkpoint.save(model_dir / "config.json" / "model", old, config)
    assert str(model_dir / "config.json" / "model") in one_line(caught.value)


def test_dtype_that_is_none_to_save_in_leaves_the_old_model(tmp_path):
    config, old, new = old_and_new()
    folder = saved(tmp_path / "model", old, SINGLE)
    with pytest.raises(InputError, match="int8"):
        checkpoint.save(folder, new, config, dtype="int8")
    assert not assert_old_or_new(folder)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (3.4e38, "bfloat16"), (np.nan, "float32")])
def test_weights_that_could_not_be_read_again_are_not_written(tmp_path, value, dtype):
    config, old, new = old_and_new()
    folder = saved(tmp_path / "model", old, SINGLE)
    new["norm"][3] = value
    with pytest.raises(InputError, match="norm"):
        checkpoint.save(folder, new, config, dtype=dtype)
    assert not assert_old_or_new(folder)


def test_mapped_model_can_be_saved_over_itself(model_dir):
    before = Mixtral.from_pretrained(model_dir)
    mapped = Mixtral.from_pretrained(model_dir, mmap=True)
    mapped.save_pretrained(model_dir)
    assert_same(Mixtral.from_pretrained(model_dir).params, before.params)
    tokens = np.arange(9)[None]
    np.testing.assert_array_equal(mapped(tokens), before(tokens))


# Memory-mapped.


@pytest.fixture
def reads(monkeypatch):
    """Record what is read from disk: (tensor, piece, row)."""
    calls = []
    read = checkpoint.Part.read

    def recorded(part, dtype, row=None):
        calls.append((part.name, part.index, row))
        return read(part, dtype, row)

    monkeypatch.setattr(checkpoint.Part, "read", recorded)
    return calls


def test_opening_a_mapped_model_reads_no_weight(reads):
    Mixtral.from_pretrained(GOLDEN / "plain", mmap=True)
    assert {name for name, *_ in reads} <= {"model.norm.weight"}  # it tells the dtype


def experts_of(reads):
    """Return layer → the set of experts that were read, and check that each of their matrices was read once."""
    experts, matrices = {}, []
    for name, piece, _ in reads:
        if ".experts." not in name:
            continue
        words = name.split(".")
        fused = words[-1] in ("gate_up_proj", "down_proj")
        e = piece[0] if fused else int(words[words.index("experts") + 1])
        experts.setdefault(int(words[words.index("layers") + 1]), set()).add(e)
        matrices.append((name, str(piece)))
        assert isinstance(e, int)  # one expert, not a slice of the stack
    assert len(matrices) == len(set(matrices)) == 3 * sum(map(len, experts.values()))
    return experts


@pytest.mark.parametrize("case", ["plain", "fused_v5", "mistral_layout", "top_1", "sharded", "bfloat16"])
@pytest.mark.parametrize("length", [1, 3])
def test_only_the_experts_that_tokens_choose_are_read(reads, case, length):
    model, mapped = Mixtral.from_pretrained(GOLDEN / case), Mixtral.from_pretrained(GOLDEN / case, mmap=True)
    config, tokens = model.config, np.arange(5, 5 + length)
    _, chosen = model.extend([tokens], [KVCache(config, length)])
    expected = {layer: set(experts.ravel().tolist()) for layer, experts in enumerate(chosen)}
    assert any(len(experts) < config.num_experts for experts in expected.values())
    for run in (lambda: mapped.extend([tokens], [KVCache(config, length)]), lambda: mapped(tokens[None])):
        reads.clear()
        run()
        assert experts_of(reads) == expected


def test_only_the_rows_of_the_embedding_that_occur_are_read(reads):
    mapped = Mixtral.from_pretrained(GOLDEN / "plain", mmap=True)
    reads.clear()
    mapped(np.array([[7, 3, 7, 46]]))
    assert [row for name, _, row in reads if name == "model.embed_tokens.weight"] == [3, 7, 46]


def test_mapped_model_refuses_to_be_trained():
    mapped = Mixtral.from_pretrained(GOLDEN / "plain", mmap=True)
    tokens = np.arange(9)[None]
    with pytest.raises(InputError, match="without mmap"):
        mapped.loss_and_grads(tokens, tokens)


# Mixtral 8x7B, as holes.


@pytest.fixture
def mixtral_8x7b(tmp_path):
    """Return a model directory with the config and all tensors of Mixtral 8x7B, their 93 GB a hole in the file."""
    D, F, V, E, kv = 4096, 14336, 32000, 8, 1024
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "block_sparse_moe.gate": (E, D)}
    layer |= {f"self_attn.{x}_proj": (kv if x in "kv" else D, D) for x in "qkvo"}
    for e in range(E):
        layer |= {f"block_sparse_moe.experts.{e}.{w}": (D, F) if w == "w2" else (F, D) for w in ("w1", "w2", "w3")}
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(32) for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    path = tmp_path / "model.safetensors"
    try:
        write_parts(path, header, b"")
        os.truncate(path, path.stat().st_size + end)
    except OSError as error:
        pytest.skip(f"no file of 93 GB can be made here: {error}")
    if path.stat().st_blocks * 512 > 2**24:
        path.unlink()
        pytest.skip("this file system has no sparse files")
    config = dict(model_type="mixtral", hidden_size=D, intermediate_size=F, num_hidden_layers=32)
    config |= dict(num_attention_heads=32, num_key_value_heads=8, num_local_experts=E, num_experts_per_tok=2)
    config |= dict(vocab_size=V, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    yield tmp_path
    path.unlink()


def test_mixtral_8x7b_opens_in_three_seconds_with_every_parameter(mixtral_8x7b, reads):
    start = time.perf_counter()
    model = Mixtral.from_pretrained(mixtral_8x7b, mmap=True)
    assert time.perf_counter() - start < 3
    assert {name for name, *_ in reads} <= {"model.norm.weight"}
    assert sum(map(math.prod, model.params.shapes.values())) == 46_702_792_704
    assert model.config.count_parameters() == 46_702_792_704
