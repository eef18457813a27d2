"""Saving leaves the old model or the new, never a mixture: killed, interrupted, or with the disk full."""

import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import assert_same, old_and_new, one_line, same

from tinymoe import InputError, Mixtral, atomic, checkpoint

SINGLE, SMALL_SHARDS, LARGER_SHARDS = 10**9, 6000, 12000


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
from checkpoints import old_and_new

from tinymoe import atomic, checkpoint

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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
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
