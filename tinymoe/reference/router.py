"""The router: which k experts each token goes to, and with what weights."""

from typing import NamedTuple

import numpy as np

from tinymoe.reference.linear import LinearSaved, linear, linear_backward
from tinymoe.reference.softmax import softmax

Array = np.ndarray


class Routing(NamedTuple):
    """Where each token goes."""

    weights: Array  # (N, k) the mixing weights, summing to one over k
    experts: Array  # (N, k) expert ids, most probable first
    logits: Array  # (N, E) for the balance losses


class RouteSaved(NamedTuple):
    """What the backward of `route` needs."""

    x: Array  # (N, D)
    w_gate: Array  # (E, D)
    weights: Array  # (N, k)
    experts: Array  # (N, k)


def route(x: Array, w_gate: Array, top_k: int) -> tuple[Routing, RouteSaved]:
    """Choose k experts per token: softmax over all E, the k largest, renormalised to sum to one.

    p = softmax(x w_gateᵀ);  experts = the k largest of p, ties to the lowest id;  weights = p[experts] / Σ p[experts].

    Parameters
    ----------
    x
        (N, D).
    w_gate
        (E, D).
    top_k
        k, from 1 to E.

    Returns
    -------
    routing
        weights (N, k), experts (N, k), logits (N, E).
    saved
        For `route_backward`.

    Raises
    ------
    FloatingPointError
        A logit is NaN or infinite: there is no largest expert.

    Notes
    -----
    Section 2.1 writes G(x) = Softmax(TopK(x W_g)). Softmax over the k largest logits and renormalising the k largest
    probabilities are the same numbers: the other experts' share cancels.
    """
    logits, _ = linear(x, w_gate)  # (N, E)
    if not np.isfinite(logits).all():
        raise FloatingPointError("the router's logits are not finite")
    probs = softmax(logits)
    experts = top_k_ids(probs, top_k)
    chosen = probs[np.arange(len(x))[:, None], experts]  # (N, k)
    weights = chosen / chosen.sum(axis=1, keepdims=True)
    return Routing(weights, experts, logits), RouteSaved(x, w_gate, weights, experts)


def route_backward(dweights: Array, dlogits: Array | None, saved: RouteSaved) -> tuple[Array, Array]:
    """Return dx (N, D) and dw_gate (E, D).

    Through the renormalisation and the softmax at once, the gradient of the logits is, for the chosen experts,
    weights · (dweights − Σ_k weights · dweights), and exactly zero for all others: the softmax over the k largest
    logits is all that the output sees. A single chosen expert has weight one whatever its logit, so top-1 sends no
    gradient this way.

    Parameters
    ----------
    dweights
        (N, k), from `combine_backward`.
    dlogits
        (N, E), from the balance losses, which see all E logits; None when there are none.
    saved
        From `route`.
    """
    x, w_gate, weights, experts = saved
    dchosen = weights * (dweights - np.vecdot(weights, dweights)[:, None])  # (N, k)
    total = np.zeros((len(x), len(w_gate)), x.dtype) if dlogits is None else dlogits.copy()
    total[np.arange(len(x))[:, None], experts] += dchosen  # a token's experts are distinct: no update is lost
    return linear_backward(total, LinearSaved(x, w_gate))


def top_k_ids(scores: Array, top_k: int) -> Array:
    """Return the columns (N, k) of the k largest scores of each row, largest first, ties to the lowest column."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
