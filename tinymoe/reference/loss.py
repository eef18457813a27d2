"""Cross-entropy: minus the log-probability of each target, averaged over the targets that count."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray
IGNORED = -100  # a target with this value does not count


class CrossEntropySaved(NamedTuple):
    """What the backward of `cross_entropy` needs."""

    weights: Array  # (N, V) exp(logits − the row's largest)
    total: Array  # (N, 1) Σ_v weights
    targets: Array  # (N,)
    counted: int


def cross_entropy(logits: Array, targets: Array) -> tuple[float, CrossEntropySaved]:
    """Return the mean over counted rows of log Σ_v exp(logits[n, v]) − logits[n, targets[n]].

    Parameters
    ----------
    logits
        (N, V).
    targets
        (N,) integers in [0, V), or −100 where the row does not count.

    Returns
    -------
    loss
        In nats; 0 when no row counts.
    saved
        For `cross_entropy_backward`.
    """
    largest = logits.max(axis=-1, keepdims=True)  # (N, 1): exp cannot overflow
    weights = logits - largest
    rows = np.flatnonzero(targets != IGNORED)
    of_targets = weights[rows, targets[rows]]
    np.exp(weights, out=weights)
    total = weights.sum(axis=-1, keepdims=True)  # (N, 1)
    losses = np.log(total[rows, 0]) - of_targets
    loss = float(losses.sum(dtype=np.float64)) / max(len(rows), 1)
    return loss, CrossEntropySaved(weights, total, targets, len(rows))


def cross_entropy_backward(dloss: float, saved: CrossEntropySaved) -> Array:
    """Return dlogits (N, V) = (softmax(logits) − one_hot(target)) · dloss / count; zero where the row is ignored."""
    weights, total, targets, counted = saved
    scale = float(dloss) / max(counted, 1)  # a NumPy float64 would make the gradient one
    dlogits = weights * (scale / total)
    rows = np.flatnonzero(targets != IGNORED)
    dlogits[rows, targets[rows]] -= scale
    dlogits[targets == IGNORED] = 0
    return dlogits
