"""Where the tests of kernels run: the emulator in random schedules, fast and checked, and a GPU where there is one."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import strategies as st

from tinymoe.cuda import device, emulator

EVERYWHERE = ["checked", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
dtypes = st.sampled_from([np.dtype("float32"), device.BFLOAT16])


class Order(NamedTuple):
    """In which threads run."""

    order: str
    seed: int
    preempt: int


orders = st.builds(Order, st.sampled_from(emulator.ORDERS), st.integers(0, 999), st.sampled_from([0, 2, 20]))


@contextmanager
def running(where, order):
    """Run the kernels inside on a device, in an order."""
    with device.using(where), emulator.scheduled(*order):
        yield


def on_device(*arrays, dtype=None):
    """Return arrays as the device's, rounded to a dtype; and what they are now in float64, for the reference."""
    there = [device.array(np.asarray(a).astype(dtype or np.asarray(a).dtype)) for a in arrays]
    return there, [doubles(a) for a in there]


def doubles(array):
    return device.host(array).astype(np.float64)


def assert_equivalent(found, expected, floor=0.1, components=1):
    """Compare a result of the device with the reference's, as closely as its dtype allows.

    ``floor`` is the norm of what the result is a small difference of. Of several components in a row each rounds what
    it hands on.
    """
    host = device.host(found)
    assert_close(host.astype(np.float64), expected, components * TOLERANCE[host.dtype.name], floor)


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert device.host(a).tobytes() == device.host(b).tobytes()
