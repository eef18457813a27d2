"""The router: which k experts each token goes to, and with what weights; or which tokens each expert takes."""

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
    noisy: bool


class ExpertChoiceSaved(NamedTuple):
    """What the backward of `expert_choice` needs."""

    x: Array  # (N, D)
    w_gate: Array  # (E, D)
    probs: Array  # (N, E)
    chosen: Array  # (N, E) of bool


def route(
    x: Array, w_gate: Array, top_k: int, noise: Array | None = None, bias: Array | None = None
) -> tuple[Routing, RouteSaved]:
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
    noise
        (N, E), added to the logits, from `router_noise`; None: none.
    bias
        (E,), added to p where the k largest are chosen, and nowhere else: the weights are of p itself (DeepSeek-V3,
        arXiv 2412.19437, equation 16, where the scores are sigmoids). None: none.

    Returns
    -------
    routing
        weights (N, k), experts (N, k), logits (N, E) with the noise.
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
    if noise is not None:
        logits += noise
    probs = _probabilities(logits)
    experts = top_k_ids(probs if bias is None else probs + bias, top_k)
    rows = np.arange(len(x))[:, None]
    if bias is None:
        chosen = probs[rows, experts]  # (N, k)
        weights = chosen / chosen.sum(axis=1, keepdims=True)
    else:  # the same numbers, also where a bias has chosen experts whose p is 0 in floating point
        weights = softmax(logits[rows, experts])
    return Routing(weights, experts, logits), RouteSaved(x, w_gate, weights, experts, noise is not None)


def route_backward(dweights: Array, dlogits: Array | None, saved: RouteSaved) -> tuple[Array, ...]:
    """Return dx (N, D) and dw_gate (E, D), and where there was noise dnoise (N, E). The bias only selects: it has none.

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
    x, w_gate, weights, experts, noisy = saved
    dchosen = weights * (dweights - np.vecdot(weights, dweights)[:, None])  # (N, k)
    total = np.zeros((len(x), len(w_gate)), x.dtype) if dlogits is None else dlogits.copy()
    total[np.arange(len(x))[:, None], experts] += dchosen  # a token's experts are distinct: no update is lost
    dx, dw_gate = linear_backward(total, LinearSaved(x, w_gate))
    return (dx, dw_gate, total) if noisy else (dx, dw_gate)


def expert_choice(x: Array, w_gate: Array, capacity: int) -> tuple[Routing, ExpertChoiceSaved]:
    """Let each expert choose the tokens that want it most: the load is even by construction.

    p = softmax(x w_gateᵀ);  expert e takes the ``capacity`` tokens with the largest p[:, e], ties to the earliest, and
    weights each by its p. A token may be taken by all experts, or by none.

    Parameters
    ----------
    x
        (N, D).
    w_gate
        (E, D).
    capacity
        Tokens of each expert, from 1 to N.

    Returns
    -------
    routing
        Choice e of a token is expert e: weights (N, E), experts (N, E) with −1 where e has not taken it, and logits.
    saved
        For `expert_choice_backward`.

    Raises
    ------
    FloatingPointError
        A logit is NaN or infinite.

    Notes
    -----
    Zhou et al. 2022 (arXiv 2202.09368), section 3.2. It is not causal: whether a token is taken depends on the tokens
    after it, which a language model does not know when it writes.
    """
    logits, _ = linear(x, w_gate)  # (N, E)
    probs = _probabilities(logits)
    chosen = np.zeros(probs.shape, bool)  # (N, E)
    np.put_along_axis(chosen, np.argsort(-probs, axis=0, kind="stable")[:capacity], True, axis=0)
    experts = np.where(chosen, np.arange(len(w_gate)), -1)
    return Routing(probs * chosen, experts, logits), ExpertChoiceSaved(x, w_gate, probs, chosen)


def expert_choice_backward(dweights: Array, dlogits: Array | None, saved: ExpertChoiceSaved) -> tuple[Array, Array]:
    """Return dx (N, D) and dw_gate (E, D): through the softmax, dp = dweights where chosen and 0 elsewhere.

    Parameters
    ----------
    dweights
        (N, E), from `combine_backward`.
    dlogits
        (N, E), from the balance losses; None when there are none.
    """
    x, w_gate, probs, chosen = saved
    dp = dweights * chosen
    total = probs * (dp - np.vecdot(probs, dp)[:, None])  # (N, E)
    if dlogits is not None:
        total += dlogits
    return linear_backward(total, LinearSaved(x, w_gate))


def _probabilities(logits: Array) -> Array:
    if not np.isfinite(logits).all():
        raise FloatingPointError("the router's logits are not finite")
    return softmax(logits)


def top_k_ids(scores: Array, top_k: int) -> Array:
    """Return the columns (N, k) of the k largest scores of each row, largest first, ties to the lowest column."""
    return (-scores).argsort(axis=1, kind="stable")[:, :top_k]
