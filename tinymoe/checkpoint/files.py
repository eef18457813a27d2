"""Safetensors files, one or the shards that an index names: their tensors, and what is wrong where one is damaged."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (its import teaches NumPy, and so safetensors, what bfloat16 is)
from safetensors import SafetensorError, safe_open

from tinymoe.checkpoint.mapped import Part
from tinymoe.config import read_json_object
from tinymoe.errors import InputError

STORED = {"F64", "F32", "F16", "BF16"}
LARGEST_HEADER = 10**8  # bytes; the limit of safetensors itself


class Files:
    """The tensors of one or more safetensors files by name."""

    def __init__(self, tensors: dict[str, tuple[Any, Path]]):
        self.tensors = tensors
        self.unused = set(tensors)

    def part(self, name: str, shape: tuple[int, ...], **piece: Any) -> Part:
        """Return a piece of a tensor, having checked that the tensor is there, in that shape and a dtype of weights."""
        if name not in self.tensors:
            raise InputError(f"tensor {name} is missing from the checkpoint: is the download complete?")
        file, path = self.tensors[name]
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise InputError(f"{path}: tensor {name} has shape {stored.get_shape()}; the config asks for {list(shape)}")
        if stored.get_dtype() not in STORED:
            raise InputError(
                f"{path}: tensor {name} is stored as {stored.get_dtype()}; tinymoe reads {', '.join(sorted(STORED))}"
            )
        self.unused.discard(name)
        return Part(file, path, name, shape, **piece)


def open_files(path: Path) -> Files:
    """Open a safetensors file, or those that an index, a ``.json``, names; nothing is read but their headers."""
    if path.suffix != ".json":
        file = _open_file(path)
        return Files(dict.fromkeys(file.keys(), (file, path)))
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{path}: weight_map must be an object from tensor names to shard files")
    tensors: dict[str, tuple[Any, Path]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{path}: shard {shard!r} is not the name of a safetensors file in the model directory")
        file = _open_file(path.parent / shard)
        tensors |= dict.fromkeys(file.keys(), (file, path.parent / shard))
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name][1].name != shard:
            raise InputError(f"tensor {name} is missing from {path.parent / shard}, where {path.name} says it is")
    return Files(tensors)


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {_diagnosis(path) or str(error).splitlines()[0]}") from None


def _diagnosis(path: Path) -> str | None:
    """Say which tensor a truncated file ends in, or what is there in place of weights, if that is what is wrong."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start.startswith((b"version ", b"<")):
                return "it is a git-LFS pointer or a web page, not the weights: download the file itself"
            (header_bytes,) = struct.unpack("<Q", start)
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(header_bytes if header_bytes <= min(size, LARGEST_HEADER) else 0))
        tensors = [(spec["data_offsets"][1], name) for name, spec in header.items() if name != "__metadata__"]
        end, name = min((end, name) for end, name in tensors if 8 + header_bytes + end > size)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error):
        return None
    return f"it is truncated, tensor {name} needs {8 + header_bytes + end - size} bytes more: copy the file again"
