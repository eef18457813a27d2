"""CUDA on this CPU: the same kernels, compiled by g++ and run on NumPy arrays, with or without a checker.

How it works, and where to read it:

* ``cuda.h`` turns CUDA's words into C++, so that a .cu file is a .cpp file;
* every thread of a block is a fiber (``fiber.h``), and the scheduler (``scheduler.cpp``) runs one block at a time, each
  thread until it waits at a barrier or a warp instruction;
* in the checked build the compiler puts a call before every load and store, and the checker (``checker.cpp``) finds
  accesses out of bounds, races, and reads of shared memory that nobody wrote;
* asynchronous copies (``asynchronous.cpp``), Hopper's tiles and its products (``hopper.cpp``) happen as late as is
  legal, as early, or at random.

What it does not show: time, occupancy, coalescing, bank conflicts, and the reorderings of a weak memory model. Blocks
run one after the other: a block that spins until another has done something never ends, and whatever two blocks pass
each other in one launch, fences and atomics or not, is a race to the checker.

To stop in a kernel (the checked build keeps more of the variables than the fast one)::

    TINYMOE_DEVICE=checked gdb --args python program.py
    (gdb) set breakpoint pending on
    (gdb) break rmsnorm.cu:23 if blockIdx.x == 1 && threadIdx.x == 33
    (gdb) run
    (gdb) backtrace
    (gdb) print threadIdx

Without a condition it stops in every thread; ``next`` over a barrier stays with the one it is in.

It runs on Linux, on x86-64 and (its tests under QEMU) aarch64. The checked build needs g++; the fast one takes clang++
too, and is written for macOS but has not run there yet.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinymoe.cuda.emulator import compiler

ORDERS = ("forward", "reverse", "shuffled")


class KernelError(RuntimeError):
    """A kernel did what no kernel may.

    Attributes
    ----------
    kind
        ``out of bounds``, ``race``, ``uninitialised``, ``read-only``, ``divergence``, ``deadlock``, ``in flight``,
        ``unfenced``, ``mbarrier``, ``misaligned``, ``timeout`` or ``launch``.
    kernel
        The instantiation.
    file, line
        Where in its source; None and 0 if unknown.
    block, thread
        (x, y, z) of the thread that was caught.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        kernel: str,
        place: tuple[str, int] | None,
        block: tuple[int, ...],
        thread: tuple[int, ...],
    ):
        self.kind, self.kernel, self.block, self.thread = kind, kernel, block, thread
        self.file: str | None = place[0] if place else None
        self.line = place[1] if place else 0
        where = f"{Path(place[0]).name}:{place[1]}, " if place else ""
        super().__init__(f"{kind} in {kernel} ({where}block {block}, thread {thread}): {message}")


class Schedule(NamedTuple):
    """In what order threads run between two barriers, and blocks in a grid."""

    order: str = "forward"  # of ORDERS
    seed: int = 0
    preempt: int = 0  # in the checked build, let others run at one access in so many; 0: never
    seconds: float = 60.0  # of processor time until the watchdog ends a launch; 0: never


_schedule = Schedule()
_LAUNCHING = threading.Lock()


@contextlib.contextmanager
def scheduled(order: str = "forward", seed: int = 0, preempt: int = 0, seconds: float = 60.0) -> Iterator[None]:
    """Run the kernels inside in that order: a right kernel does not depend on it."""
    global _schedule
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; give one of {', '.join(ORDERS)}")
    before, _schedule = _schedule, Schedule(order, seed, preempt, seconds)
    try:
        yield
    finally:
        _schedule = before


class Array(NamedTuple):
    """An array argument."""

    address: int
    bytes: int
    writable: bool
    name: str


class TileMap(NamedTuple):
    """A matrix of 16-bit elements, and the box that the copy engine cuts of it."""

    array: Array
    rows: int
    columns: int
    box_rows: int
    box_columns: int


Argument = Array | TileMap | bytes


class Library:
    """Instantiations of one source's kernels.

    Parameters
    ----------
    source
        The .cu file.
    expressions
        Its kernels with their template arguments.
    build
        ``"emulated"``: fast; ``"checked"``: every access is checked.
    """

    def __init__(self, source: Path, expressions: Sequence[str], build: str):
        self.source = source
        self.expressions = list(expressions)
        self.checked = build == "checked"
        self.path = compiler.library(source, tuple(expressions), build)
        self._runtime = _runtime()
        self._library = ctypes.CDLL(str(self.path))
        for name in ("library_begin", "library_end", "shared_begin"):
            getattr(self._library, name).restype = ctypes.c_void_p

    def launch(
        self,
        expression: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        shared: int = 0,
    ) -> None:
        """Run a kernel over a grid; arguments are arrays, maps of arrays, and the bytes of scalars.

        Raises
        ------
        KernelError
            The kernel was caught at something, or never ended.
        """
        with _apart(arguments) if self.checked else contextlib.nullcontext(arguments) as apart:
            self._launch(expression, grid, block, apart, shared)

    def _launch(
        self,
        expression: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        shared: int,
    ) -> None:
        kernel = getattr(self._library, f"kernel_{self.expressions.index(expression)}")
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
        arrays = [_Buffer(a.address, a.bytes, a.writable, a.name.encode()) for a in _arrays(arguments)]
        buffers = (_Buffer * max(1, len(arrays)))(*arrays)
        order, seed, preempt, seconds = _schedule
        options = _Options(ORDERS.index(order), seed, preempt, self.checked, seconds)
        begin, end, shared_begin = (
            ctypes.c_void_p(getattr(self._library, name)()) for name in ("library_begin", "library_end", "shared_begin")
        )
        dynamic, report = ctypes.c_size_t(shared), _Report()
        with _LAUNCHING:
            failed = self._runtime.emulator_launch(
                *(kernel, pointers, _Dim(*grid), _Dim(*block), dynamic, ctypes.byref(options), buffers, len(arrays)),
                *(begin, end, shared_begin, end, ctypes.byref(report)),
            )
        if failed:
            raise self._error(report, expression, begin.value or 0)

    def _error(self, report: "_Report", expression: str, begin: int) -> KernelError:
        place = (report.file.decode(), report.line) if report.file else None
        if not place and report.address:
            place = compiler.line_of(self.path, report.address - begin - 1)
            if place and place[0].endswith(".cpp"):  # addr2line takes the unit that includes the source for the source
                place = str(self.source), place[1]
        return KernelError(
            report.kind.decode(), report.message.decode(), expression, place, tuple(report.block), tuple(report.thread)
        )


def _arrays(arguments: Sequence[Argument]) -> list[Array]:
    return [a.array if isinstance(a, TileMap) else a for a in arguments if not isinstance(a, bytes)]


def _value(argument: Argument) -> Any:
    """Return what lies at the place that the kernel takes an argument from."""
    if isinstance(argument, bytes):
        return ctypes.create_string_buffer(argument)
    if isinstance(argument, Array):
        return ctypes.c_void_p(argument.address)
    memory = ctypes.create_string_buffer(2 * ctypes.sizeof(_TileMap))
    aligned = _TileMap.from_buffer(memory, -ctypes.addressof(memory) % 64)
    aligned.begin, aligned.sizes[:] = argument.array.address, argument[1:]
    aligned.pitch = 2 * argument.columns
    return aligned


@contextlib.contextmanager
def _apart(arguments: Sequence[Argument]) -> Iterator[list[Argument]]:
    """Yield the arguments with copies of the arrays, written back in the end.

    Views of one buffer lie side by side, so that a step beyond one is in another; the copies have room between them.
    Those that overlap still do.
    """
    arrays = sorted(a for a in _arrays(arguments) if a.bytes)
    spans: list[list[int]] = []  # first address and end of memory that arrays share
    for a in arrays:
        if not spans or a.address >= spans[-1][1]:
            spans.append([a.address, a.address])
        spans[-1][1] = max(spans[-1][1], a.address + a.bytes)
    shift, copies = {}, []
    for begin, end in spans:
        copies.append(ctypes.create_string_buffer(end - begin + 3 * _ROOM))
        start = ctypes.addressof(copies[-1])
        copy = start + (begin - start) % _ROOM + _ROOM  # aligned as the original
        ctypes.memmove(copy, begin, end - begin)
        shift.update({a.address: copy - begin for a in arrays if begin <= a.address < end})

    def moved(argument: Any) -> Any:
        if isinstance(argument, TileMap):
            return argument._replace(array=moved(argument.array))
        if isinstance(argument, Array):
            return argument._replace(address=argument.address + shift.get(argument.address, 0))
        return argument

    yield [moved(argument) for argument in arguments]
    for a in arrays:
        if a.writable:
            ctypes.memmove(a.address, a.address + shift[a.address], a.bytes)


_ROOM = 4096  # bytes before and behind a copy
_Dim = ctypes.c_uint * 3


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("writable", ctypes.c_int),
        ("name", ctypes.c_char_p),
    ]


class _TileMap(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        ("sizes", ctypes.c_int * 4),
        ("unused", ctypes.c_char * 96),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("schedule", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("preempt", ctypes.c_int),
        ("checked", ctypes.c_int),
        ("seconds", ctypes.c_double),
    ]


class _Report(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("message", ctypes.c_char * 2048),
        ("block", _Dim),
        ("thread", _Dim),
        ("file", ctypes.c_char * 512),
        ("line", ctypes.c_int),
        ("address", ctypes.c_void_p),
    ]


@functools.cache
def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(compiler.runtime()), mode=ctypes.RTLD_GLOBAL)
