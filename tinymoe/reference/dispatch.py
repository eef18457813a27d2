"""Dispatch: sort the (token, choice) pairs by expert, carry rows there (gather) and back (combine)."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Plan(NamedTuple):
    """A ragged list of token rows in expert order: expert e owns the slots offsets[e] to offsets[e + 1].

    An expert may own none, and a token may stand in fewer than k slots.
    """

    tokens: Array  # (S,) the token that fills each slot
    offsets: list[int]  # (E + 1,)
    slots: Array  # (N, k) the slot of each (token, choice), −1 where it has none


class GatherSaved(NamedTuple):
    """What the backward of `gather` needs."""

    plan: Plan


class CombineSaved(NamedTuple):
    """What the backward of `combine` needs."""

    out: Array  # (S, D)
    weights: Array  # (N, k)
    plan: Plan


def dispatch(experts: Array, num_experts: int) -> Plan:
    """Return the plan that groups the (token, choice) pairs by expert, each expert's tokens in the order of the text.

    Parameters
    ----------
    experts
        (N, k) expert ids in [0, E); −1 sends the pair nowhere.
    num_experts
        E.
    """
    chosen = experts.ravel()  # (N·k,)
    order = np.argsort(chosen, kind="stable")[np.count_nonzero(chosen < 0) :]  # (S,) pairs in expert order
    counts = np.bincount(chosen[order], minlength=num_experts)  # (E,)
    slots = np.full(chosen.shape, -1)
    slots[order] = np.arange(len(order))
    return Plan(order // experts.shape[1], [0, *np.cumsum(counts).tolist()], slots.reshape(experts.shape))


def drop_overflow(experts: Array, num_experts: int, capacity: int) -> Array:
    """Return the routing (N, k) with −1 for the pairs that find their expert full: it takes ``capacity`` of them.

    First choices come first, and among them tokens in the order of the text. A token whose pairs are all dropped
    skips the block: only the residual stream carries it on (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961).
    """
    by_choice = dispatch(experts.T, num_experts)  # its slots are in the order of the choices
    rank = by_choice.slots.T - np.array([0, *by_choice.offsets])[experts + 1]  # (N, k) of the pair at its expert
    return np.where(rank < capacity, experts, -1)


def gather(x: Array, plan: Plan) -> tuple[Array, GatherSaved]:
    """Copy token rows into expert order: rows[s] = x[tokens[s]], (N, D) → (S, D)."""
    return x[plan.tokens], GatherSaved(plan)


def gather_backward(drows: Array, saved: GatherSaved) -> Array:
    """Return dx (N, D): each token's sum over its slots, in the order of its choices."""
    rows = _rows_of_choices(drows, saved.plan)
    dx = next(rows)
    for row in rows:
        dx += row
    return dx


def combine(out: Array, weights: Array, plan: Plan) -> tuple[Array, CombineSaved]:
    """Mix the experts' outputs: y[n] = Σ_k weights[n, k] · out[slots[n, k]].

    Parameters
    ----------
    out
        (S, D), the experts' outputs in expert order.
    weights
        (N, k).
    plan
        From `dispatch`. A choice without a slot adds nothing.

    Returns
    -------
    y
        (N, D), summed in the order of the choices: the same input gives the same bits.
    saved
        For `combine_backward`.
    """
    rows = _rows_of_choices(out, plan)
    y = next(rows)
    y *= weights[:, :1]
    for choice, row in enumerate(rows, start=1):
        row *= weights[:, choice : choice + 1]
        y += row
    return y, CombineSaved(out, weights, plan)


def combine_backward(dy: Array, saved: CombineSaved) -> tuple[Array, Array]:
    """Return dout (S, D) = weight · dy and dweights (N, k) = out · dy, for each slot with its token's dy."""
    out, weights, plan = saved
    dout = dy[plan.tokens]  # (S, D)
    dweights = _of_choices(np.vecdot(dout, out), plan)  # (N, k)
    weight_of_slot = np.empty(len(plan.tokens), weights.dtype)
    kept = plan.slots >= 0
    weight_of_slot[plan.slots[kept]] = weights[kept]
    dout *= weight_of_slot[:, None]
    return dout, dweights


def _rows_of_choices(rows: Array, plan: Plan):
    """Yield, for choice 0 … k − 1, the (N, D) rows that fill its slots; zeros where there is none."""
    padded = _pad(rows, plan)
    for choice in range(plan.slots.shape[1]):
        yield padded[plan.slots[:, choice]]


def _of_choices(values: Array, plan: Plan) -> Array:
    return _pad(values, plan)[plan.slots]


def _pad(rows: Array, plan: Plan) -> Array:
    """Append a zero row, which slot −1 reads, if any pair has no slot."""
    if len(plan.tokens) == plan.slots.size:
        return rows
    return np.concatenate([rows, np.zeros_like(rows, shape=(1, *rows.shape[1:]))])
