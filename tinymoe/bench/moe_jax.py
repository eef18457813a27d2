"""Two peers of `tinymoe bench moe`: the expert block around jax's ragged_dot, and around its kernels for Hopper."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch.utils.dlpack

from tinymoe.bench.moe import Batch, Passes, Weights
from tinymoe.bench.moe_peers import array, tensor
from tinymoe.cuda import device

# Rows, columns and inner elements of a tile, its stages, and how many tiles a block takes along the columns.
NAMES = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
TILES = ((128, 128, 64, 4, 8), (64, 128, 64, 5, 8), (64, 256, 64, 4, 8))
Product = Callable[[Any, Any, Any], Any]  # of rows, weights, and the rows of each expert


def contestants(weights: Weights, batch: Batch) -> dict[str, Passes]:
    """Return jax's passes. It launches on a stream of its own, so the device is waited for before and after."""
    x, dy, *routing = (jax.dlpack.from_dlpack(tensor(of_batch)) for of_batch in batch)
    w1, w2, w3 = (jax.dlpack.from_dlpack(tensor(w)) for w in weights)
    w13 = jnp.concatenate([w1, w3], axis=1)  # (E, 2F, D)
    across = jax.block_until_ready((x, *(jnp.swapaxes(w, 1, 2) for w in (w13, w2))))  # (E, in, out), laid out so
    along = jax.block_until_ready((x, w13, w2))

    def passes(compiled: list[tuple[Any, Any]], inputs: Any) -> Passes:
        forwards, boths = zip(*compiled)
        forward = _fastest(forwards, (*inputs, *routing))
        both = _fastest(boths, (*inputs, *routing, dy))
        return {"forward": lambda: _array(forward()), "both": lambda: _array(both()[0])}

    return {
        "jax ragged_dot": passes([compiled(None)], across),
        "jax Pallas": passes([compiled(tiles) for tiles in TILES], along),
    }


def block(product: Product, x: Any, w13: Any, w2: Any, experts: Any, mixing: Any) -> Any:
    """Compute the block around a grouped product."""
    (N, k), E = experts.shape, len(w2)
    flat = experts.reshape(-1)
    order, counts = jnp.argsort(flat, stable=True), jnp.bincount(flat, length=E).astype(jnp.int32)
    gate, up = jnp.split(product(x[order // k], w13, counts), 2, axis=1)
    out = product(jax.nn.silu(gate) * up, w2, counts)
    by_choice = jnp.zeros_like(out).at[order].set(out).reshape(N, k, -1)
    return (by_choice * mixing[:, :, None].astype(x.dtype)).sum(axis=1)


@functools.cache  # so that both routings of as many tokens share what is compiled
def compiled(tiles: tuple[int, ...] | None) -> tuple[Any, Any]:
    """Return forward, and forward and backward, with Pallas' tiles or, without, by ragged_dot."""
    product = _ragged_dot if tiles is None else _pallas(tiles)

    def with_gradients(x: Any, w13: Any, w2: Any, experts: Any, mixing: Any, dy: Any) -> Any:
        y, backward = jax.vjp(lambda x, w13, w2: block(product, x, w13, w2, experts, mixing), x, w13, w2)
        return y, backward(dy)

    return jax.jit(functools.partial(block, product)), jax.jit(with_gradients)


def _ragged_dot(x: Any, w: Any, counts: Any) -> Any:
    return jax.lax.ragged_dot(x, w, counts, preferred_element_type=x.dtype)


def _pallas(tiles: tuple[int, ...]) -> Product:
    """Return the product by the kernels for Hopper, whose backward is theirs, too."""
    sizes = dict(zip(NAMES, tiles))

    @jax.custom_vjp
    def product(x: Any, w: Any, counts: Any) -> Any:
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu  # needs absl-py, which jax does not bring

        return ragged_dot_mgpu.ragged_dot(x, w, group_sizes=counts, transpose_rhs=True, **sizes)

    def backward(saved: Any, dy: Any) -> Any:
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

        x, w, counts = saved
        dx = ragged_dot_mgpu.ragged_dot(dy, w, group_sizes=counts, **sizes)
        return dx, transposed_ragged_dot_mgpu.transposed_ragged_dot(dy, x, group_sizes=counts, **sizes), None

    product.defvjp(lambda *inputs: (product(*inputs), inputs), backward)
    return product


def _fastest(runs: tuple[Any, ...], inputs: Any) -> Callable[[], Any]:
    """Return the run that takes the least time, to be found when it is first asked for."""

    def waited(run: Any) -> Any:
        device.synchronize()
        return jax.block_until_ready(run(*inputs))

    def seconds(run: Any) -> float:
        try:
            waited(run)  # compiles
        except Exception:  # tiles that do not fit; if none do, the first says so once more
            return float("inf")
        began = time.perf_counter()
        waited(run)
        return time.perf_counter() - began

    @functools.cache
    def best() -> Any:
        return min(runs, key=seconds)

    return lambda: waited(best())


def _array(y: Any) -> Any:
    return array(torch.utils.dlpack.from_dlpack(y))
