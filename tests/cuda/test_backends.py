"""The two backends have the same functions with the same parameters."""

import inspect

import pytest

from tinymoe import cuda, reference

ONLY_REFERENCE = {
    "attention_plain",  # the formulas that the tests hold both backends to
    "block_decode",  # a block in fewer calls of NumPy: a GPU's calls are spared by a graph
    "moe_naive",
    "softmax",  # which kernels do where they need it
}


def test_both_backends_export_the_same_names():
    assert set(reference.__all__) - set(cuda.__all__) == ONLY_REFERENCE
    assert set(cuda.__all__) <= set(reference.__all__)


@pytest.mark.parametrize("name", cuda.__all__)
def test_both_backends_take_the_same_parameters(name):
    there, here = (inspect.signature(getattr(backend, name)).parameters for backend in (cuda, reference))
    assert list(there) == list(here)
    for a, b in zip(there.values(), here.values()):
        assert (a.kind, a.default) == (b.kind, b.default), a.name
