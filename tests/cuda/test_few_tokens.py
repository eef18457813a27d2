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
from tinymoe.cuda.few_tokens import FEW_PAIRS, KERNELS, few_tokens_ffn

# Of any size, of whole packs of 16 bytes, of whole steps of the tensor cores.
lengths = st.integers(1, 40) | st.integers(1, 40).map(lambda packs: 8 * packs) | st.sampled_from([64, 128])


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
@given(st.integers(1, 20), st.integers(1, 6), lengths, lengths, dtypes, orders, rngs, st.data())
@settings(max_examples=15)
def test_equals_the_reference_for_any_few_tokens(where, N, E, D, F, dtype, order, rng, data):
    k = data.draw(st.integers(1, min(E, FEW_PAIRS // N)))
    used = data.draw(st.integers(k, E))  # the others have no token
    experts = rng.permutation(E)[rng.random((N, used)).argsort(axis=1)[:, :k]]
    experts[rng.random((N, k)) < data.draw(st.sampled_from([0, 0, 0.3]))] = -1
    check(where, experts, E, D, F, dtype, order, rng)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("rows", [8, 9, 15, 16, 17, 32, 33, 64])
@pytest.mark.parametrize(("D", "F"), [(24, 34), (64, 128)])
def test_an_expert_with_more_rows_than_one_pass_takes(where, rows, D, F):
    experts = np.zeros((rows, 1), np.int64)
    check(where, experts, 2, D, F, device.BFLOAT16, Order("shuffled", 1, 0), np.random.default_rng(0))


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("dtype", [np.dtype("float32"), device.BFLOAT16])
def test_several_blocks_and_many_steps(where, dtype):
    experts = np.array([[1, 2], [2, 0], [1, 0]])
    check(where, experts, 4, 520, 264, dtype, Order("reverse", 0, 0), np.random.default_rng(0))
    check(where, experts, 4, 261, 523, dtype, Order("shuffled", 2, 20), np.random.default_rng(0))


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("D", "F"), [(576, 1088), (1088, 64)])  # steps: one more than a round of all warps has
def test_warps_share_out_the_steps(where, D, F):
    experts = np.array([[2, 0], [0, 2]])
    check(where, experts, 3, D, F, device.BFLOAT16, Order("shuffled", 3, 0), np.random.default_rng(0))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_sums_of_small_integers_are_exact(where):
    """Products of integers hold every element of every operand to its place, with no tolerance that could hide one."""
    N, E, D, F, rng = 11, 2, 128, 192, np.random.default_rng(0)
    experts = np.arange(N)[:, None] % E
    with running(where, Order("shuffled", 0, 0)):
        (x, w1, w3), doubles = on_device(
            rng.integers(-3, 4, (N, D)), *rng.integers(-3, 4, (2, E, F, D)), dtype=device.BFLOAT16
        )
        # y is one column of hidden after the other: w2 picks it.
        w2 = device.array((np.arange(F) == np.arange(D)[:, None] + 50).astype(device.BFLOAT16)[None].repeat(E, 0))
        (weights,), _ = on_device(np.ones((N, 1)), dtype=np.float32)
        y = few_tokens_ffn(x, weights, dispatch(device.array(experts, np.int32), E), w1, w2, w3)
        x64, w1_64, w3_64 = doubles
        gate, up = (np.einsum("nd,nfd->nf", x64, w[experts[:, 0]]) for w in (w1_64, w3_64))
        expected = (gate / (1 + np.exp(-gate)) * up)[:, 50 : 50 + D]
        np.testing.assert_allclose(device.host(y).astype(np.float64), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("D", [24, 64])
def test_a_token_that_is_not_finite_harms_no_other(where, D):
    rng = np.random.default_rng(0)
    experts, arrays = np.array([[0, 1], [1, 0], [0, 1]]), [rng.standard_normal(s) for s in ((3, D), *[(2, D, D)] * 3)]
    with running(where, Order("shuffled", 0, 0)):
        (weights,), _ = on_device(rng.random((3, 2)), dtype=np.float32)
        plan = dispatch(device.array(experts, np.int32), 2)
        outcomes = []
        for worst in (1.0, np.inf):
            arrays[0][1] = worst
            there, _ = on_device(*arrays, dtype=device.BFLOAT16)
            outcomes.append(device.host(few_tokens_ffn(there[0], weights, plan, *there[1:]))[[0, 2]])
    assert np.isfinite(outcomes[0].astype(np.float32)).all()
    assert_same_bits(*[[y] for y in outcomes])


@pytest.mark.parametrize(
    ("dtype", "D", "F", "up", "down"),
    [
        (device.BFLOAT16, 64, 128, "TensorCores", "TensorCores"),
        (device.BFLOAT16, 64, 72, "TensorCores", "Lanes<8>"),
        (device.BFLOAT16, 33, 64, "Lanes<1>", "TensorCores"),
        (np.dtype("float32"), 64, 66, "Lanes<4>", "Lanes<1>"),
    ],
)
def test_whole_steps_of_bfloat16_go_to_the_tensor_cores(monkeypatch, dtype, D, F, up, down):
    asked, launch = [], KERNELS.launch

    def noted(kernel, *rest, **shared):
        asked.append(kernel)
        launch(kernel, *rest, **shared)

    monkeypatch.setattr(KERNELS, "launch", noted)
    check("emulated", np.array([[0]]), 1, D, F, dtype, Order("forward", 0, 0), np.random.default_rng(0))
    assert [kernel.split(", ")[1] for kernel in asked[:2]] == [f"{up}>", f"{down}>"]
