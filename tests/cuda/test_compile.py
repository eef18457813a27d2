"""Every kernel that a launcher may ask for compiles for NVIDIA's cards, and keeps what it holds in registers."""

import pytest

import tinymoe.cuda  # declares all kernels
from tinymoe.cuda import device, nvrtc

pytest.importorskip("cuda.bindings", reason="NVRTC is not installed: pip install 'tinymoe[nvrtc]'")
SHIPPED = [kernels for kernels in device.ALL if kernels.source.is_relative_to(device.KERNELS)]  # and no test's own
MOST_SHARED = 48 << 10  # bytes of static shared memory that every card has


@pytest.mark.parametrize(
    ("kernels", "architecture"),
    [(kernels, architecture) for kernels in SHIPPED for architecture in nvrtc.architectures_of(kernels)],
    ids=lambda value: value if isinstance(value, str) else value.source.stem,
)
def test_compiles_without_spills(kernels, architecture):
    compiled = nvrtc.compile_cubin(kernels, architecture)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert not compiled.advice  # such as wgmma that is serialised, or wants a fence
    for expression in kernels.expressions:
        assert expression.split("<")[0] in compiled.names[expression]
        taken = compiled.resources[expression]
        assert 0 < taken.registers <= 255
        assert taken.spills == 0, f"{expression} spills on {architecture}: {taken}"
        assert taken.shared <= MOST_SHARED
        assert taken.stack == 0 or kernels.only_for != "sm_90a", f"{expression} keeps its sums in memory"


def test_a_kernel_that_does_not_compile_is_named(tmp_path):
    broken = device.Kernels("rmsnorm.cu", "rmsnorm_forward<double>")
    device.ALL.remove(broken)
    with pytest.raises(RuntimeError, match=r"rmsnorm\.cu for sm_80"):
        nvrtc.compile_cubin(broken, "sm_80")


def test_all_sources_are_declared():
    sources = {path.relative_to(device.KERNELS) for path in device.KERNELS.rglob("*.cu")}
    assert sources == {kernels.source.relative_to(device.KERNELS) for kernels in SHIPPED}
    assert tinymoe.cuda.__all__
