"""Fair timings on a noisy machine: alternate, take medians, and say where and when."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from tinymoe.workers import usable_cores


def alternate(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Return the seconds of each function in each round; a round runs them all, one after the other."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], other: str, ours: str) -> float:
    """Return the median over rounds of other's time to ours: above 1 means that ours is faster."""
    return statistics.median(a / b for a, b in zip(times[other], times[ours]))


def machine() -> dict[str, Any]:
    """Return what a record must say of where it was taken."""
    versions: dict[str, str | None] = {}
    for package in ("tinymoe", "numpy", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        **versions,
        **_gpu(),
    }


def _gpu() -> dict[str, str | None]:
    from tinymoe.cuda.device import gpu_is_there

    if not gpu_is_there():
        return {}
    from tinymoe.cuda import gpu

    return gpu.description()


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
