"""Writing a model directory in transformers' layout: each file, and the model, is replaced whole or not at all."""

import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tinymoe.atomic import write_json, write_tensors
from tinymoe.checkpoint.names import to_hf
from tinymoe.config import MixtralConfig
from tinymoe.errors import InputError

Array = np.ndarray
SAVED = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHARD_BYTES = 5 * 10**9


def save(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: MixtralConfig,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    eos_token: int | None = None,
) -> None:
    """Write config.json and the weights in transformers' layout, each file replaced whole or not at all.

    Parameters
    ----------
    directory
        Made if it does not exist.
    dtype
        float64, float32, float16 or bfloat16; None: that of the parameters.
    shard_bytes
        Above this size the weights are cut into shards with an index.
    eos_token
        What config.json says ends a text.

    Raises
    ------
    InputError
        Unknown dtype, or the directory cannot be written.
    """
    dtype = dtype or str(params["norm"].dtype)
    if dtype not in SAVED:
        raise InputError(f"dtype {dtype!r} is not one to save in; give {', '.join(SAVED)}")
    shards = _shards(_converted(to_hf(params, config), SAVED[dtype]), shard_bytes)
    try:
        _replace_weights(Path(directory), shards)
        values = config.to_hf() | {"dtype": dtype, "eos_token_id": eos_token}
        write_json(Path(directory) / "config.json", values)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}") from None


def _converted(tensors: dict[str, Array], dtype: Any) -> dict[str, Array]:
    converted = {}
    for name, array in tensors.items():
        with np.errstate(over="ignore"):
            converted[name] = np.ascontiguousarray(array, dtype)
        if not np.isfinite(converted[name]).all():
            raise InputError(f"tensor {name} holds values that are not finite in {np.dtype(dtype)}: nothing was saved")
    return converted


def _shards(tensors: dict[str, Array], shard_bytes: int) -> list[dict[str, Array]]:
    """Cut tensors into groups of at most so many bytes, or one tensor."""
    shards: list[dict[str, Array]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def _replace_weights(directory: Path, shards: list[dict[str, Array]]) -> None:
    """Write the weights, and only when all are there make them those of the directory, in one step.

    A single file is renamed into place. Shards get names that no file has, and the index that names them is renamed
    into place. What was there before is deleted last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    before = set(directory.glob("model-*-of-*.safetensors"))
    if len(shards) == 1:
        write_tensors(single, shards[0], {"format": "pt"})
        index.unlink(missing_ok=True)
    else:
        turn = next(t for t in count() if not list(directory.glob(f"model-{t}-*-of-*.safetensors")))
        names = [f"model-{turn}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        try:
            for name, shard in zip(names, shards):
                write_tensors(directory / name, shard, {"format": "pt"})
            weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
            total = sum(array.nbytes for shard in shards for array in shard.values())
            write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        except BaseException:
            if not (index.exists() and names[0] in index.read_text()):
                for name in names:
                    (directory / name).unlink(missing_ok=True)
            raise
        single.unlink(missing_ok=True)
    for path in before:
        path.unlink(missing_ok=True)
