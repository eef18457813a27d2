"""The kernels for few tokens compute the mixture that the grouped GEMMs compute, and the reference."""

import numpy as np
import pytest
from emulation import EVERYWHERE, Order, assert_equivalent, assert_same_bits, dtypes, on_device, orders, running
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import rngs

from tinymoe import reference
from tinymoe.cuda import device
from tinymoe.cuda.dispatch import dispatch
from tinymoe.cuda.few_tokens import FEW_PAIRS, few_tokens_ffn

lengths = st.integers(1, 40) | st.integers(1, 40).map(lambda packs: 8 * packs)


def check(where, experts, E, D, F, dtype, order, rng):
    (N, k), shapes = experts.shape, ((E, F, D), (E, D, F), (E, F, D))
    with running(where, order):
        there, doubles = on_device(
            rng.standard_normal((N, D)), *(rng.standard_normal(s) / 4 for s in shapes), dtype=dtype
        )
        (weights,), (weights64,) = on_device(rng.random((N, k)), dtype=np.float32)
        plan = dispatch(device.array(experts, np.int32), E)
        y = few_tokens_ffn(there[0], weights, plan, *there[1:])
        x, w1, w2, w3 = doubles
        expected = np.zeros((N, D))
        for n, choice in zip(*np.nonzero(experts >= 0)):
            e = experts[n, choice]
            expected[n] += weights64[n, choice] * reference.ffn(x[n : n + 1], w1[e], w2[e], w3[e])[0][0]
        assert_equivalent(y, expected, floor=np.linalg.norm(x) / 2, components=2)
        assert_same_bits([few_tokens_ffn(there[0], weights, plan, *there[1:])], [y])


@pytest.mark.parametrize("where", EVERYWHERE)
@given(st.integers(1, 24), st.integers(1, 6), lengths, lengths, dtypes, orders, rngs, st.data())
@settings(max_examples=15)
def test_equals_the_reference_for_any_few_tokens(where, N, E, D, F, dtype, order, rng, data):
    k = data.draw(st.integers(1, min(E, FEW_PAIRS // N)))
    used = data.draw(st.integers(k, E))  # the others have no token
    experts = rng.permutation(E)[rng.random((N, used)).argsort(axis=1)[:, :k]]
    experts[rng.random((N, k)) < data.draw(st.sampled_from([0, 0, 0.3]))] = -1
    check(where, experts, E, D, F, dtype, order, rng)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("rows", [15, 16, 17, 33, 64])
def test_an_expert_with_more_rows_than_one_pass_takes(where, rows):
    experts = np.zeros((rows, 1), np.int64)
    check(where, experts, 2, 24, 34, device.BFLOAT16, Order("shuffled", 1, 0), np.random.default_rng(0))


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("dtype", [np.dtype("float32"), device.BFLOAT16])
def test_several_blocks_and_many_steps(where, dtype):
    experts = np.array([[1, 2], [2, 0], [1, 0]])
    check(where, experts, 4, 520, 264, dtype, Order("reverse", 0, 0), np.random.default_rng(0))
    check(where, experts, 4, 261, 523, dtype, Order("shuffled", 2, 20), np.random.default_rng(0))
