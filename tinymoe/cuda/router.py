"""The router on the device: which k experts each token goes to; see `tinymoe.reference.router`."""

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


def route(x: Any, w_gate: Any, top_k: int) -> tuple[Routing, RouteSaved]:
    """Choose k experts per token: softmax over all E in float32, the k largest, renormalised to sum to one.

    Where the reference raises on a logit that is NaN or infinite, this goes on, its expert ids distinct and valid as
    ever, and sets ``not_finite`` on the device, which the host reads together with the loss.

    Raises
    ------
    InputError
        There are more than 256 experts, or top_k is not from 1 to E.
    """
    (rows, D), E, T = x.shape, len(w_gate), device.ctype(x)
    held = _held(E, top_k)
    weights, experts = device.empty((rows, top_k), np.float32), device.empty((rows, top_k), np.int32)
    logits, not_finite = device.empty((rows, E), np.float32), device.zeros(1, np.int32)
    KERNELS.launch(
        f"router_forward<{T}, {held}, {_width(D)}>",
        -(-rows // ROWS),
        32 * ROWS,
        *(x, w_gate, weights, experts, logits, not_finite, rows, D, E, top_k),
    )
    return Routing(weights, experts, logits, not_finite), RouteSaved(x, w_gate, weights, experts)


def route_backward(dweights: Any, dlogits: Any | None, saved: RouteSaved) -> tuple[Any, Any]:
    """Return dx (N, D) and dw_gate (E, D), given dweights (N, k) and dlogits (N, E) or None, both float32."""
    x, w_gate, weights, experts = saved
    (rows, D), E, T, width = x.shape, len(w_gate), device.ctype(x), _width(x.shape[1])
    total = device.empty((rows, E), np.float32)  # the gradient of the logits
    KERNELS.launch(
        "router_backward_logits",
        -(-rows // ROWS),
        32 * ROWS,
        *(dweights, dlogits, weights, experts, total, rows, E, weights.shape[1]),
    )
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
    held = _held(E, top_k)
    ids = device.empty((rows, top_k), np.int32)
    KERNELS.launch(f"top_k<{held}>", -(-rows // ROWS), 32 * ROWS, scores, ids, rows, E, top_k)
    return ids


def _held(E: int, top_k: int) -> int:
    """Return how many experts each lane holds."""
    if not 1 <= top_k <= E <= MAX_EXPERTS:
        raise InputError(
            f"top_k is {top_k} of {E} experts; the CUDA router takes up to {MAX_EXPERTS} experts and chooses 1 to all"
        )
    return 1 if E <= 32 else MAX_EXPERTS // 32


def _width(D: int) -> int:
    """Return how many neighbouring elements a thread loads at once."""
    return 4 if D % 4 == 0 else 1
