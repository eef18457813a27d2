"""Decoding: a block of the model for one token behind a cache, on vectors.

It computes what `tinymoe.block.block` computes for a sequence of one, with nothing to sort and nothing to save. Its
products only read weights; in a small model as much time goes by between them, in calls that each do next to nothing
and find the processor's caches full of weights. So here are as few calls as the formulas allow.
"""

from collections.abc import Callable

import numpy as np

from tinymoe.reference.experts import ffn_decode
from tinymoe.reference.linear import matvec
from tinymoe.reference.moe import moe_decode

Array = np.ndarray


def block_decode(
    x: Array,
    weights: Callable[[str], Array],
    rotation: Array,
    attend: Callable[[Array, Array, Array], Array],
    eps: float,
    top_k: int,
) -> tuple[Array, Array | None]:
    """Compute y = x + attention(norm(x)), then out = y + feed-forward(norm(y)), of one token.

    Parameters
    ----------
    x
        (D,).
    weights
        Returns the block's parameters by name: ``attention.wq`` and so on.
    rotation
        (1, K/2), from `rope_table`.
    attend
        Takes the rotated q (1, 1, H, K) and k and v (1, 1, G, K), and returns o (1, 1, H, K): `attention_decode` over
        a cache that they join.
    eps
        Of the norms.
    top_k
        k, the experts of the token; 0 in a block without experts.

    Returns
    -------
    out
        (D,).
    experts
        (k,) expert ids, most probable first; None without experts.

    Raises
    ------
    FloatingPointError
        A logit of the router is NaN or infinite.
    """
    h = _rmsnorm(x, weights("attention_norm"), eps)
    q, k, v = (matvec(weights(name), h) for name in ("attention.wq", "attention.wk", "attention.wv"))
    heads = np.concatenate((q, k, v)).reshape(1, 1, -1, 2 * rotation.shape[1])  # (1, 1, H + 2G, K)
    kv = len(k) // heads.shape[3]  # G
    rotated = heads[:, :, :-kv].view(rotation.dtype)  # (1, 1, H + G, K/2), of queries and keys
    rotated *= rotation
    o = attend(heads[:, :, : -2 * kv], heads[:, :, -2 * kv : -kv], heads[:, :, -kv:])
    y = matvec(weights("attention.wo"), o.reshape(-1))
    y += x
    h = _rmsnorm(y, weights("ffn_norm"), eps)
    experts = None
    if top_k:
        w_gate, w1, w2, w3 = (weights(f"moe.{w}") for w in ("gate", "w1", "w2", "w3"))
        (out,), decoded = moe_decode(h[None], w_gate, w1, w2, w3, top_k)
        experts = decoded.routing.experts[0]
    else:
        out = ffn_decode(h, *(weights(f"ffn.{w}") for w in ("w1", "w2", "w3")))
    out += y
    return out, experts


def _rmsnorm(x: Array, weight: Array, eps: float) -> Array:
    return x / (np.dot(x, x) / len(x) + eps) ** 0.5 * weight
