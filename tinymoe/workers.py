"""Data-parallel workers: threads with one BLAS thread each, and memory that is kept from step to step."""

import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from threadpoolctl import ThreadpoolController


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(function: Callable[..., Any], *arguments: Iterable[Any], workers: int) -> list[Any]:
    """Return ``list(map(function, *arguments))``, each call on its own thread, with one BLAS thread each.

    NumPy lets go of the interpreter inside its loops, so threads run side by side, and cutting the batch once keeps
    both cores busy in every line: cutting each matrix product in BLAS leaves all that lies between to one core.
    """
    _keep_memory()
    libraries = _blas()
    before = [library.num_threads for library in libraries]
    for library in libraries:
        library.set_num_threads(1)
    try:
        if workers == 1:
            return list(map(function, *arguments))
        return list(_pool(workers).map(function, *arguments))
    finally:
        for library, threads in zip(libraries, before):
            library.set_num_threads(threads)


@functools.cache
def _blas() -> list[Any]:
    return ThreadpoolController().select(user_api="blas").lib_controllers


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="tinymoe")


@functools.cache
def _keep_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the system.

    A training step allocates the same arrays as the step before. By default each large one is mapped afresh and
    its pages fault in one by one, which costs more than most of what is computed in it. Elsewhere than in glibc
    nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_… in malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)
