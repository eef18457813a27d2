"""Schedules differ and repeat, the watchdog ends what does not end, and a kernel compiles once or says why not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinymoe.cuda import device, emulator
from tinymoe.cuda.emulator import Array, KernelError, Library, compiler, scheduled
from tinymoe.errors import InputError

SOURCE = Path(__file__).parent / "kernels" / "schedule.cu"
KERNELS = ["tickets", "interleaved", "endless", "endless_without_memory", "add"]
both = pytest.mark.parametrize("library", ["emulated", "checked"], indirect=True)


@pytest.fixture(scope="module")
def library(request):
    return Library(SOURCE, KERNELS, getattr(request, "param", "checked"))


def given(*arrays):
    return [Array(a.ctypes.data, a.nbytes, True, "array") for a in arrays]


def order_of(library, kernel, blocks, threads, each, *schedule):
    """Return the threads of a grid in the order in which they ran."""
    out = device.empty(blocks * threads * each, np.int32)
    with scheduled(*schedule):
        library.launch(kernel, (blocks, 1, 1), (threads, 1, 1), given(out, np.zeros(1, np.int32)))
    return (np.argsort(out) // each).tolist()


@both
def test_forward_and_reverse_are_what_they_say(library):
    assert order_of(library, "tickets", 3, 5, 1, "forward") == list(range(15))
    assert order_of(library, "tickets", 3, 5, 1, "reverse") == list(range(15))[::-1]


@both
def test_shuffled_orders_differ_by_seed_and_repeat(library):
    orders = [order_of(library, "tickets", 4, 6, 1, "shuffled", seed) for seed in range(8)]
    assert len({tuple(order) for order in orders}) == 8
    assert len({tuple(t // 6 for t in order) for order in orders}) > 1, "blocks never changed places"
    assert orders == [order_of(library, "tickets", 4, 6, 1, "shuffled", seed) for seed in range(8)]
    assert all(sorted(order) == list(range(24)) for order in orders)


def test_preemption_interleaves_threads_and_repeats(library):
    def order(*schedule):
        return order_of(library, "interleaved", 1, 16, 2, *schedule)

    assert order("forward") == [t for t in range(16) for _ in range(2)]
    preempted = [order("forward", seed, 2) for seed in range(4)]
    assert all(o != order("forward") and sorted(o) == order("forward") for o in preempted)
    assert len({tuple(o) for o in preempted}) == 4
    assert preempted == [order("forward", seed, 2) for seed in range(4)]


def test_unknown_order():
    with (
        pytest.raises(ValueError, match="order is 'sideways'; give one of forward, reverse, shuffled"),
        scheduled("sideways"),
    ):
        pass


def test_schedule_holds_only_inside():
    with scheduled("reverse"), pytest.raises(KeyError), scheduled("shuffled", 3):
        raise KeyError
    assert emulator._schedule == emulator.Schedule()


def add(library):
    x, out = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    library.launch("add", (1, 1, 1), (32, 1, 1), [*given(x, out), np.int32(5).tobytes()])
    return out.tolist()


@both
@pytest.mark.parametrize("kernel", ["endless", "endless_without_memory"])
def test_watchdog_ends_a_launch_and_the_next_one_works(library, kernel):
    for _ in range(3):
        with scheduled(seconds=0.05), pytest.raises(KernelError, match=r"0\.05 seconds") as caught:
            library.launch(kernel, (1, 1, 1), (32, 1, 1), given(np.zeros(32, np.int32)))
        assert caught.value.kind == "timeout"
        assert add(library) == list(range(5, 37))


def test_watchdog_in_a_thread(library):
    program = f"""
import threading, numpy as np
from pathlib import Path
from tinymoe.cuda.emulator import *
library, caught = Library(Path({str(SOURCE)!r}), {KERNELS!r}, "checked"), []
def run():
    for kernel in ("endless", "endless_without_memory"):
        out = np.zeros(32, np.int32)
        try:
            with scheduled(seconds=0.05):
                library.launch(kernel, (1, 1, 1), (32, 1, 1), [Array(out.ctypes.data, out.nbytes, True, "out")])
        except KernelError as error:
            caught.append(error.kind)
for thread in [threading.Thread(target=run) for _ in range(2)]:
    thread.start()
    thread.join()
print(caught)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"{['timeout'] * 4}\n", done.stderr


def test_error_leaves_arrays_alone_and_the_next_launch_works(library):
    x, out = np.arange(16, dtype=np.int32), np.zeros(16, np.int32)
    with pytest.raises(KernelError, match="read of 4 bytes at byte 64 of array, which has 64") as caught:
        library.launch("add", (1, 1, 1), (32, 1, 1), [*given(x, out), np.int32(5).tobytes()])
    assert (caught.value.kind, caught.value.thread, caught.value.kernel) == ("out of bounds", (16, 0, 0), "add")
    assert not out.any()
    assert add(library) == list(range(5, 37))


def test_too_much_shared_memory(library):
    with pytest.raises(
        KernelError, match="232449 bytes of dynamic shared memory; a block has at most 232448"
    ) as caught:
        library.launch("tickets", (1, 1, 1), (1, 1, 1), given(*np.zeros((2, 1), np.int32)), 227 * 1024 + 1)
    assert caught.value.kind == "launch"


# ---- compiling


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of compiled kernels that holds only the runtime."""
    built = compiler.runtime()
    monkeypatch.setenv("TINYMOE_CACHE", str(tmp_path / "cache"))
    shutil.copy(built, compiler.cache())
    return tmp_path / "cache"


def test_two_processes_that_compile_the_same_leave_one_library(cache, tmp_path):
    source = tmp_path / "one.cu"
    source.write_text('#include "prelude.h"\n__global__ void one(int *out) { out[0] = 1; }\n')
    program = f"""
import numpy as np
from pathlib import Path
from tinymoe.cuda.emulator import Array, Library
out = np.zeros(1, np.int32)
library = Library(Path({str(source)!r}), ["one"], "emulated")
library.launch("one", (1, 1, 1), (1, 1, 1), [Array(out.ctypes.data, 4, True, "out")])
print(out[0])
"""
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in started] == ["1\n", "1\n"]
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["one", "runtime"]


def test_kernel_that_does_not_compile_gives_the_compilers_message(cache, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text('#include "prelude.h"\n__global__ void broken(int *out) { out[0] = nothing; }\n')
    with pytest.raises(RuntimeError, match=r"broken\.cu:2.*error.*nothing"):
        Library(source, ["broken"], "emulated")
    assert [path.name.split("-")[0] for path in cache.iterdir()] == ["runtime"], "something is left"


def test_checked_build_refuses_a_compiler_that_does_not_show_it_every_access(monkeypatch):
    monkeypatch.setattr(compiler, "_version", lambda: "clang version 19.1.7")
    with pytest.raises(InputError, match=r"needs g\+\+ on Linux; TINYMOE_DEVICE=emulated runs"):
        Library(SOURCE, ["add"], "checked")


@pytest.mark.parametrize("environment", [{"CXX": "/nonexistent"}, {"CXX": "", "PATH": ""}])
def test_without_a_compiler_one_error_names_both_ways_out(environment):
    program = """
from tinymoe.cuda import device, rmsnorm
rmsnorm(device.zeros((1, 1), "float32"), device.zeros(1, "float32"), 1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TINYMOE_DEVICE": "emulated"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == (
        f"{InputError.__module__}.InputError: running CUDA kernels on this CPU needs a C++17 compiler (apt install g++,"
        " or set CXX); on an NVIDIA GPU it needs CuPy (pip install 'tinymoe[cuda13]')"
    )
