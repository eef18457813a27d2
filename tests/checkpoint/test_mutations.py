"""Two hundred mutations of checkpoints: each opens as the same weights, or is refused in one line."""

import math
import os
import struct

import numpy as np
import pytest
from checkpoints import GOLDEN, assert_same, bounded, copy_of, edit_json, one_line, read_parts, same, use, write_parts

from tinymoe import InputError, Mixtral, checkpoint


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
