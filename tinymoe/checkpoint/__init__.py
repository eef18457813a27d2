"""Checkpoints: safetensors in transformers' and Mistral's layouts, whole or memory-mapped, written atomically."""

from tinymoe.checkpoint.loading import load
from tinymoe.checkpoint.mapped import MappedParams, OnDisk
from tinymoe.checkpoint.names import halves_from_neighbours, neighbours_from_halves, to_hf
from tinymoe.checkpoint.saving import SAVED, save

__all__ = [
    "SAVED",
    "MappedParams",
    "OnDisk",
    "halves_from_neighbours",
    "load",
    "neighbours_from_halves",
    "save",
    "to_hf",
]
