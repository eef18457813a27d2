"""A step of decoding as one graph: what changes from token to token lies in arrays of the device, and nowhere else."""

from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinymoe.cuda import device
from tinymoe.cuda.attention import attention_cached
from tinymoe.cuda.dispatch import FEW_PAIRS, Plan, gather_rows
from tinymoe.cuda.embedding import embedding
from tinymoe.cuda.experts import expert_ffn
from tinymoe.cuda.few_tokens import few_tokens_ffn
from tinymoe.cuda.graph import Graph
from tinymoe.cuda.linear import linear_few
from tinymoe.cuda.rmsnorm import rmsnorm
from tinymoe.cuda.rope import rope

THREADS = 256  # of a block
ALIGNED = 8  # slots of a cache are a multiple of so many: with any even K each then begins on 16 bytes
KERNELS = device.Kernels("decode.cu", "cache_store<{T}>")


class Step:
    """The next token of N sequences, whose launches are recorded at the first call and repeated as one at every other.

    The graph reads token ids, positions and caches where they lie, so that one recording serves every step. It serves
    these sequences and no others: where one of them has ended, the rest get a step of their own. To run it twice on the
    same input changes nothing, since it writes the same slots again; recording relies on that.

    Parameters
    ----------
    caches
        The `tinymoe.cache.KVCache` of each sequence. Their keys and values move into arrays of the step's, a row each,
        so that one launch serves all; the caches stay usable, and know their ``step`` and ``row``.
    rotations
        (P, K/2, 2), from `rope_table`: a row for every position that a text may reach.
    routed
        (L, k): the layers that have experts, and how many ids a token gets in each.
    forward
        Takes the components that it is to use, token ids (N,), rotation (N, K/2, 2), and
        attend(layer, q, k, v) → (o, None); launches a forward pass and returns logits (N, V) and the routing of each
        layer that has experts.
    params
        The arrays that it reads.
    """

    def __init__(
        self,
        caches: list[Any],
        rotations: Any,
        routed: tuple[int, int],
        forward: Callable[..., tuple[Any, list[Any]]],
        params: Iterable[Any],
    ):
        N, (layers, k) = len(caches), routed
        self.tokens, self.positions = device.zeros(N, np.int32), device.zeros(N, np.int32)
        self.slots = device.array([cache.slots for cache in caches], np.int32)
        self.experts, self.not_finite = device.zeros((layers, N, k), np.int32), device.zeros(layers, np.int32)
        self.rotations = rotations.reshape(len(rotations), -1)  # (P, K)
        self.params, self.forward = list(params), partial(forward, components(N))
        self.graph: Graph | None = None
        for cache in caches:
            cache.step = None  # a step before gives its arrays back one by one, as these are made
        self.keys, self.values = [], []  # of each layer (N, slots, G, K)
        for layer in range(len(caches[0].keys)):
            self.keys.append(_joined([cache.keys for cache in caches], layer))
            self.values.append(_joined([cache.values for cache in caches], layer))
        for row, cache in enumerate(caches):
            cache.step, cache.row = self, row

    def serves(self, caches: list[Any], params: Iterable[Any]) -> bool:
        """Return whether it is the step of these caches, all of them and in this order, and of these parameters."""
        places = [(cache.step, cache.row) for cache in caches]
        return places == [(self, row) for row in range(len(self.tokens))] and all(map(is_, self.params, params))

    def __call__(self, tokens: Any, positions: Any) -> tuple[Any, Any, Any]:
        """Feed a token to each sequence, at a position that its cache has room for.

        Parameters
        ----------
        tokens, positions
            (N,) integers of the host.

        Returns
        -------
        logits
            (N, V). This and what follows is overwritten by the next call.
        experts
            (L, N, k) int32.
        not_finite
            (L,) int32, not 0 where a logit of the layer's router was NaN or infinite.
        """
        self.tokens[...] = device.array(tokens, np.int32)
        self.positions[...] = device.array(positions, np.int32)
        if self.graph is None:
            self.graph = Graph(self.launch)
            return self.graph.result
        return self.graph()

    def launch(self) -> tuple[Any, Any, Any]:
        """Launch the step without a graph, for the tokens and positions of the last call; the results are a call's."""
        rotation = gather_rows(self.rotations, self.positions)  # (N, K)
        logits, routings = self.forward(self.tokens, rotation.reshape(len(rotation), -1, 2), self._attend)
        for layer, routing in enumerate(routings):
            self.experts[layer] = routing.experts
            self.not_finite[layer : layer + 1] = routing.not_finite
        return logits, self.experts, self.not_finite

    def _attend(self, layer: int, q: Any, k: Any, v: Any) -> tuple[Any, None]:
        """Put k and v (1, N, G, K) into the caches and let q (1, N, H, K) attend to each its own."""
        keys, values, here = self.keys[layer], self.values[layer], (self.positions, self.slots)
        store(k, v, keys, values, *here)
        o = attention_cached(q.reshape(len(keys), 1, *q.shape[2:]), keys, values, *here)
        return o.reshape(q.shape), None


def store(k: Any, v: Any, keys: Any, values: Any, positions: Any, slots: Any) -> None:
    """Put each sequence's key and value into its cache: keys[b, positions[b] mod slots[b]] = k[b], and so values.

    k and v are N·G·K elements, keys and values (N, S, G, K) or so many, positions and slots (N,) int32.
    """
    N, S = keys.shape[:2]
    KERNELS.launch(
        f"cache_store<{device.ctype(k)}>", N, THREADS, k, v, positions, slots, keys, values, S, keys[0, 0].size
    )


def components(N: int) -> SimpleNamespace:
    """Return the components of a block for N rows, in forms that a graph can hold.

    CuPy records no cuBLAS, and no copy from the host: so the linear map is by a kernel of ours, and a feed-forward
    without a router is that of an expert which has all rows, by a plan that lies on the device already.
    """
    rows = np.arange(N, dtype=np.int32)
    whole = Plan(device.array(rows), device.array([0, N], np.int32), device.array(rows[:, None]))
    ones = device.array(np.ones((N, 1)), np.float32)

    def linear(x: Any, w: Any) -> tuple[Any, None]:
        return linear_few(x, w), None

    def ffn(x: Any, w1: Any, w2: Any, w3: Any) -> tuple[Any, None]:
        if N <= FEW_PAIRS:
            return few_tokens_ffn(x, ones, whole, w1[None], w2[None], w3[None]), None
        return expert_ffn(x, w1[None], w2[None], w3[None], whole.offsets)[0], None

    return SimpleNamespace(embedding=embedding, rmsnorm=rmsnorm, linear=linear, rope=rope, ffn=ffn)


def _joined(of_caches: list[list[Any]], layer: int) -> Any:
    """Return a layer's keys or values of N caches as one array (N, slots, G, K), of which theirs become parts."""
    slots = max(of_cache[layer].shape[1] for of_cache in of_caches)
    _, _, G, K = of_caches[0][layer].shape
    joined = device.empty((len(of_caches), -(-slots // ALIGNED) * ALIGNED, G, K), of_caches[0][layer].dtype)
    for row, of_cache in enumerate(of_caches):
        part = joined[row : row + 1, : of_cache[layer].shape[1]]
        part[...] = of_cache[layer]
        of_cache[layer] = part
    return joined
