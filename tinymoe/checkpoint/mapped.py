"""Parameters that stay on disk, memory-mapped: what is indexed is read and converted, and nothing else."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymoe.checkpoint.names import neighbours_from_halves
from tinymoe.errors import InputError

Array = np.ndarray


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
