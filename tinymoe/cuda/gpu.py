"""Kernels on an NVIDIA GPU: compiled by NVRTC to a cubin for the card, loaded and launched by CuPy."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from tinymoe.cuda.device import Kernels

INCLUDE = Path(__file__).parent / "include"


class Compiled:
    """A cubin and what the compiler said of it.

    Attributes
    ----------
    cubin
        Machine code.
    names
        Expression → the name of its function in the cubin.
    log
        NVRTC's, with ptxas' lines on registers, stack and spills.
    """

    def __init__(self, cubin: bytes, names: dict[str, str], log: str):
        self.cubin, self.names, self.log = cubin, names, log


def compile_cubin(kernels: Kernels, architecture: str) -> Compiled:
    """Compile all instantiations of a file for an architecture such as ``sm_90a``; no GPU is needed.

    Raises
    ------
    RuntimeError
        NVRTC's message.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(kernels.source.read_text(), kernels.source.name, [], [])
    try:
        for expression in kernels.expressions:
            nvrtc.addNameExpression(program, expression)
        options = [
            "--std=c++17",
            f"--gpu-architecture={architecture}",
            f"--include-path={INCLUDE}",
            f"--include-path={kernels.source.parent}",
            *(f"--include-path={path}" for path in _cuda_headers()),
            "--ptxas-options=-v",
            "--device-as-default-execution-space",
        ]
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{kernels.source.name}: {error}\n{nvrtc.getProgramLog(program)}") from None
        names = {expression: nvrtc.getLoweredName(program, expression) for expression in kernels.expressions}
        return Compiled(nvrtc.getCUBIN(program), names, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def _cuda_headers() -> list[str]:
    """Return the folders of cuda_bf16.h and cuda_fp16.h: of the wheel nvidia-cuda-runtime, or of a toolkit."""
    import nvidia

    found = [str(p.parent) for root in nvidia.__path__ for p in Path(root).glob("**/include/cuda_bf16.h")]
    toolkit = Path(os.environ.get("CUDA_PATH", "/usr/local/cuda")) / "include"
    return found or [str(toolkit)]


def launch(kernels: Kernels, expression: str, grid: tuple, block: tuple, arguments: list[Any], shared: int) -> None:
    """Launch on the current stream."""
    function = _function(kernels, expression)
    if shared > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = shared
    function(grid, block, tuple(arguments), shared_mem=shared)


@functools.cache
def _function(kernels: Kernels, expression: str) -> Any:
    module, names = _module(kernels)
    return module.get_function(names[expression])


@functools.cache
def _module(kernels: Kernels) -> tuple[Any, dict[str, str]]:
    import cupy

    from tinymoe.cuda.emulator.compiler import cache

    capability = cupy.cuda.Device().compute_capability
    compiled = compile_cubin(kernels, f"sm_{capability}a" if capability == "90" else f"sm_{capability}")
    # CuPy compiles sources for sm_90, without the a that wgmma needs; it loads a cubin as it is, from a file.
    path = cache() / f"{kernels.source.stem}-{hashlib.sha256(compiled.cubin).hexdigest()[:20]}.cubin"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(compiled.cubin)
        os.replace(partial, path)
    return cupy.RawModule(path=str(path)), compiled.names
