"""The balance losses on the device; see `tinymoe.reference.balance`.

A loss is here an array (1,) of float32 on the device, where the reference returns a Python number: the host reads it
when the step is done, and waits for nothing in between.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device
from tinymoe.cuda.router import top_k_ids

ROWS, COUNT, SUM = 4, 256, 1024  # rows, elements of a block; threads of the block that sums
MAX_COUNTING = 256  # blocks that count: more would only add to the same few numbers
KERNELS = device.Kernels(
    "balance.cu",
    "balance_count",
    "balance_load",
    "balance_softmax",
    "balance_sum",
    "balance_sum_of_squares",
    "switch_rows",
    "switch_backward",
    "z_backward",
)


class SwitchSaved(NamedTuple):
    """What the backward of `switch_loss` needs."""

    probs: Any  # (N, E) float32
    load: Any  # (E,) float32


class ZSaved(NamedTuple):
    """What the backward of `z_loss` needs."""

    probs: Any  # (N, E) float32
    log_normaliser: Any  # (N, 1) float32


def expert_load(experts: Any, num_experts: int) -> Any:
    """Return f (E,) float32: each expert's fraction of the assignments in ``experts`` (any shape, −1 for none)."""
    E, size = num_experts, experts.size
    counts, load = device.zeros(E, np.int32), device.empty(E, np.float32)
    blocks = min(MAX_COUNTING, -(-size // COUNT))
    KERNELS.launch("balance_count", blocks, COUNT, experts, counts, size, E, shared=4 * E)
    KERNELS.launch("balance_load", 1, COUNT, counts, load, E)
    return load


def switch_loss(logits: Any, load: Any) -> tuple[Any, SwitchSaved]:
    """Return L = E · Σ_e f_e · P_e as an array (1,) of the device, with P_e the mean over tokens of softmax(logits)_e.

    Parameters
    ----------
    logits
        (N, E) float32, the router's.
    load
        f (E,), from `expert_load`; of the device or the host.
    """
    N, E = logits.shape
    probs, _ = _softmax([logits])
    load = device.array(load, np.float32)
    return _switch(probs, load, E / N), SwitchSaved(probs, load)


def switch_loss_backward(dloss: float, saved: SwitchSaved) -> Any:
    """Return dlogits (N, E) = dloss · E/N · p · (f − Σ_e f_e p_e), float32."""
    probs, load = saved
    N, E = probs.shape
    dlogits = device.empty((N, E), np.float32)
    KERNELS.launch("switch_backward", -(-N // ROWS), 32 * ROWS, probs, load, dlogits, dloss * E / N, N, E)
    return dlogits


def z_loss(logits: Any) -> tuple[Any, ZSaved]:
    """Return the mean over tokens of (log Σ_e exp(logits_e))² as an array (1,) of the device; logits (N, E) float32."""
    probs, log_normaliser = _softmax([logits])
    loss, N = device.empty(1, np.float32), len(logits)
    KERNELS.launch("balance_sum_of_squares", 1, SUM, log_normaliser, loss, 1 / N, N)
    return loss, ZSaved(probs, log_normaliser)


def z_loss_backward(dloss: float, saved: ZSaved) -> Any:
    """Return dlogits (N, E) = dloss · 2/N · log Σ exp · p, float32."""
    probs, log_normaliser = saved
    N, E = probs.shape
    dlogits = device.empty((N, E), np.float32)
    KERNELS.launch("z_backward", -(-N * E // COUNT), COUNT, probs, log_normaliser, dlogits, 2 * dloss / N, N, E)
    return dlogits


def hf_load_balancing_loss(router_logits: Sequence[Any], top_k: int) -> Any:
    """Return transformers' balance loss, E · Σ_e f_e · P_e over the tokens of all layers together, as an array (1,).

    Parameters
    ----------
    router_logits
        One (N, E) array per layer, of the device or the host.
    top_k
        k.

    Raises
    ------
    ValueError
        There is no layer.
    """
    if len(router_logits) == 0:
        raise ValueError("router_logits is empty: give one (N, E) array per layer")
    probs, _ = _softmax([device.array(logits, np.float32) for logits in router_logits])  # (L·N, E)
    rows, E = probs.shape
    return _switch(probs, expert_load(top_k_ids(probs, top_k), E), top_k * E / rows)


def _softmax(layers: list[Any]) -> tuple[Any, Any]:
    """Return softmax (L·N, E) of the layers' logits, and log Σ exp (L·N, 1)."""
    rows, E = sum(len(logits) for logits in layers), layers[0].shape[1]
    probs, log_normaliser = device.empty((rows, E), np.float32), device.empty((rows, 1), np.float32)
    first = 0
    for logits in layers:
        N = len(logits)
        KERNELS.launch("balance_softmax", -(-N // ROWS), 32 * ROWS, logits, probs, log_normaliser, first, N, E)
        first += N
    return probs, log_normaliser


def _switch(probs: Any, load: Any, scale: float) -> Any:
    """Return scale · Σ_n Σ_e f_e p_e, (1,)."""
    rows, E = probs.shape
    expected, loss = device.empty(rows, np.float32), device.empty(1, np.float32)
    KERNELS.launch("switch_rows", -(-rows // ROWS), 32 * ROWS, probs, load, expected, rows, E)
    KERNELS.launch("balance_sum", 1, SUM, expected, loss, scale, rows)
    return loss
