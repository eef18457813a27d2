"""Cross-entropy: minus the log-probability of each target, averaged over the targets that count."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray
IGNORED = -100  # a target with this value does not count


class CrossEntropySaved(NamedTuple):
    """What the backward of `cross_entropy` needs."""

    logits: Array  # (N, V)
    log_normaliser: Array  # (N, 1) log Σ_v exp(logits)
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
    shift = logits.max(axis=-1, keepdims=True)  # (N, 1): exp cannot overflow
    log_normaliser = np.log(np.exp(logits - shift).sum(axis=-1, keepdims=True)) + shift
    rows = np.flatnonzero(targets != IGNORED)
    losses = log_normaliser[rows, 0] - logits[rows, targets[rows]]
    loss = float(losses.sum(dtype=np.float64)) / max(len(rows), 1)
    return loss, CrossEntropySaved(logits, log_normaliser, targets, len(rows))


def cross_entropy_backward(dloss: float, saved: CrossEntropySaved) -> Array:
    """Return dlogits (N, V) = (softmax(logits) − one_hot(target)) · dloss / count; zero where the row is ignored."""
    logits, log_normaliser, targets, counted = saved
    dlogits = logits - log_normaliser
    np.exp(dlogits, out=dlogits)
    rows = np.flatnonzero(targets != IGNORED)
    dlogits[rows, targets[rows]] -= 1
    dlogits[targets == IGNORED] = 0
    dlogits *= dloss / max(counted, 1)
    return dlogits
