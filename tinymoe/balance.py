"""Which balancing is on: how the routing of a layer differs from plain top-k, and the bias that follows the load."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tinymoe.config import MixtralConfig

Array = np.ndarray


class Draws(NamedTuple):
    """The random numbers of a layer for the tokens of a batch, on the host."""

    jitter: Array | None  # (N, D), uniform around 1
    normal: Array | None  # (N, E)


def is_plain(config: MixtralConfig) -> bool:
    """Return whether routing is plain top-k, in training and afterwards."""
    return (
        not (config.capacity_factor or config.router_jitter or config.noisy_top_k or config.bias_update_rate)
        and not config.expert_choice
    )


def draw(config: MixtralConfig, seed: int, layer: int, tokens: int) -> Draws:
    """Draw a layer's noise for a batch of N tokens: the same for a seed, whoever computes which part of the batch."""
    rng = np.random.default_rng([seed, layer])
    jitter = normal = None
    if config.router_jitter:
        jitter = rng.uniform(-1, 1, (tokens, config.dim)).astype(np.float32)
        jitter *= config.router_jitter
        jitter += 1
    if config.noisy_top_k:
        normal = rng.standard_normal((tokens, config.num_experts), np.float32)
    return Draws(jitter, normal)


def moved_biases(biases: Mapping[int, Array], load: Array, config: MixtralConfig) -> dict[int, Array]:
    """Return the biases after a step: up by γ for experts below their fair share of the load, down for those above.

    b_e ← b_e + γ · sign(1/E − f_e) (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Parameters
    ----------
    biases
        Layer → (E,).
    load
        (L, E), the fractions of each layer's assignments.
    config
        Of the model; γ is its ``bias_update_rate``.
    """
    up = config.bias_update_rate * np.sign(1 / config.num_experts - load)  # (L, E)
    return {layer: (bias + up[layer]).astype(np.float32) for layer, bias in biases.items()}
