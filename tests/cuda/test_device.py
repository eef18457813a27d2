"""The device: which one is in use, its arrays, and what a launch refuses."""

from pathlib import Path

import numpy as np
import pytest

from tinymoe.cuda import device
from tinymoe.errors import InputError

ADD = device.Kernels(str(Path(__file__).parent / "emulator" / "kernels" / "schedule.cu"), "add", "tickets")
emulated = pytest.mark.parametrize("where", ["emulated", "checked"])


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.setattr(device, "_chosen", None)
    monkeypatch.delenv("TINYMOE_DEVICE", raising=False)


# ---- which


def test_a_gpu_is_the_default_where_there_is_one(monkeypatch):
    monkeypatch.setattr(device, "gpu_is_there", lambda: True)
    assert device.current() == "gpu"
    monkeypatch.setattr(device, "gpu_is_there", lambda: False)
    assert device.current() == "emulated"


def test_use_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("TINYMOE_DEVICE", "checked")
    assert device.current() == "checked"
    device.use("emulated")
    assert device.current() == "emulated"
    with device.using("checked"):
        assert device.current() == "checked"
    assert device.current() == "emulated"


def test_using_ends_after_an_error():
    with pytest.raises(KeyError), device.using("checked"):
        raise KeyError
    assert device.current() != "checked"


def test_unknown_device(monkeypatch):
    with pytest.raises(InputError, match="no device 'tpu'; there is gpu, emulated, checked"):
        device.use("tpu")
    monkeypatch.setenv("TINYMOE_DEVICE", "GPU")
    with pytest.raises(InputError, match="no device 'GPU'"):
        device.current()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(device, "gpu_is_there", lambda: False)
    with pytest.raises(InputError, match=r"no GPU that CuPy can use.*TINYMOE_DEVICE=emulated"):
        device.use("gpu")
    assert device.current() == "emulated"


# ---- arrays


@emulated
@pytest.mark.parametrize("dtype", [np.float32, device.BFLOAT16, np.int32])
@pytest.mark.parametrize("shape", [7, (3, 5), (0, 4), ()])
def test_empty_is_aligned_and_shows_that_it_is_not_set(where, dtype, shape):
    with device.using(where):
        values, zeros = device.empty(shape, dtype), device.zeros(shape, dtype)
    assert values.shape == zeros.shape == ((shape,) if isinstance(shape, int) else shape)
    assert values.dtype == zeros.dtype == dtype
    assert values.ctypes.data % device.ALIGNMENT == 0 or not values.size
    assert (values == 0x55555555).all() if dtype == np.int32 else np.isnan(values.astype(np.float32)).all()
    assert not zeros.any()


@emulated
def test_array_is_contiguous_aligned_and_of_the_dtype(where):
    base = np.arange(600, dtype=np.float32)
    for given in (base[1:], base[::2], base.reshape(20, 30).T, [1.5, 2.5], 3.0):
        with device.using(where):
            found = device.array(given, device.BFLOAT16)
        assert found.flags.c_contiguous
        assert found.ctypes.data % device.ALIGNMENT == 0
        assert np.array_equal(found, np.asarray(given).astype(device.BFLOAT16))
    assert device.array(found) is found, "what fits is not copied"


def test_ctype():
    assert [device.ctype(device.empty(1, dtype)) for dtype in (np.float32, device.BFLOAT16)] == ["float", "bfloat16"]
    with pytest.raises(InputError, match="takes float32 and bfloat16; got float64"):
        device.ctype(np.zeros(1))


# ---- launches


@pytest.fixture
def x():
    return device.array(np.arange(32, dtype=np.int32))


@emulated
def test_launch(where, x):
    with device.using(where):
        out = device.empty(32, np.int32)
        ADD.launch("add", 1, 32, x, out, 5)
        ADD.launch("add", (1, 0), 32, x, x[:0], 5)  # an empty grid is nothing
        ADD.launch("add", (1,), (16, 1), out[:16], out[:16], np.int64(-2))
    assert out.tolist() == [*range(3, 19), *range(21, 37)]


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x: (x, x), "add takes 3 arguments, got 2"),
        (lambda x: (x, x.astype(np.float32), 1), "add: out must be an array of int32, got float32"),
        (lambda x: (5, x, 1), "add: x must be an array of int32, got <class 'int'>"),
        (lambda x: (x[::2], x, 1), "add: x must be contiguous"),
        (lambda x: (x[1:], x, 1), "add: x must be aligned to 16 bytes"),
        (lambda x: (x, read_only(x.copy()), 1), "add: out is written by the kernel, but the array is read-only"),
        (lambda x: (x, x, 1.5), "add: by must be a number that fits int32, got <class 'float'>"),
        (lambda x: (x, x, 2**31), "add: by must fit int32, got 2147483648"),
        (lambda x: (x, x, None), "add: by must be a number"),
    ],
)
def test_launch_refuses_what_does_not_fit(x, arguments, message):
    with pytest.raises(TypeError, match=message):
        ADD.launch("add", 1, 32, *arguments(x))


@pytest.mark.parametrize("block", [0, 1025, (32, 33), (1, 1, 65)])
def test_block_that_no_gpu_has(x, block):
    with pytest.raises(TypeError, match="a block has 1 to 1024 threads"):
        ADD.launch("add", 1, block, x, x, 1)


@pytest.mark.parametrize("grid", [-1, 2**31, (1, 65536), (1, 1, 65536)])
def test_grid_that_no_gpu_has(x, grid):
    with pytest.raises(TypeError, match="a grid has up to"):
        ADD.launch("add", grid, 32, x, x, 1)


def test_an_array_that_is_only_read_may_be_read_only(x):
    out = device.empty(32, np.int32)
    ADD.launch("add", 1, 32, read_only(x), out, 1)
    assert out[31] == 32
