"""One block of the model: x + attention(norm(x)), then that + feed-forward(norm(that)); forward above backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinymoe.config import MixtralConfig

Array = np.ndarray
Weights = Callable[[str], Array]  # the block's parameter of that name
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]  # rotated q and k, and v -> o, saved


class BlockSaved(NamedTuple):
    """What the backward of `block` needs: what its components saved, in the order of the forward."""

    attention_norm: Any
    wq: Any
    wk: Any
    wv: Any
    rope: Any
    attention: Any
    wo: Any
    ffn_norm: Any
    ffn: Any


def block(
    ops: Any,
    config: MixtralConfig,
    weights: Weights,
    x: Array,
    shape: tuple[int, int],
    rotation: Array,
    attend: Attend,
    moe: Any,
) -> tuple[Array, BlockSaved]:
    """Compute y = x + attention(norm(x)), then out = y + feed-forward(norm(y)).

    Parameters
    ----------
    ops
        The backend: a module of components.
    config
        Of the model.
    weights
        Returns the block's parameters by name: ``attention.wq`` and so on.
    x
        (B·T, D).
    shape
        (B, T).
    rotation
        (T, K/2), from `rope_table`.
    attend
        Attention over the sequences themselves, or over a cache.
    moe
        The backend's mixture: its ``moe``, ``moe_decode`` or ``varied_moe``; None in a block without experts.

    Returns
    -------
    out
        (B·T, D).
    saved
        For `block_backward`.
    """
    h, attention_norm = ops.rmsnorm(x, weights("attention_norm"), config.norm_eps)
    q, wq = ops.linear(h, weights("attention.wq"))
    k, wk = ops.linear(h, weights("attention.wk"))
    v, wv = ops.linear(h, weights("attention.wv"))
    q, rope = ops.rope(q.reshape(*shape, -1, config.head_dim), rotation)  # (B, T, H, K)
    k, _ = ops.rope(k.reshape(*shape, -1, config.head_dim), rotation)  # (B, T, G, K)
    o, attention = attend(q, k, v.reshape(*shape, -1, config.head_dim))
    y, wo = ops.linear(o.reshape(len(x), -1), weights("attention.wo"))
    y += x
    h, ffn_norm = ops.rmsnorm(y, weights("ffn_norm"), config.norm_eps)
    if moe:
        of_experts = (weights(f"moe.{w}") for w in ("gate", "w1", "w2", "w3"))
        out, ffn = moe(h, *of_experts, config.top_k_experts)
    else:
        out, ffn = ops.ffn(h, *(weights(f"ffn.{w}") for w in ("w1", "w2", "w3")))
    out += y
    return out, BlockSaved(attention_norm, wq, wk, wv, rope, attention, wo, ffn_norm, ffn)


def block_backward(
    ops: Any, dout: Array, dlogits: Array | None, saved: BlockSaved, moe_backward: Any
) -> tuple[Array, dict[str, Array]]:
    """Return dx (N, D) and the gradients of the block's parameters by name.

    Parameters
    ----------
    dout
        (N, D).
    dlogits
        (N, E), the balance losses' gradient of the router's logits; None when there are none.
    moe_backward
        Of the mixture that `block` was given; None in a block without experts.
    """
    grads: dict[str, Array] = {}
    if moe_backward:
        dh, *of_weights = moe_backward(dout, dlogits, saved.ffn)
        grads |= zip(("moe.gate", "moe.w1", "moe.w2", "moe.w3", "moe.noise"), of_weights)
    else:
        dh, *of_weights = ops.ffn_backward(dout, saved.ffn)
        grads |= zip(("ffn.w1", "ffn.w2", "ffn.w3"), of_weights)
    dy, grads["ffn_norm"] = ops.rmsnorm_backward(dh, saved.ffn_norm)
    dy += dout
    do, grads["attention.wo"] = ops.linear_backward(dy, saved.wo)
    dq, dk, dv = ops.attention_backward(do.reshape(saved.attention.o.shape), saved.attention)
    dq, dk = ops.rope_backward(dq, saved.rope), ops.rope_backward(dk, saved.rope)
    dh, grads["attention.wq"] = ops.linear_backward(dq.reshape(len(dy), -1), saved.wq)
    for d, linear_saved, name in ((dk, saved.wk, "attention.wk"), (dv, saved.wv, "attention.wv")):
        more, grads[name] = ops.linear_backward(d.reshape(len(dy), -1), linear_saved)
        dh += more
    dx, grads["attention_norm"] = ops.rmsnorm_backward(dh, saved.attention_norm)
    dx += dy
    return dx, grads
