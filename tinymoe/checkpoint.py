"""Checkpoints: safetensors in transformers' and Mistral's layouts, whole or memory-mapped, written atomically."""

import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tinymoe.atomic import write_json, write_tensors
from tinymoe.config import MixtralConfig, read_json_object
from tinymoe.errors import InputError

Array = np.ndarray
STORED = {"F64", "F32", "F16", "BF16"}
SAVED = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
SHARD_BYTES = 5 * 10**9
LARGEST_HEADER = 10**8  # bytes; the limit of safetensors itself

# Our name (without layers.N.) -> the name on disk, first in transformers' files, then in Mistral's. {e} is the expert.
TOP = {
    "tok_embeddings": ("model.embed_tokens.weight", "tok_embeddings.weight"),
    "norm": ("model.norm.weight", "norm.weight"),
    "output": ("lm_head.weight", "output.weight"),
}
LAYER = {
    "attention_norm": ("input_layernorm.weight", "attention_norm.weight"),
    "attention.wq": ("self_attn.q_proj.weight", "attention.wq.weight"),
    "attention.wk": ("self_attn.k_proj.weight", "attention.wk.weight"),
    "attention.wv": ("self_attn.v_proj.weight", "attention.wv.weight"),
    "attention.wo": ("self_attn.o_proj.weight", "attention.wo.weight"),
    "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "moe.gate": ("block_sparse_moe.gate.weight", "feed_forward.gate.weight"),
    "moe.w1": ("block_sparse_moe.experts.{e}.w1.weight", "feed_forward.experts.{e}.w1.weight"),
    "moe.w2": ("block_sparse_moe.experts.{e}.w2.weight", "feed_forward.experts.{e}.w2.weight"),
    "moe.w3": ("block_sparse_moe.experts.{e}.w3.weight", "feed_forward.experts.{e}.w3.weight"),
    "moe.noise": ("block_sparse_moe.gate.noise.weight", "feed_forward.gate.noise.weight"),
    "moe.bias": ("block_sparse_moe.gate.e_score_correction_bias", "feed_forward.gate.e_score_correction_bias"),
    "ffn.w1": ("mlp.gate_proj.weight", "feed_forward.w1.weight"),
    "ffn.w2": ("mlp.down_proj.weight", "feed_forward.w2.weight"),
    "ffn.w3": ("mlp.up_proj.weight", "feed_forward.w3.weight"),
}


# Reading.


def load(
    directory: str | os.PathLike[str], dtype: str | np.dtype = "float32", mmap: bool = False
) -> tuple[MixtralConfig, Mapping[str, Any]]:
    """Read a model directory.

    Parameters
    ----------
    directory
        In transformers' layout (config.json with model.safetensors or its shards; experts apart, as version 4 names
        them, or fused as in version 5) or Mistral's (params.json with consolidated.safetensors).
    dtype
        Of the arrays that are returned, whatever the files hold.
    mmap
        Return a `MappedParams`, which reads at each use, instead of a dict of arrays.

    Raises
    ------
    InputError
        Something is missing, unexpected, misshapen, truncated, not finite or pickled; the message names it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no model directory {directory}: give a folder with config.json and model.safetensors")
    found = [layout for layout in (_TRANSFORMERS, _MISTRAL) if (directory / layout.config_file).is_file()]
    for layout in found:
        for weights in (layout.weights_file, layout.weights_file + ".index.json"):
            if (directory / weights).is_file():
                config = MixtralConfig.from_file(directory / layout.config_file)
                params = MappedParams(_tensors(config, layout, _open(directory / weights)), np.dtype(dtype))
                return config, params if mmap else params.read_all()
    raise InputError(_why_not(directory, found))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which files a layout has, and which of the two names on disk it uses."""

    config_file: str
    weights_file: str
    column: int


_TRANSFORMERS = Layout("config.json", "model.safetensors", 0)
_MISTRAL = Layout("params.json", "consolidated.safetensors", 1)


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a parameter as it lies on disk."""

    file: Any  # safe_open's handle
    path: Path
    name: str
    shape: tuple[int, ...]  # of the whole tensor on disk
    index: tuple[Any, ...] = ()  # the piece of it
    rope_heads: int = 0  # when set, rotary pairs are halves of each of so many heads, to become neighbours

    def read(self, dtype: np.dtype, row: int | None = None) -> Array:
        """Return the piece, or one row of it, converted; refuse values that are not finite."""
        index = self.index if row is None else (*self.index, row)
        stored = self.file.get_slice(self.name)[index] if index else self.file.get_tensor(self.name)
        with np.errstate(over="ignore"):
            array = stored.astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise InputError(
                f"{self.path}: tensor {self.name} holds values that are not finite in {dtype}: is it damaged?"
            )
        return neighbours_from_halves(array, self.rope_heads) if self.rope_heads else array


class OnDisk:
    """A parameter that stays on disk: indexing it by expert, or by rows of the vocabulary, reads just that.

    Parameters
    ----------
    shape
        Of the parameter.
    parts
        One, or one per expert.
    dtype
        Of what is returned.
    """

    def __init__(self, shape: tuple[int, ...], parts: list[Part], dtype: np.dtype):
        self.shape, self.parts, self.dtype = shape, parts, dtype

    def __getitem__(self, index: Any) -> Array:
        if len(self.shape) == 3:
            return self.parts[index].read(self.dtype)
        rows, inverse = np.unique(index, return_inverse=True)
        return np.stack([self.parts[0].read(self.dtype, row) for row in rows.tolist()])[inverse]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if len(self.shape) < 3:
            return self.parts[0].read(self.dtype).astype(dtype or self.dtype, copy=False)
        whole = np.empty(self.shape, dtype or self.dtype)
        for e, part in enumerate(self.parts):
            whole[e] = part.read(self.dtype)
        return whole


class MappedParams(Mapping[str, Any]):
    """Parameters by name, read from disk and converted at each use; experts and the embedding come as `OnDisk`."""

    def __init__(self, parts: Mapping[str, tuple[tuple[int, ...], list[Part]]], dtype: np.dtype):
        self.shapes = {name: shape for name, (shape, _) in parts.items()}
        self._on_disk = {name: OnDisk(shape, pieces, dtype) for name, (shape, pieces) in parts.items()}

    def __getitem__(self, name: str) -> Any:
        tensor = self._on_disk[name]
        return tensor if len(tensor.shape) == 3 or name == "tok_embeddings" else np.asarray(tensor)

    def __contains__(self, name: object) -> bool:
        return name in self._on_disk  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._on_disk)

    def __len__(self) -> int:
        return len(self._on_disk)

    def read_all(self) -> dict[str, Array]:
        """Return every parameter as an array in memory."""
        # safetensors hands out read-only arrays when nothing was converted; parameters are updated in place
        return {name: np.require(np.asarray(tensor), requirements=["C", "W"]) for name, tensor in self._on_disk.items()}


class _Files:
    """The tensors of one or more safetensors files by name."""

    def __init__(self, tensors: dict[str, tuple[Any, Path]]):
        self.tensors = tensors
        self.unused = set(tensors)

    def part(self, name: str, shape: tuple[int, ...], **piece: Any) -> Part:
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


def _open(path: Path) -> _Files:
    if path.suffix != ".json":
        file = _open_file(path)
        return _Files(dict.fromkeys(file.keys(), (file, path)))
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
    return _Files(tensors)


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


def _tensors(config: MixtralConfig, layout: Layout, files: _Files) -> dict[str, tuple[tuple[int, ...], list[Part]]]:
    """Return name → (shape, parts on disk) of every parameter, having checked that the files fit the config."""
    tensors = {name: (shape, _parts(name, shape, config, layout, files)) for name, shape in config.parameter_shapes()}
    # old files carry the rotary frequencies, which follow from the config
    if extra := sorted(name for name in files.unused if not name.endswith("rotary_emb.inv_freq")):
        raise InputError(f"tensor {extra[0]} in {files.tensors[extra[0]][1]} does not belong to this config")
    return tensors


def _parts(name: str, shape: tuple[int, ...], config: MixtralConfig, layout: Layout, files: _Files) -> list[Part]:
    if name in TOP:
        return [files.part(TOP[name][layout.column], shape)]
    _, layer, short = name.split(".", 2)
    prefix = f"layers.{layer}." if layout is _MISTRAL else f"model.layers.{layer}."
    on_disk = prefix + LAYER[short][layout.column]
    if short.startswith("moe.") and layout is _TRANSFORMERS and f"{prefix}mlp.gate.weight" in files.tensors:
        on_disk = on_disk.replace("block_sparse_moe", "mlp")  # version 5's name
    if len(shape) < 3:
        return [files.part(on_disk, shape, rope_heads=rope_heads(short, config) if layout is _TRANSFORMERS else 0)]
    E, F, D = config.num_experts, config.hidden_dim, config.dim
    experts = on_disk.split("{e}")[0]
    if f"{experts}gate_up_proj" in files.tensors:  # all experts in one tensor, w1 above w3
        if short == "moe.w2":
            return [files.part(f"{experts}down_proj", (E, D, F), index=(e,)) for e in range(E)]
        half = slice(0, F) if short == "moe.w1" else slice(F, 2 * F)
        return [files.part(f"{experts}gate_up_proj", (E, 2 * F, D), index=(e, half)) for e in range(E)]
    return [files.part(on_disk.format(e=e), shape[1:]) for e in range(E)]


def _why_not(directory: Path, found: list[Layout]) -> str:
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLED)
    if pickled:
        return (
            f"{directory / pickled[0]} is a pickled checkpoint, and unpickling executes code from the file: "
            "convert it to safetensors where you trust it"
        )
    if not found:
        return f"{directory} holds neither config.json nor params.json: is it a model directory?"
    return f"{directory} holds {found[0].config_file} but no {found[0].weights_file}: is the download complete?"


def rope_heads(name: str, config: MixtralConfig) -> int:
    """Return the number of heads in a weight whose rows are rotated, 0 for all other weights."""
    return {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}.get(name, 0)


def neighbours_from_halves(w: Array, heads: int) -> Array:
    """Reorder the rows of wq or wk (heads · K, D) from rotary pairs (j, j + K/2) to pairs (2j, 2j + 1)."""
    return np.ascontiguousarray(w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2)).reshape(w.shape)


def halves_from_neighbours(w: Array, heads: int) -> Array:
    """Reorder the rows of wq or wk (heads · K, D) from rotary pairs (2j, 2j + 1) to pairs (j, j + K/2)."""
    return np.ascontiguousarray(w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2)).reshape(w.shape)


# Writing.


def to_hf(arrays: Mapping[str, Any], config: MixtralConfig) -> dict[str, Array]:
    """Return parameters or gradients under transformers' names on disk: Mixtral's, or Mistral's when dense.

    Experts, stacked here, are separate tensors there, and wq and wk have their rows in another order (see `rope`).
    """
    tensors = {}
    for name, _ in config.parameter_shapes():
        if name in TOP:
            tensors[TOP[name][0]] = np.asarray(arrays[name])
            continue
        _, layer, short = name.split(".", 2)
        on_disk = f"model.layers.{layer}.{LAYER[short][0]}"
        if "{e}" in on_disk:
            tensors |= {on_disk.format(e=e): arrays[name][e] for e in range(config.num_experts)}
        else:
            array, heads = np.asarray(arrays[name]), rope_heads(short, config)
            tensors[on_disk] = halves_from_neighbours(array, heads) if heads else array
    return tensors


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
