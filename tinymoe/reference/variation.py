"""The mixture with another routing than plain top-k: noise, jitter, a bias, a capacity, or experts that choose."""

import math
from typing import NamedTuple

import numpy as np

from tinymoe.reference.dispatch import (
    CombineSaved,
    GatherSaved,
    combine,
    combine_backward,
    dispatch,
    drop_overflow,
    gather,
    gather_backward,
)
from tinymoe.reference.experts import ExpertsSaved, expert_ffn, expert_ffn_backward
from tinymoe.reference.linear import LinearSaved, linear, linear_backward
from tinymoe.reference.router import (
    ExpertChoiceSaved,
    RouteSaved,
    Routing,
    expert_choice,
    expert_choice_backward,
    route,
    route_backward,
)

Array = np.ndarray


class Variation(NamedTuple):
    """What a layer's routing has beyond plain top-k. The defaults are plain top-k.

    Parameters
    ----------
    jitter
        (N, D): the router sees x ⊙ jitter, uniform around 1 (Switch, arXiv 2101.03961, section 2.4).
    w_noise, normal
        (E, D) and (N, E): normal ⊙ softplus(x w_noiseᵀ) is added to the logits (Shazeer et al. 2017,
        arXiv 1701.06538, equation 4).
    bias
        (E,): added to the probabilities for the selection only (DeepSeek-V3, arXiv 2412.19437).
    capacity_factor
        c: an expert takes at most ⌈c · N·k/E⌉ pairs, and the others are dropped; None: all that come.
    by_experts
        Experts choose tokens, ⌈c · N·k/E⌉ each (c is 1 if no factor is given).
    """

    jitter: Array | None = None
    w_noise: Array | None = None
    normal: Array | None = None
    bias: Array | None = None
    capacity_factor: float | None = None
    by_experts: bool = False


class NoiseSaved(NamedTuple):
    """What the backward of `router_noise` needs."""

    linear: LinearSaved
    slope: Array  # (N, E) of the noise by the scale's argument


class VariedSaved(NamedTuple):
    """What the backward of `varied_moe` needs; ``routing`` is before anything was dropped."""

    routing: Routing
    route: RouteSaved | ExpertChoiceSaved
    gather: GatherSaved
    experts: ExpertsSaved
    combine: CombineSaved
    jitter: Array | None
    noise: NoiseSaved | None
    dropped: float  # share of the pairs


def router_noise(x: Array, w_noise: Array, normal: Array) -> tuple[Array, NoiseSaved]:
    """Compute normal ⊙ softplus(x w_noiseᵀ): noise whose scale the model learns, by token and expert.

    x (N, D), w_noise (E, D), normal (N, E), drawn from the standard normal distribution → (N, E).
    """
    z, saved = linear(x, w_noise)  # (N, E)
    return normal * np.logaddexp(0, z), NoiseSaved(saved, normal * (0.5 + 0.5 * np.tanh(0.5 * z)))


def router_noise_backward(dnoise: Array, saved: NoiseSaved) -> tuple[Array, Array]:
    """Return dx (N, D) and dw_noise (E, D): softplus' slope is σ."""
    return linear_backward(dnoise * saved.slope, saved.linear)


def varied_moe(
    x: Array, w_gate: Array, w1: Array, w2: Array, w3: Array, top_k: int, variation: Variation
) -> tuple[Array, VariedSaved]:
    """Compute `moe` with another routing.

    Parameters
    ----------
    x, w_gate, w1, w2, w3, top_k
        As for `moe`.
    variation
        What is different.

    Returns
    -------
    y
        (N, D); a token that no expert takes gets zeros.
    saved
        For `varied_moe_backward`.

    Raises
    ------
    FloatingPointError
        The router's logits are not finite.
    """
    jitter, w_noise, normal, bias, factor, by_experts = variation
    seen = x if jitter is None else x * jitter
    capacity = min(len(x), capacity_of(1.0 if factor is None else factor, len(x), top_k, len(w_gate)))
    noise = noise_saved = None
    route_saved: RouteSaved | ExpertChoiceSaved
    if by_experts:
        routing, route_saved = expert_choice(seen, w_gate, capacity)
    else:
        if w_noise is not None and normal is not None:
            noise, noise_saved = router_noise(seen, w_noise, normal)
        routing, route_saved = route(seen, w_gate, top_k, noise, bias)
    limited = factor is not None and not by_experts
    kept = drop_overflow(routing.experts, len(w_gate), capacity) if limited else routing.experts
    plan = dispatch(kept, len(w_gate))
    rows, gather_saved = gather(x, plan)  # (S, D)
    out, expert_saved = expert_ffn(rows, w1, w2, w3, plan.offsets)
    y, combine_saved = combine(out, routing.weights, plan)  # (N, D)
    dropped = 1 - len(plan.tokens) / kept.size if limited else 0.0
    return y, VariedSaved(routing, route_saved, gather_saved, expert_saved, combine_saved, jitter, noise_saved, dropped)


def varied_moe_backward(dy: Array, dlogits: Array | None, saved: VariedSaved) -> tuple[Array, ...]:
    """Return dx, dw_gate, dw1, dw2, dw3, and dw_noise where there was noise; see `moe_backward`."""
    dout, dweights = combine_backward(dy, saved.combine)
    drows, dw1, dw2, dw3 = expert_ffn_backward(dout, saved.experts)
    dx = gather_backward(drows, saved.gather)
    of_noise: tuple[Array, ...] = ()
    if isinstance(saved.route, ExpertChoiceSaved):
        dseen, dw_gate = expert_choice_backward(dweights, dlogits, saved.route)
    else:
        dseen, dw_gate, *dnoise = route_backward(dweights, dlogits, saved.route)
        if saved.noise is not None:
            more, dw_noise = router_noise_backward(dnoise[0], saved.noise)
            dseen += more
            of_noise = (dw_noise,)
    dx += dseen if saved.jitter is None else dseen * saved.jitter
    return dx, dw_gate, dw1, dw2, dw3, *of_noise


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """Return ⌈factor · N·k/E⌉: the pairs that an expert takes at most."""
    return math.ceil(factor * tokens * top_k / num_experts)
