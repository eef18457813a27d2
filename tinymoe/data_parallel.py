"""A batch in parts, one per worker: what each is given of it, and the sums in which they meet."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tinymoe import workers
from tinymoe.balance import Draws, draw, is_plain
from tinymoe.checks import Params
from tinymoe.config import MixtralConfig
from tinymoe.decoder import Forward, Share
from tinymoe.errors import InputError
from tinymoe.reference.loss import IGNORED

Array = np.ndarray


def share_out(
    parts: list[Array], lengths: Array | None, dlog_probs: Array | None, place: Callable[[Array], Any]
) -> list[Share]:
    """Return what each worker has of a batch whose targets come in parts: of the rest, what belongs to its sequences.

    ``place`` puts an array on the backend.
    """
    B, T = sum(map(len, parts)), parts[0].shape[1]
    rows: list[Any] = [None] * len(parts)
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.shape != (B,) or not ((lengths >= 1) & (lengths <= T)).all():
            raise InputError(f"lengths must be {B} numbers from 1 to {T}; got {lengths.tolist()}")
        real = np.arange(T) < lengths[:, None]  # (B, T)
        rows = [place(np.flatnonzero(part)) for part in np.array_split(real, len(parts))]
    weights: list[Array | None] = [None] * len(parts)
    if dlog_probs is not None:
        weights = list(np.array_split(dlog_probs, len(parts)))
    counts = [np.count_nonzero(part != IGNORED) for part in parts]
    tokens = [part.size if of is None else len(of) for part, of in zip(parts, rows)]
    return [
        Share(part, of_rows, of_weights, count / sum(counts), size / sum(tokens))
        for part, of_rows, of_weights, count, size in zip(parts, rows, weights, counts, tokens)
    ]


def draw_for_parts(config: MixtralConfig, parts: list[Array]) -> list[dict[int, Draws]]:
    """Return for each part of a batch of tokens its share of each layer's random numbers, by layer.

    The batch is their seed: the same tokens meet the same noise, however often and wherever they are computed.
    """
    if is_plain(config):
        return [{}] * len(parts)
    ends = np.cumsum([part.size for part in parts])
    seed = zlib.crc32(np.concatenate([part.ravel() for part in parts]).astype(np.int64).tobytes())
    draws = {layer: draw(config, seed, layer, ends[-1]) for layer in config.moe_layers}

    def share(rows: slice) -> dict[int, Draws]:
        return {
            layer: Draws(*(None if drawn is None else drawn[rows] for drawn in of_layer))
            for layer, of_layer in draws.items()
        }

    return [share(slice(end - part.size, end)) for end, part in zip(ends, parts)]


def load_of_batch(ops: Any, config: MixtralConfig, forwards: list[Forward], shares: list[Share]) -> dict[int, Any]:
    """Return the load (E,) of the whole batch, by layer that has experts."""
    load = {}
    for layer in config.moe_layers:
        parts = [share.without_padding(f.blocks[layer].ffn.routing.experts) for f, share in zip(forwards, shares)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        load[layer] = ops.expert_load(whole, config.num_experts)
    return load


def sum_gradients(parts: list[dict[str, Array]], params: Params, num_workers: int) -> dict[str, Array]:
    """Return the sum of the parts' gradients, in the order of the workers and under the order of ``params``."""
    total, *others = parts

    def add(names: list[str]) -> None:
        for name in names:
            for part in others:
                total[name] += part[name]

    names = list(total)
    if others:
        workers.run(add, [names[i::num_workers] for i in range(num_workers)], workers=num_workers)
    # A bias only selects, and noise that was not drawn has no scale to learn: no component gives their gradients.
    apart = {n: np.zeros_like(p) for n, p in params.items() if n.endswith(("moe.bias", "moe.noise"))}
    total = apart | total
    return {name: total[name] for name in params}
