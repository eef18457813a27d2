"""A recorded mixture computes what the mixture computes, for whatever lies in its inputs."""

import numpy as np
import pytest
from emulation import EVERYWHERE, assert_same_bits, running

from tinymoe.cuda import device, moe, moe_decode
from tinymoe.cuda.graph import Graph


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("N", [2, 80])  # by the kernels for few tokens, and by the grouped GEMM
def test_a_graph_of_the_layer_computes_it_for_other_tokens(where, N):
    rng = np.random.default_rng(0)
    shapes = (N, 16), (4, 16), (4, 24, 16), (4, 16, 24), (4, 24, 16)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    with running(where, ("shuffled", 0, 0)):
        x, *weights = map(device.array, arrays)
        graph = Graph(lambda: moe_decode(x, *weights, 2)[0])
        first = device.host(graph.result).copy()
        assert_same_bits([graph()], [first])
        x[...] = device.array(arrays[0][::-1])
        assert graph() is graph.result
        assert_same_bits([graph.result], [moe_decode(x, *weights, 2)[0]])
        assert abs(device.host(graph.result) - first).max() > 0.01


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_graph_may_have_several_results(where):
    with running(where, ("forward", 0, 0)):
        x = device.array(np.ones((3, 8), np.float32))
        w = [device.array(np.ones(s, np.float32)) for s in ((2, 8), (2, 8, 8), (2, 8, 8), (2, 8, 8))]

        def run():
            y, saved = moe(x, *w, 1)
            return y, saved.routing.logits

        graph = Graph(run)
        before = [device.host(array).copy() for array in graph()]
        x[...] = 2 * x
        after = [device.host(array) for array in graph()]
        assert all((a != b).any() for a, b in zip(before, after))
        np.testing.assert_allclose(after[1], 2 * before[1])
