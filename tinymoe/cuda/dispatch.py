"""Dispatch on the device: the plan, gather and combine; see `tinymoe.reference.dispatch`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device
from tinymoe.errors import InputError

PAIRS, SCAN, ROWS = 256, 1024, 4  # pairs of a block; threads of the scan; rows of a block
FEW_PAIRS = 64  # up to PAIRS, which one block sorts by comparing each with each
MAX_EXPERTS = 1024  # whose slots fit in a block's shared memory, for each of its warps
KERNELS = device.Kernels(
    "dispatch.cu",
    "dispatch_few",
    "dispatch_count",
    "dispatch_scan",
    "dispatch_scatter",
    "dispatch_transpose",
    "dispatch_drop",
    "dispatch_dropped",
    *(f"{kernel}<{{T}}, {width}>" for kernel in ("gather_rows", "sum_slots", "combine_backward") for width in (1, 4)),
)


class Plan(NamedTuple):
    """A ragged list of token rows in expert order: expert e owns the slots offsets[e] to offsets[e + 1].

    All of it stays on the device, so that the host never waits for the routing. Hence S = N·k, or what the host knows
    to be enough: pairs that go nowhere leave the slots from offsets[E] on empty.
    """

    tokens: Any  # (S,) int32, the token that fills each slot, −1 in an empty one
    offsets: Any  # (E + 1,) int32
    slots: Any  # (N, k) int32, the slot of each (token, choice), −1 where it has none


class GatherSaved(NamedTuple):
    """What the backward of `gather` needs."""

    plan: Plan


class CombineSaved(NamedTuple):
    """What the backward of `combine` needs."""

    out: Any  # (S, D)
    weights: Any  # (N, k) float32
    plan: Plan


def dispatch(experts: Any, num_experts: int) -> Plan:
    """Return the plan that groups the (token, choice) pairs by expert, each expert's tokens in the order of the text.

    experts (N, k) is int32; −1, or any other id outside [0, E), sends the pair nowhere.

    Raises
    ------
    InputError
        There are more than 1024 experts.
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise InputError(f"num_experts is {num_experts}; the CUDA dispatch takes from 1 to {MAX_EXPERTS}")
    (N, k), E = experts.shape, num_experts
    pairs, blocks = N * k, max(1, -(-N * k // PAIRS))
    tokens, offsets, slots = (device.empty(shape, np.int32) for shape in (pairs, E + 1, (N, k)))
    if pairs <= FEW_PAIRS:
        KERNELS.launch("dispatch_few", 1, PAIRS, experts, tokens, offsets, slots, pairs, E, k)
        return Plan(tokens, offsets, slots)
    counts, starts = device.empty((E, blocks), np.int32), device.empty((E, blocks), np.int32)
    KERNELS.launch("dispatch_count", blocks, PAIRS, experts, counts, pairs, E, shared=4 * E)
    KERNELS.launch("dispatch_scan", 1, SCAN, counts, starts, offsets, blocks, E)
    KERNELS.launch(
        "dispatch_scatter",
        blocks,
        PAIRS,
        *(experts, starts, offsets, tokens, slots, pairs, E, k),
        shared=4 * E * PAIRS // 32,
    )
    return Plan(tokens, offsets, slots)


def drop_overflow(experts: Any, num_experts: int, capacity: int) -> Any:
    """Return the routing (N, k) int32 with −1 for the pairs that find their expert full: it takes ``capacity`` of them.

    First choices come first, and among them tokens in the order of the text.
    """
    N, k = experts.shape
    pairs, blocks = N * k, -(-N * k // PAIRS)
    by_choice, kept = device.empty((k, N), np.int32), device.empty((N, k), np.int32)
    KERNELS.launch("dispatch_transpose", blocks, PAIRS, experts, by_choice, pairs, k)
    _, offsets, slots = dispatch(by_choice, num_experts)
    KERNELS.launch("dispatch_drop", blocks, PAIRS, experts, offsets, slots, kept, pairs, k, capacity)
    return kept


def dropped_share(plan: Plan) -> Any:
    """Return the share of the pairs that have no slot as an array (1,) of float32 on the device."""
    share = device.empty(1, np.float32)
    KERNELS.launch("dispatch_dropped", 1, 1, plan.offsets, share, plan.slots.size, len(plan.offsets) - 1)
    return share


def gather(x: Any, plan: Plan) -> tuple[Any, GatherSaved]:
    """Copy token rows into expert order: rows[s] = x[tokens[s]], zeros in empty slots, (N, D) → (S, D)."""
    return gather_rows(x, plan.tokens), GatherSaved(plan)


def gather_rows(x: Any, rows: Any) -> Any:
    """Return x[rows], zeros where a row is −1: (N, D), (S,) int32 → (S, D)."""
    S, D, T, width = len(rows), x.shape[1], device.ctype(x), _width(x.shape[1])
    gathered = device.empty((S, D), x.dtype)
    KERNELS.launch(f"gather_rows<{T}, {width}>", _grid(S, D), (32, ROWS), x, rows, gathered, S, D)
    return gathered


def gather_backward(drows: Any, saved: GatherSaved) -> Any:
    """Return dx (N, D): each token's sum over its slots, in the order of its choices."""
    return _sum_slots(drows, None, saved.plan)


def combine(out: Any, weights: Any, plan: Plan) -> tuple[Any, CombineSaved]:
    """Mix the experts' outputs: y[n] = Σ_k weights[n, k] · out[slots[n, k]], in float32, in the order of the choices.

    out (S, D), weights (N, k) float32 → y (N, D). A choice without a slot adds nothing.
    """
    return _sum_slots(out, weights, plan), CombineSaved(out, weights, plan)


def combine_backward(dy: Any, saved: CombineSaved) -> tuple[Any, Any]:
    """Return dout (S, D) = weight · dy, zeros in empty slots, and dweights (N, k) = out · dy, in float32."""
    out, weights, (tokens, _, slots) = saved
    (S, D), T, (N, k) = out.shape, device.ctype(out), slots.shape
    dout, dweights = device.empty((S, D), out.dtype), device.empty((N, k), np.float32)
    KERNELS.launch(
        f"combine_backward<{T}, {_width(D)}>",
        -(-N * k // ROWS),
        32 * ROWS,
        *(dy, out, weights, tokens, slots, dout, dweights, N * k, S, k, D),
    )
    return dout, dweights


def _sum_slots(rows: Any, weights: Any | None, plan: Plan) -> Any:
    (N, k), D, T, width = plan.slots.shape, rows.shape[1], device.ctype(rows), _width(rows.shape[1])
    y = device.empty((N, D), rows.dtype)
    KERNELS.launch(f"sum_slots<{T}, {width}>", _grid(N, D), (32, ROWS), rows, weights, plan.slots, y, N, k, D)
    return y


def _grid(rows: int, D: int) -> tuple[int, int]:
    """Return the grid of kernels with a thread per row and so many columns."""
    return -(-rows // ROWS), -(-D // (32 * _width(D)))


def _width(D: int) -> int:
    """Return how many neighbouring elements a thread loads at once."""
    return 4 if D % 4 == 0 else 1
