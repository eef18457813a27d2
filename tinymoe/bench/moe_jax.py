"""A peer of `tinymoe bench moe`: the expert block around jax's ragged_dot, compiled as a whole."""

from typing import Any

import jax
import jax.numpy as jnp
import torch.utils.dlpack

from tinymoe.bench.moe import Batch, Passes, Weights
from tinymoe.bench.moe_peers import array, tensor
from tinymoe.cuda import device


def contestants(weights: Weights, batch: Batch) -> dict[str, Passes]:
    """Return jax's passes. It launches on a stream of its own, so the device is waited for before and after."""
    x, dy, experts, mixing = (jax.dlpack.from_dlpack(tensor(of_batch)) for of_batch in batch)
    w1, w2, w3 = (jnp.swapaxes(jax.dlpack.from_dlpack(tensor(w)), 1, 2) for w in weights)  # (E, in, out), laid out so
    inputs = jax.block_until_ready((x, jnp.concatenate([w1, w3], axis=2), w2))
    (N, k), E = experts.shape, len(w2)

    def block(x: Any, w13: Any, w2: Any) -> Any:
        flat = experts.reshape(-1)
        order, counts = jnp.argsort(flat, stable=True), jnp.bincount(flat, length=E).astype(jnp.int32)
        both = jax.lax.ragged_dot(x[order // k], w13, counts, preferred_element_type=x.dtype)
        gate, up = jnp.split(both, 2, axis=1)
        out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w2, counts, preferred_element_type=x.dtype)
        by_choice = jnp.zeros_like(out).at[order].set(out).reshape(N, k, -1)
        return (by_choice * mixing[:, :, None].astype(x.dtype)).sum(axis=1)

    def with_gradients(x: Any, w13: Any, w2: Any) -> Any:
        y, backward = jax.vjp(block, x, w13, w2)
        return y, backward(dy)

    forward, both = jax.jit(block), jax.jit(with_gradients)

    def waited(run: Any) -> Any:
        device.synchronize()
        return jax.block_until_ready(run(*inputs))

    def as_array(y: Any) -> Any:
        return array(torch.utils.dlpack.from_dlpack(y))

    passes = {"forward": lambda: as_array(waited(forward)), "both": lambda: as_array(waited(both)[0])}
    return {"jax ragged_dot": passes}
