"""Parameters under their names on disk, transformers' and Mistral's, and the order that wq and wk have there."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymoe.config import MixtralConfig

Array = np.ndarray

# Our name (without layers.N.) -> the name on disk, first in transformers' files, then in Mistral's. {e} is the expert.
TOP = {
    "tok_embeddings": ("model.embed_tokens.weight", "tok_embeddings.weight"),
    "norm": ("model.norm.weight", "norm.weight"),
    "output": ("lm_head.weight", "output.weight"),
}
LAYER = {
    "attention_norm": ("input_layernorm.weight", "attention_norm.weight"),
    "attention.wq": ("self_attn.q_proj.weight", "attention.wq.weight"),
    "attention.wk": ("self_attn.k_proj.weight", "attention.wk.weight"),
    "attention.wv": ("self_attn.v_proj.weight", "attention.wv.weight"),
    "attention.wo": ("self_attn.o_proj.weight", "attention.wo.weight"),
    "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "moe.gate": ("block_sparse_moe.gate.weight", "feed_forward.gate.weight"),
    "moe.w1": ("block_sparse_moe.experts.{e}.w1.weight", "feed_forward.experts.{e}.w1.weight"),
    "moe.w2": ("block_sparse_moe.experts.{e}.w2.weight", "feed_forward.experts.{e}.w2.weight"),
    "moe.w3": ("block_sparse_moe.experts.{e}.w3.weight", "feed_forward.experts.{e}.w3.weight"),
    "moe.noise": ("block_sparse_moe.gate.noise.weight", "feed_forward.gate.noise.weight"),
    "moe.bias": ("block_sparse_moe.gate.e_score_correction_bias", "feed_forward.gate.e_score_correction_bias"),
    "ffn.w1": ("mlp.gate_proj.weight", "feed_forward.w1.weight"),
    "ffn.w2": ("mlp.down_proj.weight", "feed_forward.w2.weight"),
    "ffn.w3": ("mlp.up_proj.weight", "feed_forward.w3.weight"),
}


def to_hf(arrays: Mapping[str, Any], config: MixtralConfig) -> dict[str, Array]:
    """Return parameters or gradients under transformers' names on disk: Mixtral's, or Mistral's when dense.

    Experts, stacked here, are separate tensors there, and wq and wk have their rows in another order (see `rope`).
    """
    tensors = {}
    for name, _ in config.parameter_shapes():
        if name in TOP:
            tensors[TOP[name][0]] = np.asarray(arrays[name])
            continue
        _, layer, short = name.split(".", 2)
        on_disk = f"model.layers.{layer}.{LAYER[short][0]}"
        if "{e}" in on_disk:
            tensors |= {on_disk.format(e=e): arrays[name][e] for e in range(config.num_experts)}
        else:
            array, heads = np.asarray(arrays[name]), rope_heads(short, config)
            tensors[on_disk] = halves_from_neighbours(array, heads) if heads else array
    return tensors


def rope_heads(name: str, config: MixtralConfig) -> int:
    """Return the number of heads in a weight whose rows are rotated, 0 for all other weights."""
    return {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}.get(name, 0)


def neighbours_from_halves(w: Array, heads: int) -> Array:
    """Reorder the rows of wq or wk (heads · K, D) from rotary pairs (j, j + K/2) to pairs (2j, 2j + 1)."""
    return np.ascontiguousarray(w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2)).reshape(w.shape)


def halves_from_neighbours(w: Array, heads: int) -> Array:
    """Reorder the rows of wq or wk (heads · K, D) from rotary pairs (2j, 2j + 1) to pairs (j, j + K/2)."""
    return np.ascontiguousarray(w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2)).reshape(w.shape)
