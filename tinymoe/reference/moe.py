"""The sparse mixture of experts: route, dispatch, gather, expert_ffn, combine."""

from typing import NamedTuple

import numpy as np

from tinymoe.reference.dispatch import (
    CombineSaved,
    GatherSaved,
    combine,
    combine_backward,
    dispatch,
    gather,
    gather_backward,
)
from tinymoe.reference.experts import ExpertsSaved, expert_ffn, expert_ffn_backward, ffn_decode
from tinymoe.reference.linear import matvec
from tinymoe.reference.router import RouteSaved, Routing, route, route_backward
from tinymoe.reference.softmax import softmax

Array = np.ndarray


class MoESaved(NamedTuple):
    """What the backward of `moe` needs; ``routing`` is also what the balance losses and the analysis read."""

    routing: Routing
    route: RouteSaved
    gather: GatherSaved
    experts: ExpertsSaved
    combine: CombineSaved


class MoEDecoded(NamedTuple):
    """What `moe_decode` tells beside its result."""

    routing: Routing


def moe(x: Array, w_gate: Array, w1: Array, w2: Array, w3: Array, top_k: int) -> tuple[Array, MoESaved]:
    """Compute y = Σ_{e in top k} G(x)_e · w2_e(silu(w1_e x) ⊙ w3_e x).

    Parameters
    ----------
    x
        (N, D).
    w_gate
        (E, D).
    w1, w3
        (E, F, D).
    w2
        (E, D, F).
    top_k
        k, the experts per token.

    Returns
    -------
    y
        (N, D).
    saved
        For `moe_backward`.

    Raises
    ------
    FloatingPointError
        The router's logits are not finite.

    Notes
    -----
    Section 2.1 of the paper. The work per token depends on k, not on E: each expert multiplies only its own rows.
    """
    routing, route_saved = route(x, w_gate, top_k)
    plan = dispatch(routing.experts, len(w_gate))
    rows, gather_saved = gather(x, plan)  # (S, D)
    out, expert_saved = expert_ffn(rows, w1, w2, w3, plan.offsets)  # (S, D)
    y, combine_saved = combine(out, routing.weights, plan)  # (N, D)
    return y, MoESaved(routing, route_saved, gather_saved, expert_saved, combine_saved)


def moe_backward(dy: Array, dlogits: Array | None, saved: MoESaved) -> tuple[Array, Array, Array, Array, Array]:
    """Return dx, dw_gate, dw1, dw2, dw3.

    Parameters
    ----------
    dy
        (N, D).
    dlogits
        (N, E), the balance losses' gradient of the router's logits; None when there are none.
    saved
        From `moe`.
    """
    dout, dweights = combine_backward(dy, saved.combine)
    drows, dw1, dw2, dw3 = expert_ffn_backward(dout, saved.experts)
    dx = gather_backward(drows, saved.gather)
    dx_router, dw_gate = route_backward(dweights, dlogits, saved.route)
    dx += dx_router
    return dx, dw_gate, dw1, dw2, dw3


def moe_decode(x: Array, w_gate: Array, w1: Array, w2: Array, w3: Array, top_k: int) -> tuple[Array, MoEDecoded]:
    """Compute `moe` of a single token (1, D): its k experts one after the other, with nothing to sort.

    The weights are the softmax over the k chosen logits, as section 2.1 writes it and with the numbers of `route`.
    """
    logits = matvec(w_gate, x[0])  # (E,)
    if not np.isfinite(logits).all():
        raise FloatingPointError("the router's logits are not finite")
    experts = (-logits).argsort(kind="stable")[:top_k]
    weights = softmax(logits[experts])
    outs = [ffn_decode(x[0], w1[e], w2[e], w3[e]) for e in experts.tolist()]
    return np.dot(weights, outs)[None], MoEDecoded(Routing(weights[None], experts[None], logits[None]))


def moe_naive(x: Array, w_gate: Array, w1: Array, w2: Array, w3: Array, top_k: int) -> Array:
    """Compute what `moe` computes, token by token and choice by choice: the formula, and the tests' oracle."""
    routing, _ = route(x, w_gate, top_k)
    y = np.zeros_like(x)
    for n, token in enumerate(x):  # token (D,)
        for weight, e in zip(routing.weights[n], routing.experts[n]):
            gate, up = w1[e] @ token, w3[e] @ token  # (F,)
            y[n] += weight * (w2[e] @ (gate / (1 + np.exp(-gate)) * up))
    return y
