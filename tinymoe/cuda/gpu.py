"""Launch kernels on an NVIDIA GPU: compiled by NVRTC to a cubin for the card, loaded and run by CuPy."""

import functools
import hashlib
import os
from typing import Any

import cupy

from tinymoe.cuda.device import Kernels
from tinymoe.cuda.emulator.compiler import cache
from tinymoe.cuda.nvrtc import compile_cubin


def launch(kernels: Kernels, expression: str, grid: tuple, block: tuple, arguments: list[Any], shared: int) -> None:
    """Launch on the current stream."""
    function = _function(kernels, expression, cupy.cuda.Device().id)
    if shared > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = shared
    function(grid, block, tuple(arguments), shared_mem=shared)


@functools.cache
def _function(kernels: Kernels, expression: str, card: int) -> Any:
    module, names = _module(kernels, card)
    return module.get_function(names[expression])


@functools.cache
def _module(kernels: Kernels, card: int) -> tuple[Any, dict[str, str]]:
    # CuPy would compile for sm_90, without the a that wgmma needs. A cubin it loads as it is, from a file.
    compiled = compile_cubin(kernels, architecture(cupy.cuda.Device(card).compute_capability))
    path = cache() / f"{kernels.source.stem}-{hashlib.sha256(compiled.cubin).hexdigest()[:20]}.cubin"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(compiled.cubin)
        os.replace(partial, path)
    return cupy.RawModule(path=str(path)), compiled.names


def architecture(capability: str) -> str:
    """Return what to compile for on a card: on Hopper the architecture with its own features, sm_90a."""
    return f"sm_{capability}a" if capability == "90" else f"sm_{capability}"
