"""The experts of a few tokens, as when a text is written: bound by reading the weights of the chosen, each once."""

from typing import Any

from tinymoe.cuda import device
from tinymoe.cuda.dispatch import FEW_PAIRS as FEW_PAIRS  # (token, choice) pairs; beyond, the ladder is for it
from tinymoe.cuda.dispatch import Plan
from tinymoe.cuda.few_rows import MOST_WARPS, ROWS, TILE, WAYS, instance

UP_WARPS, DOWN_WARPS = MOST_WARPS // 2, MOST_WARPS  # of a block
KERNELS = device.Kernels("few_tokens.cu", *(f"{kernel}<{way}>" for kernel in ("few_up", "few_down") for way in WAYS))


def few_tokens_ffn(x: Any, weights: Any, plan: Plan, w1: Any, w2: Any, w3: Any) -> Any:
    """Compute y[n] = Σ_k weights[n, k] · w2_e(silu(w1_e x[n]) ⊙ w3_e x[n]), e = the expert of choice k.

    Two launches, the second of which mixes, in the order of the choices. Only ``hidden`` is rounded to the dtype of x.

    Parameters
    ----------
    x
        (N, D), N·k up to ``FEW_PAIRS``, 64.
    weights
        (N, k) float32.
    plan
        Where the pairs go.
    w1, w2, w3
        (E, F, D), (E, D, F), (E, F, D).

    Returns
    -------
    y
        (N, D).
    """
    (N, k), (E, F, D) = weights.shape, w1.shape
    hidden, y = device.empty((N * k, F), x.dtype), device.empty((N, D), x.dtype)
    KERNELS.launch(
        instance("few_up", x, D),
        (-(-F // TILE), min(E, N * k)),
        32 * UP_WARPS,
        *(x, plan.tokens, w1, w3, plan.offsets, hidden, E, D, F),
    )
    KERNELS.launch(
        instance("few_down", x, F),
        -(-D // ROWS),
        32 * DOWN_WARPS,
        *(hidden, w2, weights, plan.slots, plan.offsets, y, N, k, E, F, D),
        shared=ROWS * N * k * 4,
    )
    return y
