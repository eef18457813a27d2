"""A run directory: the model, the training state, the metrics, and the manifest that says how to repeat it."""

import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (its import teaches NumPy, and so safetensors, what bfloat16 is)
import numpy as np
from safetensors import SafetensorError, safe_open

from tinymoe import __version__, atomic
from tinymoe.checks import DTYPES
from tinymoe.config import MixtralConfig, read_json_object
from tinymoe.errors import InputError
from tinymoe.model import Mixtral
from tinymoe.reference.optimizer import AdamW

MANIFEST, STATE, METRICS = "manifest.json", "training_state.safetensors", "metrics.jsonl"


class Run(NamedTuple):
    """A run directory and what its manifest says."""

    directory: Path
    config: MixtralConfig
    manifest: dict[str, Any]


def create(
    directory: Path,
    config: MixtralConfig,
    options: dict[str, Any],
    data: dict[str, Any],
    num_workers: int,
    command: str,
    backend: str = "reference",
    dtype: str = "float32",
    objective: dict[str, Any] | None = None,
) -> Run:
    """Make a new run; from its manifest on, written last, it exists and can be resumed.

    ``objective`` is that of `tinymoe.instruct`: its name, the model to start from and its SHA-256, the token that ends
    an answer, and beta for DPO; None: pre-training on text.

    Raises
    ------
    InputError
        The directory holds a run or a model already, or cannot be written.
    """
    refuse_existing(directory)
    manifest = {
        "tinymoe": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.platform(),
        "command": command,
        "num_workers": num_workers,
        "backend": backend,
        "dtype": dtype,
        "options": options,
        "data": data,
        "objective": objective,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        end = {"eos_token_id": _end_token(manifest)}
        atomic.write_json(directory / "config.json", config.to_hf() | {"dtype": dtype} | end)
        atomic.write_json(directory / MANIFEST, manifest)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}") from None
    return Run(directory, config, manifest)


def refuse_existing(directory: Path) -> None:
    """Raise InputError if the directory holds a run or a model, which a new run would overwrite."""
    if (directory / MANIFEST).exists():
        raise InputError(
            f"{directory} already holds a run: --resume {directory} goes on with it, or give another --out"
        )
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a folder for the run with --out")
    held = [path.name for path in directory.glob("*.safetensors*")] if directory.is_dir() else []
    if held:
        raise InputError(f"{directory} already holds {held[0]}: give another --out, nothing is overwritten")


def open_run(directory: Path) -> Run:
    """Read a run's manifest and config.

    Raises
    ------
    InputError
        There is no run, or its manifest lacks something.
    """
    if not (directory / MANIFEST).is_file():
        raise InputError(f"{directory} holds no run to resume: start one with --out {directory}")
    manifest = read_json_object(directory / MANIFEST)
    for key in ("num_workers", "options", "data"):
        if key not in manifest:
            raise InputError(f"{directory / MANIFEST} lacks {key!r}: it is damaged, or not of tinymoe train")
    backend, dtype = manifest.setdefault("backend", "reference"), manifest.setdefault("dtype", "float32")
    if backend not in list(DTYPES):
        raise InputError(f"{directory / MANIFEST} has the backend {backend!r}; there is reference and cuda")
    if dtype not in DTYPES[backend]:
        raise InputError(
            f"{directory / MANIFEST} has the dtype {dtype!r}; {backend} computes in {' or '.join(DTYPES[backend])}"
        )
    objective = manifest.setdefault("objective", None)
    keys = {"name", "init", "init_sha256", "end_token"}
    if objective is not None and not (isinstance(objective, dict) and keys <= objective.keys()):
        raise InputError(f"{directory / MANIFEST} has the objective {objective!r}; it needs {', '.join(sorted(keys))}")
    return Run(directory, MixtralConfig.from_file(directory / "config.json"), manifest)


def save(run: Run, model: Mixtral, optimizer: AdamW) -> None:
    """Save the training state, and the model for everyone else.

    The state is whole in one file, so that whenever the process dies, one consistent state is there to resume from.
    The model has its weights as they compute, in bfloat16 if they do; their float32 masters are in the state alone.

    Raises
    ------
    InputError
        The directory cannot be written; the last save remains.
    """
    arrays = {name: model.host(array) for name, array in _state(model, optimizer).items()}
    try:
        atomic.write_tensors(run.directory / STATE, arrays, {"step": str(optimizer.steps)})
    except OSError as error:
        raise InputError(f"cannot write to {run.directory}: {error.strerror or error}") from None
    model.save_pretrained(run.directory, eos_token=_end_token(run.manifest))


def _end_token(manifest: dict[str, Any]) -> int | None:
    return (manifest.get("objective") or {}).get("end_token")


def restore(run: Run, model: Mixtral, optimizer: AdamW) -> None:
    """Bring the model and the optimizer to the last saved state, if there is one.

    Raises
    ------
    InputError
        The state is damaged or belongs to another config.
    """
    path = run.directory / STATE
    if not path.exists():
        return
    try:
        with safe_open(path, "np") as file:
            steps = int((file.metadata() or {}).get("step", ""))
            for name, array in _state(model, optimizer).items():
                stored = file.get_tensor(name)
                if stored.shape != array.shape:
                    raise ValueError(f"{name} has shape {stored.shape}; the config asks for {array.shape}")
                if stored.dtype != array.dtype:
                    raise ValueError(f"{name} has dtype {stored.dtype}; the manifest's dtype asks for {array.dtype}")
                array[...] = model.place(stored)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be resumed from: {str(error).splitlines()[0]}") from None
    optimizer.steps = steps


def _state(model: Mixtral, optimizer: AdamW) -> dict[str, Any]:
    """Return the arrays that the next step depends on, by their names on disk."""
    kinds = {"param": model.params, "m": optimizer.m, "v": optimizer.v, "master": getattr(optimizer, "master", {})}
    return {f"{kind}.{name}": array for kind, of in kinds.items() for name, array in of.items()}


def steps_done(run: Run) -> int:
    """Return the step of the last saved state, 0 if nothing was saved."""
    path = run.directory / STATE
    if not path.exists():
        return 0
    try:
        with safe_open(path, "np") as file:
            return int((file.metadata() or {}).get("step", ""))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be resumed from: {str(error).splitlines()[0]}") from None


class Metrics:
    """metrics.jsonl: one JSON object per step, appended; opened at a step, it drops the lines after it."""

    def __init__(self, run: Run, steps: int):
        path = run.directory / METRICS
        kept = [line for line in read_metrics(path) if line["step"] <= steps]
        try:
            with atomic.replacing(path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._file = open(path, "a")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Put on disk what was written; call it before the state is saved, so that no step is missing later."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, up to the first that a killed process left incomplete."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            break
    return lines
