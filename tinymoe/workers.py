"""Data-parallel workers: threads with one BLAS thread each, and memory that is kept from step to step."""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
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
    calls = list(zip(*arguments))
    with _one_blas_thread(), kept_memory():
        if min(workers, len(calls)) <= 1:
            return [function(*call) for call in calls]
        return list(_pool(workers).map(lambda call: function(*call), calls))


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="tinymoe")


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    libraries = _blas()
    before = [library.num_threads for library in libraries]
    for library in libraries:
        library.set_num_threads(1)
    try:
        yield
    finally:
        for library, threads in zip(libraries, before):
            library.set_num_threads(threads)


@functools.cache
def _blas() -> list[Any]:
    return ThreadpoolController().select(user_api="blas").lib_controllers


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Have glibc serve every allocation from its heap, and keep what is freed there.

    A training step allocates the same arrays as the step before. By default the large ones are mapped afresh each
    time and their pages fault in one by one, which can cost more than what is computed in them. Outside, large arrays
    are mapped again, from the size on at which glibc's own adaptation ends. Without glibc nothing changes.
    """
    _inside(+1)
    try:
        yield
    finally:
        _inside(-1)


def _inside(change: int) -> None:
    """Count who is inside `kept_memory`, on whatever thread; the first in and the last out set the option."""
    with _LOCK:
        before, _INSIDE[0] = _INSIDE[0], _INSIDE[0] + change
        if 0 in (before, _INSIDE[0]):
            _mallopt()(M_MMAP_MAX, 0 if _INSIDE[0] else 65536)


_LOCK = threading.Lock()
_INSIDE = [0]
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8  # of malloc.h


@functools.cache
def _mallopt() -> Callable[[int, int], int]:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return lambda option, value: 0
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)  # as large as the heap of a thread may be, which is then never given back
    mallopt(M_MMAP_THRESHOLD, 2**25)
    mallopt(M_ARENA_MAX, 1)  # one heap for all workers: what one frees the next can use
    return mallopt
