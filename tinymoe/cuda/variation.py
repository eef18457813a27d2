"""The mixture on the device with another routing than plain top-k; see `tinymoe.reference.variation`.

`Variation` is the reference's: its fields, and the capacity that they lead to, are the same numbers on the host; its
arrays are here the device's.
"""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device
from tinymoe.cuda.dispatch import (
    CombineSaved,
    GatherSaved,
    combine,
    combine_backward,
    dispatch,
    drop_overflow,
    dropped_share,
    gather_backward,
)
from tinymoe.cuda.experts import ExpertsSaved, add, expert_ffn_backward, gathered_ffn
from tinymoe.cuda.router import (
    ExpertChoiceSaved,
    RouteSaved,
    Routing,
    expert_choice,
    expert_choice_backward,
    gate,
    gate_backward,
    route,
    route_backward,
)
from tinymoe.reference.variation import Variation as Variation
from tinymoe.reference.variation import capacity_of

THREADS, MOST_BLOCKS = 256, 4096  # of the element-wise kernels
KERNELS = device.Kernels(
    "variation.cu",
    *(f"noise_forward<{{T}}, {held}, {width}>" for held in (1, 8) for width in (1, 4)),
    "multiply_add<{T}>",
)


class NoiseSaved(NamedTuple):
    """What the backward of `router_noise` needs."""

    x: Any  # (N, D)
    w_noise: Any  # (E, D)
    slope: Any  # (N, E) float32, of the noise by the scale's argument


class VariedSaved(NamedTuple):
    """What the backward of `varied_moe` needs; ``routing`` is before anything was dropped."""

    routing: Routing
    route: RouteSaved | ExpertChoiceSaved
    gather: GatherSaved
    experts: ExpertsSaved
    combine: CombineSaved
    jitter: Any  # (N, D) float32, or None
    noise: NoiseSaved | None
    dropped: Any  # (1,) float32, the share of the pairs


def router_noise(x: Any, w_noise: Any, normal: Any) -> tuple[Any, NoiseSaved]:
    """Compute normal ⊙ softplus(x w_noiseᵀ), (N, E) float32: x (N, D), w_noise (E, D), normal (N, E) float32.

    The product is not rounded to x's dtype in between.

    Raises
    ------
    InputError
        There are more than 256 experts.
    """
    noise, slope = (device.empty((len(x), len(w_noise)), np.float32) for _ in range(2))
    gate(KERNELS, "noise_forward", x, w_noise, (normal, noise, slope))
    return noise, NoiseSaved(x, w_noise, slope)


def router_noise_backward(dnoise: Any, saved: NoiseSaved) -> tuple[Any, Any]:
    """Return dx (N, D) and dw_noise (E, D), given dnoise (N, E) float32: softplus' slope is σ."""
    return gate_backward(_multiply_add(None, dnoise, saved.slope), saved.x, saved.w_noise)


def varied_moe(
    x: Any, w_gate: Any, w1: Any, w2: Any, w3: Any, top_k: int, variation: Variation
) -> tuple[Any, VariedSaved]:
    """Compute `moe` with another routing, without a word to the host in between.

    The variation's arrays are float32, w_noise excepted. A token that no expert takes gets zeros. An expert takes at
    most its capacity, so there are no more than E times that many slots: all of them are filled where experts choose.
    """
    jitter, w_noise, normal, bias, factor, by_experts = variation
    seen = x if jitter is None else _multiply_add(None, x, jitter)
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
    if limited or by_experts:
        plan = plan._replace(tokens=plan.tokens[: len(w_gate) * capacity])
    out, expert_saved = gathered_ffn(x, plan.tokens, w1, w2, w3, plan.offsets)  # (S, D)
    y, combine_saved = combine(out, routing.weights, plan)  # (N, D)
    dropped = dropped_share(plan) if limited else device.zeros(1, np.float32)
    saved = routing, route_saved, GatherSaved(plan), expert_saved, combine_saved, jitter, noise_saved, dropped
    return y, VariedSaved(*saved)


def varied_moe_backward(dy: Any, dlogits: Any | None, saved: VariedSaved) -> tuple[Any, ...]:
    """Return dx, dw_gate, dw1, dw2, dw3, and dw_noise where there was noise; see `moe_backward`."""
    dout, dweights = combine_backward(dy, saved.combine)
    drows, dw1, dw2, dw3 = expert_ffn_backward(dout, saved.experts)
    dx = gather_backward(drows, saved.gather)
    of_noise: tuple[Any, ...] = ()
    if isinstance(saved.route, ExpertChoiceSaved):
        dseen, dw_gate = expert_choice_backward(dweights, dlogits, saved.route)
    else:
        dseen, dw_gate, *dnoise = route_backward(dweights, dlogits, saved.route)
        if saved.noise is not None:
            more, dw_noise = router_noise_backward(dnoise[0], saved.noise)
            dseen, of_noise = add(dseen, more), (dw_noise,)
    dx = add(dx, dseen) if saved.jitter is None else _multiply_add(dx, dseen, saved.jitter)
    return dx, dw_gate, dw1, dw2, dw3, *of_noise


def _multiply_add(base: Any, x: Any, factor: Any) -> Any:
    """Return base + x ⊙ factor in x's dtype, in place of ``base`` if that is not None; factor is float32."""
    y = device.empty(x.shape, x.dtype) if base is None else base
    blocks = min(-(-x.size // THREADS), MOST_BLOCKS)
    KERNELS.launch(f"multiply_add<{device.ctype(x)}>", blocks, THREADS, base, x, factor, y, x.size)
    return y
