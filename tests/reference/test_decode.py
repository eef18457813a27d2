"""Decoding on vectors: a block for one token equals the block for a sequence of one."""

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import SMALL, configs, random_params, rngs

from tinymoe import reference
from tinymoe.block import block
from tinymoe.reference import attention_decode, block_decode, rope_table


def of_first_block(config, rng, dtype=np.float64):
    params = random_params(config, rng, dtype)
    return lambda name: params[f"layers.0.{name}"]


@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-5), ("float64", 1e-13)])
@given(configs(), st.integers(0, 9), rngs)
def test_one_token_equals_a_sequence_of_one(dtype, tol, config, past, rng):
    weights, x = of_first_block(config, rng, dtype), rng.standard_normal((1, config.dim)).astype(dtype)
    before = rng.standard_normal((2, 1, past, config.n_kv_heads, config.head_dim)).astype(dtype)  # keys, values
    rotation = rope_table(np.array([past]), config.head_dim, config.rope_theta, dtype)

    def attend(q, k, v):
        return attention_decode(q, *(np.concatenate(pair, axis=1) for pair in zip(before, (k, v))))

    def attend_and_save(q, k, v):
        return attend(q, k, v), None

    moe = reference.moe if config.num_experts else None
    expected, saved = block(reference, config, weights, x, (1, 1), rotation, attend_and_save, moe)
    y, experts = block_decode(x[0], weights, rotation, attend, config.norm_eps, config.top_k_experts)
    assert y.dtype == dtype
    assert_close(y, expected[0], tol)
    if moe:
        np.testing.assert_array_equal(experts, saved.ffn.routing.experts[0])
    else:
        assert experts is None


def decoded_with_gate(gate):
    """Decode a row of ones through the first block of `SMALL`, with this gate (E, D); return the experts."""
    weights = of_first_block(SMALL, np.random.default_rng(0))
    rotation = rope_table(np.array([0]), SMALL.head_dim, SMALL.rope_theta, np.float64)
    return block_decode(
        np.ones(SMALL.dim),
        lambda name: gate if name == "moe.gate" else weights(name),
        rotation,
        attention_decode,
        SMALL.norm_eps,
        SMALL.top_k_experts,
    )[1]


def test_equally_good_experts_are_taken_in_the_order_of_their_ids():
    assert decoded_with_gate(np.ones((SMALL.num_experts, SMALL.dim))).tolist() == [0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_refused(bad):
    gate = np.zeros((SMALL.num_experts, SMALL.dim))
    gate[-1] = bad
    with pytest.raises(FloatingPointError, match="the router's logits are not finite"), np.errstate(invalid="ignore"):
        decoded_with_gate(gate)
