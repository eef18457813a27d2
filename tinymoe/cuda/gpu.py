"""Launch kernels on an NVIDIA GPU: compiled by NVRTC to a cubin for the card, loaded and run by CuPy."""

import functools
import hashlib
import os
import subprocess
import weakref
from collections.abc import Callable
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


@functools.cache
def architecture_of_card() -> str:
    """Return what to compile for on the card in use."""
    return architecture(cupy.cuda.Device().compute_capability)


@functools.cache
def multiprocessors() -> int:
    """Return how many multiprocessors the card in use has."""
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def seconds(run: Callable[[], Any], ahead: Callable[[], Any]) -> tuple[float, bool]:
    """Return the seconds of what ``run`` launches, and whether the host was late; see `tinymoe.cuda.device.seconds`."""
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    ahead()
    start.record()
    run()
    stop.record()
    waited = start.done  # what went ahead had ended before all was queued
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3, waited  # of milliseconds


def record(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record what ``run`` launches as a CUDA graph; return what it returned, and what launches the graph.

    All of its arrays lie in a pool of their own, which lives as long as the graph: no other array gets their memory.
    The first run compiles and loads the kernels and fills the pool, where the second, which is recorded, finds most
    blocks free again. While a stream is recorded CuPy raises on copies from and to the host and on cuBLAS. With the
    graph its pool is given up, which has to give its blocks back first: CuPy forgets those of a pool that is gone.
    """
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # what the inputs are made of is done
    with stream, cupy.cuda.using_allocator(pool.malloc):
        run()
        stream.synchronize()
        stream.begin_capture()
        result = run()
        graph = stream.end_capture()

    def replay() -> None:
        graph.launch(cupy.cuda.get_current_stream())

    weakref.finalize(replay, pool.free_all_blocks)  # keeps the pool as long as the graph
    replay()  # a recorded run has computed nothing
    return result, replay


def synchronize() -> None:
    """Wait for all streams of the card in use."""
    cupy.cuda.Device().synchronize()


def free() -> None:
    """Give the memory pool's free blocks back."""
    cupy.get_default_memory_pool().free_all_blocks()


def description() -> dict[str, str | None]:
    """Return what a record says of the card in use: its name, its driver, and the versions of CUDA and of CuPy."""
    runtime = cupy.cuda.runtime
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    version = runtime.runtimeGetVersion()  # 13000 is 13.0
    return {
        "gpu": runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "driver": driver,
        "cuda": f"{version // 1000}.{version % 1000 // 10}",
        "cupy": cupy.__version__,
    }
