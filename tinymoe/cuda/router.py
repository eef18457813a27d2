"""The router on the device: who goes where, by the tokens' choice or the experts'; see `tinymoe.reference.router`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device
from tinymoe.errors import InputError

ROWS, COLUMNS, TILE = 4, 128, 8  # tokens and columns of a block; experts of a thread
SLICE, MAX_SLICES = 64, 64  # rows of a partial sum at least; partial sums at most
MAX_EXPERTS = 256
KERNELS = device.Kernels(
    "router.cu",
    *(f"router_forward<{{T}}, {held}, {width}>" for held in (1, 8) for width in (1, 4)),
    "top_k<1>",
    "top_k<8>",
    "router_backward_logits",
    "router_backward_x<{T}, 1>",
    "router_backward_x<{T}, 4>",
    "router_backward_gate<{T}, 1>",
    "router_backward_gate<{T}, 4>",
    "router_backward_sum<{T}>",
)
BY_EXPERTS = device.Kernels(
    "expert_choice.cu",
    *(f"token_probabilities<{{T}}, {held}, {width}>" for held in (1, 8) for width in (1, 4)),
    "choose_tokens",
    "choice_backward_logits",
)
CHOOSING = 1024  # threads of an expert that chooses


class Routing(NamedTuple):
    """Where each token goes."""

    weights: Any  # (N, k) float32, the mixing weights, summing to one over k
    experts: Any  # (N, k) int32, expert ids, most probable first
    logits: Any  # (N, E) float32, for the balance losses
    not_finite: Any  # (1,) int32, not 0 if a logit was NaN or infinite


class RouteSaved(NamedTuple):
    """What the backward of `route` needs."""

    x: Any  # (N, D)
    w_gate: Any  # (E, D)
    weights: Any  # (N, k)
    experts: Any  # (N, k)
    noisy: bool


class ExpertChoiceSaved(NamedTuple):
    """What the backward of `expert_choice` needs."""

    x: Any  # (N, D)
    w_gate: Any  # (E, D)
    probs: Any  # (N, E) float32
    experts: Any  # (N, E) int32, −1 where the expert has not taken the token


def route(
    x: Any, w_gate: Any, top_k: int, noise: Any | None = None, bias: Any | None = None
) -> tuple[Routing, RouteSaved]:
    """Choose k experts per token: softmax over all E in float32, the k largest, renormalised to sum to one.

    ``noise`` (N, E) float32 is added to the logits, ``bias`` (E,) float32 to the probabilities where the k largest are
    chosen, and nowhere else.

    Where the reference raises on a logit that is NaN or infinite, this goes on, its expert ids distinct and valid as
    ever, and sets ``not_finite`` on the device, which the host reads together with the loss.

    Raises
    ------
    InputError
        There are more than 256 experts, or top_k is not from 1 to E.
    """
    rows, E = len(x), len(w_gate)
    _check(E, top_k)
    weights, experts = device.empty((rows, top_k), np.float32), device.empty((rows, top_k), np.int32)
    logits, not_finite = device.empty((rows, E), np.float32), device.zeros(1, np.int32)
    gate(KERNELS, "router_forward", x, w_gate, (noise, bias, weights, experts, logits, not_finite), top_k)
    return Routing(weights, experts, logits, not_finite), RouteSaved(x, w_gate, weights, experts, noise is not None)


def route_backward(dweights: Any, dlogits: Any | None, saved: RouteSaved) -> tuple[Any, ...]:
    """Return dx (N, D) and dw_gate (E, D), and where there was noise dnoise (N, E) float32.

    dweights (N, k) and dlogits (N, E), or None, are float32.
    """
    x, w_gate, weights, experts, noisy = saved
    rows, E = len(x), len(w_gate)
    total = device.empty((rows, E), np.float32)  # the gradient of the logits
    KERNELS.launch(
        "router_backward_logits",
        -(-rows // ROWS),
        32 * ROWS,
        *(dweights, dlogits, weights, experts, total, rows, E, weights.shape[1]),
    )
    dx, dw_gate = gate_backward(total, x, w_gate)
    return (dx, dw_gate, total) if noisy else (dx, dw_gate)


def expert_choice(x: Any, w_gate: Any, capacity: int) -> tuple[Routing, ExpertChoiceSaved]:
    """Let each expert choose the ``capacity`` tokens that want it most, ties to the earliest.

    Returns
    -------
    routing
        Choice e of a token is expert e: weights (N, E), experts (N, E) with −1 where e has not taken it, and logits.
        Logits that are not finite are told as by `route`, and each expert has its ``capacity`` tokens all the same.
    saved
        For `expert_choice_backward`.

    Raises
    ------
    InputError
        There are more than 256 experts, or capacity is not from 0 to N.
    """
    rows, E = len(x), len(w_gate)
    if not 0 <= capacity <= rows:
        raise InputError(f"capacity is {capacity}; each expert chooses from 0 to all {rows} tokens")
    probs, logits, weights = (device.empty((rows, E), np.float32) for _ in range(3))
    experts, not_finite = device.empty((rows, E), np.int32), device.zeros(1, np.int32)
    gate(BY_EXPERTS, "token_probabilities", x, w_gate, (probs, logits, not_finite))
    BY_EXPERTS.launch("choose_tokens", E, CHOOSING, probs, weights, experts, rows, E, capacity)
    return Routing(weights, experts, logits, not_finite), ExpertChoiceSaved(x, w_gate, probs, experts)


def expert_choice_backward(dweights: Any, dlogits: Any | None, saved: ExpertChoiceSaved) -> tuple[Any, Any]:
    """Return dx (N, D) and dw_gate (E, D), given dweights (N, E) and dlogits (N, E) or None, both float32."""
    x, w_gate, probs, experts = saved
    rows, E = probs.shape
    total = device.empty((rows, E), np.float32)
    BY_EXPERTS.launch(
        "choice_backward_logits",
        -(-rows // ROWS),
        32 * ROWS,
        *(dweights, dlogits, probs, experts, total, rows, E),
    )
    return gate_backward(total, x, w_gate)


def gate(kernels: device.Kernels, name: str, x: Any, w: Any, arrays: tuple[Any, ...], *numbers: int) -> None:
    """Launch a kernel that computes x wᵀ, (N, D) by (E, D), a warp per token, and goes on with a token's E numbers.

    It takes x, w and ``arrays``, then N, D, E and ``numbers``.

    Raises
    ------
    InputError
        There are more than 256 experts.
    """
    (rows, D), E = x.shape, len(w)
    _check(E)
    expression = f"{name}<{device.ctype(x)}, {_held(E)}, {_width(D)}>"
    kernels.launch(expression, -(-rows // ROWS), 32 * ROWS, x, w, *arrays, rows, D, E, *numbers)


def gate_backward(total: Any, x: Any, w_gate: Any) -> tuple[Any, Any]:
    """Return dx (N, D) and dw_gate (E, D) of x w_gateᵀ, given its gradient (N, E) in float32."""
    (rows, D), E, T, width = x.shape, len(w_gate), device.ctype(x), _width(x.shape[1])
    dx, dw_gate = device.empty((rows, D), x.dtype), device.empty((E, D), x.dtype)
    blocks = -(-rows // ROWS), -(-D // (32 * width))
    KERNELS.launch(f"router_backward_x<{T}, {width}>", blocks, (32, ROWS), total, w_gate, dx, rows, D, E)
    slices = max(1, min(MAX_SLICES, -(-rows // SLICE)))
    partial = device.empty((slices, E, D), np.float32)
    grid = -(-D // (COLUMNS * width)), slices, -(-E // TILE)
    KERNELS.launch(
        f"router_backward_gate<{T}, {width}>", grid, COLUMNS, total, x, partial, rows, D, E, -(-rows // slices)
    )
    KERNELS.launch(f"router_backward_sum<{T}>", -(-E * D // COLUMNS), COLUMNS, partial, dw_gate, slices, E * D)
    return dx, dw_gate


def top_k_ids(scores: Any, top_k: int) -> Any:
    """Return the columns (N, k) of the k largest scores (N, E) float32 of each row, largest first, ties to the lowest.

    Raises
    ------
    InputError
        There are more than 256 columns, or top_k is not from 1 to E.
    """
    rows, E = scores.shape
    _check(E, top_k)
    ids = device.empty((rows, top_k), np.int32)
    KERNELS.launch(f"top_k<{_held(E)}>", -(-rows // ROWS), 32 * ROWS, scores, ids, rows, E, top_k)
    return ids


def _check(E: int, top_k: int = 1) -> None:
    if not 1 <= top_k <= E <= MAX_EXPERTS:
        raise InputError(
            f"top_k is {top_k} of {E} experts; the CUDA router takes up to {MAX_EXPERTS} experts and chooses 1 to all"
        )


def _held(E: int) -> int:
    """Return how many experts each lane holds."""
    return 1 if E <= 32 else MAX_EXPERTS // 32


def _width(D: int) -> int:
    """Return how many neighbouring elements a thread loads at once."""
    return 4 if D % 4 == 0 else 1
