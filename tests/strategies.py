"""The strategies that the tests share: configurations, models, batches, ragged routings, arrays from a drawn seed."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from tinymoe import Mixtral, MixtralConfig
from tinymoe.reference.loss import IGNORED

rngs = st.builds(np.random.default_rng, st.integers(0, 2**32 - 1))
SMALL = MixtralConfig(
    dim=6,
    n_layers=2,
    head_dim=2,
    hidden_dim=5,
    n_heads=4,
    n_kv_heads=2,
    context_len=16,
    vocab_size=7,
    num_experts=4,
    top_k_experts=2,
    norm_eps=0.05,
    rope_theta=100.0,
    aux_loss_coef=0.3,
    z_loss_coef=0.2,
)  # small enough to differentiate by steps

coefficients = st.sampled_from([0.0, 0.02, 0.5])


@st.composite
def configs(draw):
    """Draw a small model of any kind: dense or with experts, grouped heads, a window, a tied head."""
    kv_heads, experts = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    return MixtralConfig(
        dim=draw(st.integers(1, 24)),
        n_layers=draw(st.integers(1, 4)),
        head_dim=2 * draw(st.integers(1, 4)),
        hidden_dim=draw(st.integers(1, 24)),
        n_heads=kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=kv_heads,
        context_len=draw(st.integers(1, 60)),
        vocab_size=draw(st.integers(1, 40)),
        num_experts=experts,
        top_k_experts=draw(st.integers(1, experts)) if experts else 0,
        norm_eps=draw(st.sampled_from([0.1, 1.0])),  # large, so that a norm is smooth near a row of zeros, too
        sliding_window=draw(st.none() | st.integers(1, 80)),
        tie_embeddings=draw(st.booleans()),
        **(dict(aux_loss_coef=draw(coefficients), z_loss_coef=draw(coefficients)) if experts else {}),
    )


@st.composite
def varied_configs(draw):
    """Draw a model of any kind whose routing may differ from plain top-k, in some layers or in all."""
    config = draw(configs())
    if not config.num_experts:
        return config
    by_experts = draw(st.booleans())
    return dataclasses.replace(
        config,
        moe_every=draw(st.integers(1, config.n_layers)),
        capacity_factor=draw(st.sampled_from([None, 0.5, 1.25])),
        router_jitter=draw(st.sampled_from([0.0, 0.1])),
        noisy_top_k=not by_experts and draw(st.booleans()),
        bias_update_rate=0.0 if by_experts else draw(st.sampled_from([0.0, 0.01])),
        expert_choice=by_experts,
    )


def random_params(config, rng, dtype=np.float64):
    """Return parameters at which every activation is of order one, so that no gradient vanishes."""
    params = {}
    for name, shape in config.parameter_shapes():
        noise = rng.standard_normal(shape)
        params[name] = (1 + 0.1 * noise if name.endswith("norm") else noise / math.sqrt(shape[-1])).astype(dtype)
    return params


def make_model(config=SMALL, seed=0, dtype=np.float64, num_workers=1):
    return Mixtral(config, random_params(config, np.random.default_rng(seed), dtype), num_workers=num_workers)


@st.composite
def models(draw):
    config = dataclasses.replace(draw(configs()), n_layers=draw(st.integers(1, 2)))
    return Mixtral(config, random_params(config, draw(rngs)), num_workers=1)


@st.composite
def batches(draw, config):
    """Draw tokens and targets; some are ignored, but never all."""
    B, T, rng = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(rngs)
    tokens, targets = rng.integers(config.vocab_size, size=(2, B, T))
    ignored = rng.random((B, T)) < draw(st.sampled_from([0, 0.3, 0.9]))
    ignored[rng.integers(B), rng.integers(T)] = False
    return tokens, np.where(ignored, IGNORED, targets)


def make_batch(config=SMALL, B=3, T=8, seed=1):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(2, B, T))


class Routed(NamedTuple):
    """Where each token goes."""

    experts: np.ndarray  # (N, k), −1 for a pair that was dropped
    num_experts: int


@st.composite
def routings(draw, dropped=False):
    """Draw a ragged routing: any k up to all experts; experts with no token, and experts with every one."""
    E, N, rng = draw(st.integers(1, 6)), draw(st.integers(1, 13)), draw(rngs)
    k = draw(st.integers(1, E))
    used = rng.permutation(E)[: draw(st.integers(k, E))]  # of as many as k, each has every token
    experts = np.array([rng.permutation(used)[:k] for _ in range(N)])
    if dropped:
        experts[rng.random((N, k)) < draw(st.sampled_from([0, 0.3, 1]))] = -1
    return Routed(experts, E)


@st.composite
def moe_inputs(draw):
    """Draw (x, w_gate, w1, w2, w3), top_k and the routing that they lead to, its choices apart by at least 0.3."""
    (experts, E), rng = draw(routings()), draw(rngs)
    (N, k), D, F = experts.shape, E + draw(st.integers(0, 5)), draw(st.integers(1, 9))
    logits = 0.7 * rng.random((N, E))
    np.put_along_axis(logits, experts, 1 + 0.5 * np.arange(k, 0, -1) + 0.2 * rng.random((N, k)), axis=1)
    turn = np.linalg.qr(rng.standard_normal((D, D)))[0]  # orthogonal: of a token, w_gate reads E directions
    x, w_gate = np.hstack([logits, rng.standard_normal((N, D - E))]) @ turn.T, np.eye(E, D) @ turn.T
    w1, w3 = rng.standard_normal((2, E, F, D)) / math.sqrt(D)
    w2 = rng.standard_normal((E, D, F)) / math.sqrt(F)
    return (x, w_gate, w1, w2, w3), k, experts
