"""Launches recorded once and repeated as one: the host then takes no time between them."""

from collections.abc import Callable
from typing import Any

from tinymoe.cuda import device


class Graph:
    """What a function launches, to be launched again over the same arrays.

    The arrays that the function reads keep their places: to compute something else write into them. What it returned is
    overwritten by every call. On a GPU this is a CUDA graph, for which the function may not ask the device for anything
    in between; nothing in a mixture does, since the plan stays there. Nor may it copy from the host, or call cuBLAS,
    which CuPy refuses to record, and with it `linear`. Recording runs it twice: where it writes what it reads, it must
    write the same again. The emulator calls the function again.

    Parameters
    ----------
    run
        Launches kernels and returns an array of the device, or a tuple of them.

    Attributes
    ----------
    result
        What ``run`` returned.
    """

    def __init__(self, run: Callable[[], Any]):
        if device.current() == "gpu":
            from tinymoe.cuda import gpu

            self.result, self._replay = gpu.record(run)
        else:
            self.result, self._run = run(), run
            self._replay = self._again

    def __call__(self) -> Any:
        """Launch it all again, and return `result`, which the device may still be computing."""
        self._replay()
        return self.result

    def _again(self) -> None:
        result = self._run()
        arrays = zip(self.result, result) if isinstance(result, tuple) else [(self.result, result)]
        for kept, new in arrays:
            kept[...] = new
