"""The experts on the device: grouped GEMMs around a SwiGLU; see `tinymoe.reference.experts`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device
from tinymoe.cuda.dispatch import gather_rows
from tinymoe.cuda.grouped_gemm import grouped_dw, grouped_dx, grouped_linear, grouped_swiglu, rung

THREADS, MOST_BLOCKS = 256, 4096  # of the element-wise kernels
KERNELS = device.Kernels("experts.cu", "swiglu_forward<{T}>", "swiglu_backward<{T}>", "add<{T}>")


class SwigluSaved(NamedTuple):
    """What the backward of `swiglu` needs."""

    gate: Any  # (S, F)
    up: Any  # (S, F)


class FFNSaved(NamedTuple):
    """What the backward of `ffn` needs: one expert that owns all rows."""

    experts: "ExpertsSaved"


class ExpertsSaved(NamedTuple):
    """What the backward of `expert_ffn` needs: all of it for speed, less for memory.

    Without ``hidden`` it is written once more by the kernel that reads gate and up, a sixth array beside five; without
    ``swiglu`` as well, which is 3·S·F elements, the first two products are done again.
    """

    x: Any  # (N, D), or (S, D) without rows
    rows: Any  # (S,) the row of x in each slot, or None: x lies in expert order already
    w1: Any  # (E, F, D)
    w2: Any  # (E, D, F)
    w3: Any  # (E, F, D)
    offsets: Any  # (E + 1,)
    hidden: Any  # (S, F), or None
    swiglu: SwigluSaved | None


def swiglu(gate: Any, up: Any) -> tuple[Any, SwigluSaved]:
    """Compute silu(gate) ⊙ up, all of shape (S, F)."""
    hidden = device.empty(gate.shape, gate.dtype)
    _elementwise("swiglu_forward", gate, up, hidden)
    return hidden, SwigluSaved(gate, up)


def swiglu_backward(dhidden: Any, saved: SwigluSaved) -> tuple[Any, Any]:
    """Return dgate and dup."""
    dgate, dup = (device.empty(dhidden.shape, dhidden.dtype) for _ in range(2))
    _elementwise("swiglu_backward", dhidden, *saved, dgate, dup, None)
    return dgate, dup


def add(a: Any, b: Any) -> Any:
    """Add b to a in place and return it."""
    _elementwise("add", a, b, a)
    return a


def ffn(x: Any, w1: Any, w2: Any, w3: Any) -> tuple[Any, FFNSaved]:
    """Compute w2(silu(w1 x) ⊙ w3 x): (S, D), (F, D), (D, F), (F, D) → (S, D)."""
    offsets = device.array(np.array([0, len(x)], np.int32))
    out, saved = expert_ffn(x, w1[None], w2[None], w3[None], offsets)
    return out, FFNSaved(saved)


def ffn_backward(dout: Any, saved: FFNSaved) -> tuple[Any, Any, Any, Any]:
    """Return dx (S, D), dw1 (F, D), dw2 (D, F), dw3 (F, D)."""
    dx, dw1, dw2, dw3 = expert_ffn_backward(dout, saved.experts)
    return dx, dw1[0], dw2[0], dw3[0]


def expert_ffn(x: Any, w1: Any, w2: Any, w3: Any, offsets: Any) -> tuple[Any, ExpertsSaved]:
    """Apply to each expert's rows its own feed-forward: x (S, D) in expert order, offsets (E + 1,) int32 → (S, D)."""
    return gathered_ffn(x, None, w1, w2, w3, offsets)


def gathered_ffn(x: Any, rows: Any, w1: Any, w2: Any, w3: Any, offsets: Any) -> tuple[Any, ExpertsSaved]:
    """Compute `expert_ffn` of x[rows] without a copy of it: the GEMMs gather as they load.

    Rung 5, whose copy engine cannot, takes a copy, here made once for all of its products.
    """
    if rung(x, *w1.shape[1:]) == "5_hopper" and rows is not None:
        x, rows = gather_rows(x, rows), None
    hidden, swiglu_saved = _up(x, rows, w1, w3, offsets)
    out = grouped_linear(hidden, w2, offsets)  # (S, D)
    return out, ExpertsSaved(x, rows, w1, w2, w3, offsets, hidden, swiglu_saved)


def expert_ffn_backward(dout: Any, saved: ExpertsSaved) -> tuple[Any, Any, Any, Any]:
    """Return the gradient of the slots' rows (S, D), dw1 (E, F, D), dw2 (E, D, F), dw3 (E, F, D).

    Weights of an expert without rows get exactly zero.
    """
    x, rows, w1, w2, w3, offsets, hidden, swiglu_saved = saved
    if swiglu_saved is None:
        hidden, swiglu_saved = _up(x, rows, w1, w3, offsets)
    dhidden = grouped_dx(dout, w2, offsets)  # (S, F)
    if hidden is None:
        dgate, dup, hidden = (device.empty(dhidden.shape, dhidden.dtype) for _ in range(3))
        _elementwise("swiglu_backward", dhidden, *swiglu_saved, dgate, dup, hidden)
    else:
        dgate, dup = swiglu_backward(dhidden, swiglu_saved)
    dw2 = grouped_dw(dout, hidden, offsets)
    dw1, dw3 = grouped_dw(dgate, x, offsets, rows), grouped_dw(dup, x, offsets, rows)
    dx = add(grouped_dx(dgate, w1, offsets), grouped_dx(dup, w3, offsets))
    return dx, dw1, dw2, dw3


def _up(x: Any, rows: Any, w1: Any, w3: Any, offsets: Any) -> tuple[Any, SwigluSaved]:
    """Return hidden, (S, F), and what it is made of: on tensor cores in one pass."""
    if rung(x, *w1.shape[1:]) in ("4_tensor_core", "5_hopper"):
        gate, up, hidden = grouped_swiglu(x, w1, w3, offsets, rows)
        return hidden, SwigluSaved(gate, up)
    return swiglu(grouped_linear(x, w1, offsets, rows), grouped_linear(x, w3, offsets, rows))


def _elementwise(kernel: str, *arrays: Any) -> None:
    size = arrays[0].size
    blocks = min(-(-size // THREADS), MOST_BLOCKS)
    KERNELS.launch(f"{kernel}<{device.ctype(arrays[0])}>", blocks, THREADS, *arrays, size)
