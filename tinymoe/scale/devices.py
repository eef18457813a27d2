"""Where a model may run: a few GPUs as their datasheets describe them, and this machine as measured."""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tinymoe.errors import InputError

CGROUP = Path("/sys/fs/cgroup")  # inside a container, its own limits; outside, none


@dataclass(frozen=True)
class Device:
    """What bounds a model on one device.

    Parameters
    ----------
    name
        As a reader knows it.
    memory_bytes
        Capacity, in bytes.
    bandwidth
        Reading memory, in bytes per second.
    flops
        Dense matrix products of bf16 or fp16, without sparsity, in FLOP per second.
    flops_fp32
        The same in float32 proper, not TF32.
    source
        Where the numbers come from: ``"datasheet"`` (peaks that no program quite reaches) or ``"measured"``.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float
    flops_fp32: float
    source: str

    def flops_at(self, dtype: str) -> float:
        """Return the FLOP per second of products of this dtype."""
        return self.flops_fp32 if dtype == "fp32" else self.flops


# NVIDIA's datasheets of the SXM parts. Those of Hopper print TFLOPS "with sparsity": half of that is dense.
DEVICES = {
    "h200": Device("H200", 141 * 10**9, 4.8e12, 989e12, 67e12, "datasheet"),
    "h100": Device("H100 SXM", 80 * 10**9, 3.35e12, 989e12, 67e12, "datasheet"),
    "a100-80gb": Device("A100 80GB", 80 * 10**9, 2.039e12, 312e12, 19.5e12, "datasheet"),
    "a100-40gb": Device("A100 40GB", 40 * 10**9, 1.555e12, 312e12, 19.5e12, "datasheet"),
}
HERE = "here"  # this machine's name among them


def find_device(name: str) -> Device:
    """Return a device of ``DEVICES`` by its name, or measure this machine if that is ``here``.

    Raises
    ------
    InputError
        There is none of that name; the message lists them.
    """
    if name == HERE:
        return measure_this_machine()
    if name not in DEVICES:
        raise InputError(f"no device {name!r}: give one of {', '.join([*DEVICES, HERE])}")
    return DEVICES[name]


def measure_this_machine() -> Device:
    """Measure this machine's read bandwidth and float32 matrix products, in about a second.

    Bandwidth is that of summing 640 MiB, more than all but the largest caches hold, on every usable core; arithmetic
    that of NumPy's BLAS at 2048 × 2048, which stands for 16 bits too: on a CPU bf16 is storage, never arithmetic.
    """
    import numpy as np

    from tinymoe.workers import usable_cores

    total, available = memory()
    numbers = np.empty(min(640 << 20, available // 4) // 4, np.float32)
    cores = usable_cores()
    pieces = np.array_split(numbers, cores)
    with ThreadPoolExecutor(cores) as pool:
        # Written first: pages never written are all one page of zeros, and would be read from the cache.
        list(pool.map(lambda piece: piece.fill(1), pieces))
        bandwidth = numbers.nbytes / _shortest(lambda: list(pool.map(np.sum, pieces)))
    matrix = np.ones((2048, 2048), np.float32)
    flops = 2 * len(matrix) ** 3 / _shortest(lambda: matrix @ matrix)
    return Device("this machine", total, bandwidth, flops, flops, "measured")


def cpu_quota() -> float:
    """Return how many cores' time the container may use each second, infinity if it may use all."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup v2, v1
        match _words(*files):
            case [quota, period] if quota.isdigit():  # neither "max" nor "-1"
                return int(quota) / int(period)
    return math.inf


def memory() -> tuple[int, int]:
    """Return (total, available) memory in bytes, within the limit of the container if there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        total = min([total, *(int(word) for word in _words(file) if word.isdigit())])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        available = total // 2
    return total, min(total, available)


def _words(*files: str) -> list[str]:
    try:
        return [word for file in files for word in (CGROUP / file).read_text().split()]
    except OSError:
        return []


def _shortest(work: Callable[[], object], seconds: float = 0.2) -> float:
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
