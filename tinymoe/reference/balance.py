"""Balance: losses that keep the router from sending every token to the same few experts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinymoe.reference.router import top_k_ids
from tinymoe.reference.softmax import softmax

Array = np.ndarray


class SwitchSaved(NamedTuple):
    """What the backward of `switch_loss` needs."""

    probs: Array  # (N, E)
    load: Array  # (E,)


class ZSaved(NamedTuple):
    """What the backward of `z_loss` needs."""

    probs: Array  # (N, E)
    log_normaliser: Array  # (N, 1)


def expert_load(experts: Array, num_experts: int) -> Array:
    """Return f (E,): the fraction of the assignments in ``experts`` (any shape, −1 for none) that go to each expert."""
    counts = np.bincount(experts[experts >= 0], minlength=num_experts)
    return counts / max(counts.sum(), 1)


def switch_loss(logits: Array, load: Array) -> tuple[float, SwitchSaved]:
    """Return L = E · Σ_e f_e · P_e, with P_e the mean over tokens of softmax(logits)_e.

    Parameters
    ----------
    logits
        (N, E), the router's.
    load
        f (E,), from `expert_load`. Counting has no gradient: it is a constant here. Given f, the loss is a mean over
        tokens, so that parts of a batch can be computed apart with the load of the whole.

    Returns
    -------
    loss
        Exactly 1 when f or P is uniform, E/k when all tokens choose the same k with certainty. Balance is where it
        stands still, not its least value: with f fixed it can go below 1.
    saved
        For `switch_loss_backward`.

    Notes
    -----
    Fedus et al. 2021 (arXiv 2101.03961), equations 4–6, with f over the N·k assignments of top-k.
    """
    probs = softmax(logits)
    loss = len(load) * float(load @ probs.mean(axis=0, dtype=np.float64))
    return loss, SwitchSaved(probs, load)


def switch_loss_backward(dloss: float, saved: SwitchSaved) -> Array:
    """Return dlogits (N, E) = dloss · E/N · p · (f − Σ_e f_e p_e): down for experts more loaded than p expects."""
    probs, load = saved
    f = load.astype(probs.dtype)
    dlogits = f - (probs @ f)[:, None]  # (N, E)
    dlogits *= probs
    dlogits *= dloss * len(load) / len(probs)
    return dlogits


def z_loss(logits: Array) -> tuple[float, ZSaved]:
    """Return the mean over tokens of (log Σ_e exp(logits_e))², which keeps the router's logits small.

    Zoph et al. 2022 (ST-MoE, arXiv 2202.08906), equation 5; logits (N, E).
    """
    shift = logits.max(axis=-1, keepdims=True)
    log_normaliser = np.log(np.exp(logits - shift).sum(axis=-1, keepdims=True)) + shift  # (N, 1)
    loss = float(np.mean(log_normaliser**2, dtype=np.float64))
    return loss, ZSaved(np.exp(logits - log_normaliser), log_normaliser)


def z_loss_backward(dloss: float, saved: ZSaved) -> Array:
    """Return dlogits (N, E) = dloss · 2/N · log Σ exp · p."""
    probs, log_normaliser = saved
    return probs * log_normaliser * (2 * dloss / len(probs))


def hf_load_balancing_loss(router_logits: Sequence[Array], top_k: int) -> float:
    """Return transformers' balance loss: E · Σ_e f_e · P_e over the tokens of all layers together.

    It differs from the mean over layers of `switch_loss` in two ways. f counts assignments per token, not per
    assignment, so its balanced value is k. And f and P are averaged over layers *before* they are multiplied, so two
    layers that have collapsed onto different experts look balanced to it.

    Parameters
    ----------
    router_logits
        One (N, E) array per layer.
    top_k
        k.

    Raises
    ------
    ValueError
        There is no layer.
    """
    if len(router_logits) == 0:
        raise ValueError("router_logits is empty: give one (N, E) array per layer")
    probs = softmax(np.concatenate([np.asarray(logits) for logits in router_logits]))  # (L·N, E)
    load = top_k * expert_load(top_k_ids(probs, top_k), probs.shape[1])
    return probs.shape[1] * float(load @ probs.mean(axis=0, dtype=np.float64))
