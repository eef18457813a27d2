"""Where kernels run: an NVIDIA GPU through CuPy, or this CPU through the emulator, fast or checked.

Host code is written once, against `empty`, `zeros`, `array`, `host` and the launch of a `Kernels`: its arrays are
NumPy's under the emulator and CuPy's on a GPU.
"""

import functools
import numbers
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tinymoe.cuda.signature import TILE_MAP, Parameter, signature
from tinymoe.cuda.tile_map import TileMap, encoded
from tinymoe.errors import InputError

KERNELS = Path(__file__).parent / "kernels"
DEVICES = ("gpu", "emulated", "checked")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ALIGNMENT = 256  # bytes, of every array made here, as CuPy's allocator gives
EMULATED_MULTIPROCESSORS = 3
VECTOR = 16  # bytes of the widest load: what a kernel may rely on
UNSET_FLOAT = 0xFF  # each byte of a float that nobody has set: NaN
UNSET_INTEGER = 0x55  # and of an integer: positive, since kernels take any negative index for none

_chosen: str | None = None


def current() -> str:
    """Return the device in use: what `use` chose, or TINYMOE_DEVICE, or a GPU if there is one, or the emulator.

    Raises
    ------
    InputError
        TINYMOE_DEVICE names no device.
    """
    return _chosen or _checked(os.environ.get("TINYMOE_DEVICE") or ("gpu" if gpu_is_there() else "emulated"))


def use(name: str) -> None:
    """Run all kernels on a device from now on: ``"gpu"``, ``"emulated"`` or ``"checked"``.

    Raises
    ------
    InputError
        There is no such device.
    """
    global _chosen
    _chosen = _checked(name)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the kernels inside on a device."""
    global _chosen
    before = _chosen
    use(name)
    try:
        yield
    finally:
        _chosen = before


def _checked(name: str) -> str:
    if name not in DEVICES:
        raise InputError(f"no device {name!r}; there is {', '.join(DEVICES)}")
    if name == "gpu" and not gpu_is_there():
        raise InputError("no GPU that CuPy can use; without one the kernels run on this CPU: TINYMOE_DEVICE=emulated")
    return name


@functools.cache
def gpu_is_there() -> bool:
    """Return whether CuPy is installed and finds a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.is_available())


def architecture() -> str | None:
    """Return what kernels are compiled for: ``sm_80`` or the like on a GPU, None under the emulator."""
    if current() != "gpu":
        return None
    from tinymoe.cuda import gpu

    return gpu.architecture_of_card()


def multiprocessors() -> int:
    """Return how many multiprocessors there are: under the emulator so few that a block takes several tiles."""
    if current() != "gpu":
        return EMULATED_MULTIPROCESSORS
    from tinymoe.cuda import gpu

    return gpu.multiprocessors()


# ---- arrays


def empty(shape: int | tuple[int, ...], dtype: Any) -> Any:
    """Return an array of the device whose values are not set.

    The emulator sets them so that using one shows: floats to NaN, integers to 1431655765, far out of bounds as an
    index, and not −1, which in a plan means something.
    """
    if current() == "gpu":
        import cupy

        return cupy.empty(shape, dtype)
    dtype = np.dtype(dtype)
    bytes_ = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(bytes_ + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    memory[start : start + bytes_] = UNSET_INTEGER if dtype.kind in "iu" else UNSET_FLOAT
    return memory[start : start + bytes_].view(dtype).reshape(shape)


def zeros(shape: int | tuple[int, ...], dtype: Any) -> Any:
    """Return an array of zeros on the device."""
    array = empty(shape, dtype)
    array[...] = 0
    return array


def array(values: Any, dtype: Any = None) -> Any:
    """Return values as an array of the device: contiguous, aligned, of ``dtype`` if given; copied if need be."""
    if current() == "gpu":
        import cupy

        placed = cupy.ascontiguousarray(cupy.asarray(values, dtype))
        return placed if placed.data.ptr % VECTOR == 0 else placed.copy()
    values = np.asarray(values, dtype)
    if values.flags.c_contiguous and values.ctypes.data % ALIGNMENT == 0:
        return values
    copy = empty(values.shape, values.dtype)
    copy[...] = values
    return copy


def host(values: Any) -> np.ndarray:
    """Return an array of the device, or a number, as a NumPy array."""
    return values.get() if hasattr(values, "get") else np.asarray(values)


def synchronize() -> None:
    """Wait until the device has done all that was launched."""
    if current() == "gpu":
        from tinymoe.cuda import gpu

        gpu.synchronize()


def free() -> None:
    """Give memory that is held for the next arrays back to the device, which only a GPU's allocator does hold."""
    if current() == "gpu":
        from tinymoe.cuda import gpu

        gpu.free()


# ---- time


def seconds(run: Callable[[], Any], ahead: Callable[[], Any]) -> tuple[float, bool]:
    """Time what ``run`` launches.

    Parameters
    ----------
    run
        Launches kernels, and waits for none.
    ahead
        Launches what a GPU has to do before, for long enough that the host has queued all of ``run`` when it ends: the
        kernels then follow one another without gaps. The emulator, whose launches return when done, leaves it out.

    Returns
    -------
    seconds
        On a GPU between two events around the launches.
    waited
        Whether the device may have waited for the host, so that the host's time is in it.
    """
    if current() == "gpu":
        from tinymoe.cuda import gpu

        return gpu.seconds(run, ahead)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began, False


# ---- kernels

ALL: list["Kernels"] = []  # every one that a launcher has declared: what the compile check goes through


def ctype(array: Any) -> str:
    """Return the kernels' name of an array's dtype.

    Raises
    ------
    InputError
        Kernels compute with none but float32 and bfloat16.
    """
    if array.dtype == np.float32:
        return "float"
    if array.dtype == BFLOAT16:
        return "bfloat16"
    raise InputError(f"the CUDA backend takes float32 and bfloat16; got {array.dtype}")


class Kernels:
    """The kernels of one .cu file, in the instantiations that its launcher may ask for.

    Parameters
    ----------
    file
        In ``kernels/``.
    expressions
        Kernels with their template arguments, as ``scale<float>``. ``{T}`` stands for float and bfloat16.
    only_for
        The one architecture whose instructions they use; None: every one.
    """

    def __init__(self, file: str, *expressions: str, only_for: str | None = None):
        self.source = KERNELS / file
        self.only_for = only_for
        self.expressions = [
            expression.replace("{T}", T)
            for expression in expressions
            for T in (("float", "bfloat16") if "{T}" in expression else ("",))
        ]
        ALL.append(self)

    def __repr__(self) -> str:
        return f"Kernels({self.source.name}: {', '.join(self.expressions)})"

    @functools.cached_property
    def signatures(self) -> dict[str, list[Parameter]]:
        """The parameters of each expression."""
        text = self.source.read_text()
        return {expression: signature(text, expression) for expression in self.expressions}

    def launch(
        self,
        expression: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: Any,
        shared: int = 0,
    ) -> None:
        """Launch a kernel; nothing happens for an empty grid.

        Parameters
        ----------
        expression
            One of those declared.
        grid, block
            Blocks of the grid and threads of a block, in up to three dimensions.
        arguments
            Arrays of the device, and numbers, in the order of the kernel's parameters. None for an array is a null
            pointer.
        shared
            Bytes of dynamic shared memory.

        Raises
        ------
        TypeError
            An argument does not fit its parameter (number, dtype, contiguity, alignment), or the grid no GPU.
        tinymoe.cuda.emulator.KernelError
            The emulator caught the kernel at something.
        """
        parameters = self.signatures[expression]
        if len(arguments) != len(parameters):
            raise TypeError(f"{expression} takes {len(parameters)} arguments, got {len(arguments)}")
        for argument, parameter in zip(arguments, parameters):
            _check(expression, argument, parameter)
        grid, block = _three(grid), _three(block)
        if min(grid) < 0 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise TypeError(f"{expression}: a grid has up to 2**31 - 1, 65535 and 65535 blocks, got {grid}")
        if min(block) < 1 or block[0] * block[1] * block[2] > 1024 or block[2] > 64:
            raise TypeError(f"{expression}: a block has 1 to 1024 threads, up to 64 of them along z, got {block}")
        if min(grid) == 0:
            return
        where = current()
        if where == "gpu":
            from tinymoe.cuda import gpu

            gpu.launch(self, expression, grid, block, [_for_gpu(a, p) for a, p in zip(arguments, parameters)], shared)
        else:
            prepared = [_for_emulator(a, p) for a, p in zip(arguments, parameters)]
            self._library(where).launch(expression, grid, block, prepared, shared)

    @functools.cache  # noqa: B019  (launchers hold their kernels for the life of the process)
    def _library(self, build: str) -> Any:
        from tinymoe.cuda.emulator import Library

        return Library(self.source, self.expressions, build)


def _three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else size
    x, y, z = (*sizes, *(1,) * (3 - len(sizes)))
    return x, y, z


def _check(expression: str, argument: Any, parameter: Parameter) -> None:
    what = f"{expression}: {parameter.name}"
    if parameter.dtype == TILE_MAP:
        if not isinstance(argument, TileMap):
            raise TypeError(f"{what} must be a map made with tile_map, got {type(argument)}")
        return
    if not parameter.is_array:
        _check_number(what, argument, parameter.dtype)
        return
    if argument is None:
        return
    if not hasattr(argument, "flags") or argument.dtype != parameter.dtype:
        raise TypeError(
            f"{what} must be an array of {parameter.dtype}, got {getattr(argument, 'dtype', type(argument))}"
        )
    if not argument.flags.c_contiguous:
        raise TypeError(f"{what} must be contiguous")
    address = argument.ctypes.data if isinstance(argument, np.ndarray) else argument.data.ptr
    if argument.size and address % VECTOR:
        raise TypeError(f"{what} must be aligned to {VECTOR} bytes: make it with device.array or device.empty")
    if isinstance(argument, np.ndarray) and not parameter.is_const and not argument.flags.writeable:
        raise TypeError(f"{what} is written by the kernel, but the array is read-only")


def _check_number(what: str, number: Any, dtype: np.dtype) -> None:
    is_one = isinstance(number, numbers.Real if dtype.kind == "f" else numbers.Integral)
    if not is_one:
        raise TypeError(f"{what} must be a number that fits {dtype}, got {type(number)}")
    if dtype.kind != "f" and not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
        raise TypeError(f"{what} must fit {dtype}, got {number}")


def _for_emulator(argument: Any, parameter: Parameter) -> Any:
    from tinymoe.cuda import emulator

    if isinstance(argument, TileMap):
        matrix = emulator.Array(argument.matrix.ctypes.data, argument.matrix.nbytes, False, parameter.name)
        rows, columns = argument.matrix.shape
        return emulator.TileMap(matrix, rows, columns, argument.box_rows, argument.box_columns)
    if not parameter.is_array:
        return np.asarray(argument).astype(parameter.dtype).tobytes()
    if argument is None:
        return emulator.Array(0, 0, False, parameter.name)
    return emulator.Array(argument.ctypes.data, argument.nbytes, not parameter.is_const, parameter.name)


def _for_gpu(argument: Any, parameter: Parameter) -> Any:
    if isinstance(argument, TileMap):
        return encoded(argument)
    if parameter.is_array:
        return argument if argument is not None else np.uintp(0)
    return np.asarray(argument).astype(parameter.dtype)[()]
