"""Golden checkpoints to damage, and how one that cannot be used is refused: in one line."""

import contextlib
import json
import shutil
import signal
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinymoe import InputError, Mixtral, checkpoint

GOLDEN = Path(__file__).parent / "golden"

either_way = pytest.mark.parametrize("mmap", [False, True], ids=["whole", "mapped"])


def copy_of(case, folder):
    """Copy a golden checkpoint into a folder, to be damaged."""
    folder.mkdir(exist_ok=True)
    for file in (GOLDEN / case).iterdir():
        if file.name != "expected.safetensors":
            shutil.copy(file, folder)
    return folder


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


def old_and_new():
    """Return the config and two sets of weights of a small model."""
    config, old = checkpoint.load(GOLDEN / "plain")
    return config, old, {name: array + np.float32(1) for name, array in old.items()}
