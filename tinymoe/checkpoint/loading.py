"""Opening a model directory: which files it has, and which of their tensors each parameter is."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymoe.checkpoint.files import Files, open_files
from tinymoe.checkpoint.mapped import MappedParams, Part
from tinymoe.checkpoint.names import LAYER, TOP, rope_heads
from tinymoe.config import MixtralConfig
from tinymoe.errors import InputError

PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which files a layout has, and which of the two names on disk it uses."""

    config_file: str
    weights_file: str
    column: int


_TRANSFORMERS = Layout("config.json", "model.safetensors", 0)
_MISTRAL = Layout("params.json", "consolidated.safetensors", 1)


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
                params = MappedParams(_tensors(config, layout, open_files(directory / weights)), np.dtype(dtype))
                return config, params if mmap else params.read_all()
    raise InputError(_why_not(directory, found))


def _tensors(config: MixtralConfig, layout: Layout, files: Files) -> dict[str, tuple[tuple[int, ...], list[Part]]]:
    """Return name → (shape, parts on disk) of every parameter, having checked that the files fit the config."""
    tensors = {name: (shape, _parts(name, shape, config, layout, files)) for name, shape in config.parameter_shapes()}
    # old files carry the rotary frequencies, which follow from the config
    if extra := sorted(name for name in files.unused if not name.endswith("rotary_emb.inv_freq")):
        raise InputError(f"tensor {extra[0]} in {files.tensors[extra[0]][1]} does not belong to this config")
    return tensors


def _parts(name: str, shape: tuple[int, ...], config: MixtralConfig, layout: Layout, files: Files) -> list[Part]:
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
