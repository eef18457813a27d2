"""Compile kernels for NVIDIA GPUs with NVRTC, which needs no GPU, and read what they take of one."""

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from tinymoe.cuda.device import Kernels
from tinymoe.errors import InputError

INCLUDE = Path(__file__).parent / "include"
ARCHITECTURES = ("sm_80", "sm_90", "sm_90a")  # A100; H100 and H200, without and with Hopper's own instructions


def architectures_of(kernels: Kernels) -> tuple[str, ...]:
    """Return those of `ARCHITECTURES` that a file's kernels are for."""
    return (kernels.only_for,) if kernels.only_for else ARCHITECTURES


class Resources(NamedTuple):
    """What one thread or block of a kernel takes, as ptxas tells."""

    registers: int  # of a thread
    shared: int  # bytes of static shared memory of a block
    stack: int  # bytes of a thread
    spills: int  # bytes that a thread stores and loads because registers ran out


class Compiled(NamedTuple):
    """All instantiations of one file for one architecture."""

    cubin: bytes
    names: dict[str, str]  # expression → name of its function in the cubin
    resources: dict[str, Resources]  # by expression
    advice: list[str]  # of ptxas: what it had to change, or do slowly


def compile_cubin(kernels: Kernels, architecture: str) -> Compiled:
    """Compile a file's instantiations for an architecture such as ``sm_90a``.

    Raises
    ------
    InputError
        NVRTC is not installed.
    RuntimeError
        A kernel does not compile; the message is NVRTC's.
    """
    nvrtc = _nvrtc()
    source = kernels.source.read_text().encode()
    program = _done(nvrtc.nvrtcCreateProgram(source, kernels.source.name.encode(), 0, [], []))
    try:
        for expression in kernels.expressions:
            _done(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        folders = [INCLUDE, kernels.source.parent, *cuda_headers()]
        options = [
            "--std=c++17",
            f"--gpu-architecture={architecture}",
            "--device-as-default-execution-space",
            "--ptxas-options=-v",
            *(f"--include-path={folder}" for folder in folders),
        ]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
        _done(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode(errors="replace").rstrip(" \0")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{kernels.source.name} for {architecture}: {text}")
        names = {e: _done(nvrtc.nvrtcGetLoweredName(program, e.encode())).decode() for e in kernels.expressions}
        cubin = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
        _done(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        _done(nvrtc.nvrtcDestroyProgram(program))
    advice = re.findall(r".*\(C\d+\).*", text)
    return Compiled(cubin, names, {e: _resources(text, name) for e, name in names.items()}, advice)


def _resources(log: str, name: str) -> Resources:
    """Read ptxas' lines on one function."""
    part = log.split(f"Function properties for {name}", 1)[1].split("Function properties", 1)[0]

    def number(pattern: str) -> int:
        found = re.search(pattern, part)
        return int(found[1]) if found else 0

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes smem"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    )


def cuda_headers() -> list[Path]:
    """Return the folders of CUDA's own headers: of the wheel nvidia-cuda-runtime, or of a toolkit at $CUDA_PATH."""
    folders = [Path(os.environ.get("CUDA_PATH", "/usr/local/cuda")) / "include"]
    try:
        import nvidia
    except ImportError:
        pass
    else:
        wheels = (Path(root) for root in nvidia.__path__)
        folders = [path.parent for root in wheels for path in root.glob("*/include/cuda_bf16.h")] + folders
    return [folder for folder in folders if folder.is_dir()]


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise InputError("compiling for a GPU needs NVRTC: pip install 'tinymoe[nvrtc]'") from None
    for library in _builtins():  # NVRTC looks for it by its bare name
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return nvrtc


def _builtins() -> list[Path]:
    try:
        import nvidia
    except ImportError:
        return []
    return [path for root in nvidia.__path__ for path in Path(root).glob("*/lib/libnvrtc-builtins.so*")]


def _done(answer: tuple) -> Any:
    """Return what a call of NVRTC gives beside its status."""
    status, *values = answer
    if status.value:
        raise RuntimeError(f"NVRTC: {status.name}")
    return values[0] if values else None
