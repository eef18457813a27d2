"""The sparse mixture of experts on the device: route, dispatch, experts, combine; see `tinymoe.reference.moe`."""

from typing import Any, NamedTuple

from tinymoe.cuda.dispatch import (
    CombineSaved,
    GatherSaved,
    combine,
    combine_backward,
    dispatch,
    gather_backward,
)
from tinymoe.cuda.experts import ExpertsSaved, add, expert_ffn_backward, gathered_ffn
from tinymoe.cuda.few_tokens import FEW_PAIRS, few_tokens_ffn
from tinymoe.cuda.router import RouteSaved, Routing, route, route_backward


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


def moe(x: Any, w_gate: Any, w1: Any, w2: Any, w3: Any, top_k: int) -> tuple[Any, MoESaved]:
    """Compute y = Σ_{e in top k} G(x)_e · w2_e(silu(w1_e x) ⊙ w3_e x), without a word to the host in between.

    (N, D), (E, D), (E, F, D), (E, D, F), (E, F, D) → (N, D). Rows are gathered by the experts' first products as they
    load them: there is no copy of x in expert order.
    """
    routing, route_saved = route(x, w_gate, top_k)
    plan = dispatch(routing.experts, len(w_gate))
    out, expert_saved = gathered_ffn(x, plan.tokens, w1, w2, w3, plan.offsets)  # (S, D)
    y, combine_saved = combine(out, routing.weights, plan)  # (N, D)
    return y, MoESaved(routing, route_saved, GatherSaved(plan), expert_saved, combine_saved)


def moe_backward(dy: Any, dlogits: Any | None, saved: MoESaved) -> tuple[Any, Any, Any, Any, Any]:
    """Return dx (N, D), dw_gate (E, D), dw1, dw2, dw3, given dy (N, D) and dlogits (N, E) float32 or None."""
    dout, dweights = combine_backward(dy, saved.combine)
    drows, dw1, dw2, dw3 = expert_ffn_backward(dout, saved.experts)
    dx_router, dw_gate = route_backward(dweights, dlogits, saved.route)
    return add(gather_backward(drows, saved.gather), dx_router), dw_gate, dw1, dw2, dw3


def moe_decode(x: Any, w_gate: Any, w1: Any, w2: Any, w3: Any, top_k: int) -> tuple[Any, MoEDecoded]:
    """Compute `moe` of tokens (N, D) that need no gradient; a few of them by kernels that read each weight once."""
    if len(x) * top_k > FEW_PAIRS:
        y, saved = moe(x, w_gate, w1, w2, w3, top_k)
        return y, MoEDecoded(saved.routing)
    routing, _ = route(x, w_gate, top_k)
    plan = dispatch(routing.experts, len(w_gate))
    return few_tokens_ffn(x, routing.weights, plan, w1, w2, w3), MoEDecoded(routing)
