"""Mixtral: parameters, blocks, and the forward and backward pass over a backend's components."""

import importlib
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tinymoe import workers
from tinymoe.block import Attend, BlockSaved, block, block_backward
from tinymoe.cache import KVCache
from tinymoe.config import MixtralConfig
from tinymoe.errors import InputError
from tinymoe.reference.loss import IGNORED

Array = np.ndarray
Params = Mapping[str, Array]
DTYPES = {  # of each backend
    "reference": ("float32", "float64"),
    "cuda": ("float32", "bfloat16"),
}
LEAST_PART = 2**16  # elements (tokens · dim) of a worker's part: with fewer, threads mostly wait for the interpreter


class Forward(NamedTuple):
    """What the backward of the model needs."""

    embedding: Any
    blocks: list[BlockSaved]
    norm: Any
    hidden: Array  # (N, D) after the last norm


class Losses(NamedTuple):
    """The terms of a loss, apart."""

    cross_entropy: float
    switch: Array  # (L,) per layer, unweighted
    z: Array  # (L,) per layer, unweighted; zeros when its coefficient is 0
    load: Array  # (L, E) fraction of the assignments that went to each expert


class Mixtral:
    """A Mixtral, or a dense Mistral when ``config.num_experts`` is 0.

    Parameters
    ----------
    config
        The shape.
    params
        Flat dict of arrays with the names and shapes of `MixtralConfig.parameter_shapes`; kept, not copied.
    backend
        ``"reference"``: NumPy. ``"cuda"``: raw kernels, where `tinymoe.cuda.device` says: on a GPU, or emulated.
    num_workers
        Threads that share a training batch of the reference; None: one per usable core. It fixes the order of sums,
        hence the bits.

    Attributes
    ----------
    params
        As given; with ``"cuda"`` on the device.
    losses
        `Losses` of the last call of `loss_and_grads`.

    Raises
    ------
    InputError
        Unknown backend, or parameters that do not fit the config.
    """

    def __init__(
        self, config: MixtralConfig, params: Params, backend: str = "reference", num_workers: int | None = None
    ):
        _check_backend(backend)
        check_params(config, params, backend)
        if num_workers is not None and num_workers < 1:
            raise InputError(f"num_workers is {num_workers}; give at least 1")
        self.config = config
        self.backend = backend
        self.ops: Any = importlib.import_module(f"tinymoe.{backend}")
        self.num_workers = (num_workers or workers.usable_cores()) if backend == "reference" else 1
        self.params = params
        if backend == "cuda":
            if not isinstance(params, dict):
                raise InputError(
                    "a memory-mapped model runs on the reference: load it without mmap for the CUDA backend"
                )
            self.params = {name: self.place(p) for name, p in params.items()}
        self.dtype = params["norm"].dtype
        self.losses: Losses | None = None

    @classmethod
    def init(
        cls,
        config: MixtralConfig,
        seed: int = 0,
        backend: str = "reference",
        dtype: str = "float32",
        num_workers: int | None = None,
    ) -> "Mixtral":
        """Return a model with random weights.

        Norm weights are 1, all others normal with standard deviation 0.02, those that write into the residual
        stream (wo and w2) divided by √(2 n_layers), so that its variance does not grow with depth (GPT-2).
        """
        if seed < 0:
            raise InputError(f"seed is {seed}; give 0 or more")
        _check_backend(backend)
        to = _checked_dtype(dtype, backend)
        rng = np.random.default_rng(seed)
        params = {}
        for name, shape in config.parameter_shapes():
            if name.endswith("norm"):
                params[name] = np.ones(shape, to)
                continue
            std = 0.02 / np.sqrt(2 * config.n_layers) if name.endswith(("wo", "w2")) else 0.02
            params[name] = (rng.standard_normal(shape, np.float32) * np.float32(std)).astype(to)
        return cls(config, params, backend, num_workers)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        backend: str = "reference",
        dtype: str = "float32",
        mmap: bool = False,
        num_workers: int | None = None,
    ) -> "Mixtral":
        """Open a model directory: transformers' layout or Mistral's (see `tinymoe.checkpoint`).

        Parameters
        ----------
        directory
            Holds config.json and model.safetensors (or shards), or params.json and consolidated.safetensors.
        dtype
            To compute in; weights stored in float16 or bfloat16 are converted.
        mmap
            Leave the weights on disk and convert what a token needs when it needs it, so that a checkpoint larger
            than memory runs: the same logits, bit for bit. Such a model cannot be trained.

        Raises
        ------
        InputError
            The directory holds no model that can be read; the message names the file or tensor.
        """
        from tinymoe import checkpoint

        _check_backend(backend)
        config, params = checkpoint.load(directory, _checked_dtype(dtype, backend), mmap=mmap)
        return cls(config, params, backend, num_workers)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors in transformers' layout; each is replaced whole or not at all."""
        from tinymoe import checkpoint

        params = self.params if self.backend == "reference" else {n: self.host(p) for n, p in self.params.items()}
        checkpoint.save(directory, params, self.config)

    # Arrays: NumPy's for the reference, the device's for kernels.

    def place(self, array: Any, dtype: Any = None) -> Any:
        """Return a host array as the backend's, as ``dtype`` if given."""
        return self.ops.device.array(array, dtype) if self.backend == "cuda" else np.asarray(array)

    def host(self, array: Any) -> Array:
        """Return an array of the backend as NumPy's."""
        return self.ops.device.host(array) if self.backend == "cuda" else array

    def cache(self, capacity: int) -> KVCache:
        """Return an empty cache for a sequence of up to so many tokens."""
        return KVCache(self.config, capacity, self.dtype, self.ops.device.empty if self.backend == "cuda" else np.empty)

    # Forward.

    @workers.kept_memory()
    def __call__(self, tokens: Array) -> Array:
        """Return the logits (B, T, V) of the token after each of tokens (B, T).

        Memory is O(T): nothing is kept for a backward pass.
        """
        return self.host(self._logits(self._checked(tokens)))

    def _logits(self, tokens: Array) -> Any:
        x, _ = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])  # (N, D)
        rotation = self._rotation(np.arange(tokens.shape[1]))
        for layer in range(self.config.n_layers):
            x, _ = self._block(layer, x, tokens.shape, rotation, self._attend)
        x, _ = self.ops.rmsnorm(x, self.params["norm"], self.config.norm_eps)
        logits, _ = self.ops.linear(x, self._head())  # (N, V)
        return logits.reshape(*tokens.shape, -1)

    def first_layer_not_finite(self, tokens: Array) -> int | None:
        """Return the first layer whose output for tokens (B, T) is not finite, or None: where a divergence began."""
        x, _ = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])
        rotation = self._rotation(np.arange(tokens.shape[1]))
        for layer in range(self.config.n_layers):
            try:
                x, _ = self._block(layer, x, tokens.shape, rotation, self._attend)
            except FloatingPointError:
                return layer
            if not np.isfinite(self.host(x)).all():
                return layer
        return None

    @workers.kept_memory()
    def extend(self, sequences: list[Array], caches: list[KVCache]) -> tuple[Array, list[Array]]:
        """Feed new tokens to sequences whose past is in their caches, one cache each, which grow by them.

        The sequences may differ in length, past and new: their rows are packed one after the other, without padding,
        and only attention looks at each apart.

        Parameters
        ----------
        sequences
            Non-empty integer arrays, the new tokens of each.
        caches
            As many.

        Returns
        -------
        logits
            (len(sequences), V), after the last token of each.
        experts
            Per layer the chosen experts (N, k) of the N packed tokens; nothing for a dense model.
        """
        packed = np.concatenate(sequences)  # (N,)
        check_tokens(packed, self.config.vocab_size)
        ends = np.cumsum([len(tokens) for tokens in sequences])
        rows = [slice(end - len(tokens), end) for end, tokens in zip(ends, sequences)]
        positions = np.concatenate([np.arange(c.length, c.length + len(s)) for s, c in zip(sequences, caches)])

        def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            outs = []
            for part, cache in zip(rows, caches):
                keys, values = cache.update(layer, k[:, part], v[:, part])
                queries, keys, values = self.place(q[:, part]), self.place(keys), self.place(values)
                if part.stop - part.start == 1:
                    outs.append(self.ops.attention_decode(queries, keys, values))
                else:
                    outs.append(self.ops.attention(queries, keys, values, self.config.sliding_window)[0])
            return outs[0] if len(outs) == 1 else np.concatenate(outs, axis=1), None

        x, _ = self.ops.embedding(self._ids(packed), self.params["tok_embeddings"])  # (N, D)
        rotation = self._rotation(positions)
        moe = self.ops.moe_decode if len(positions) == 1 else self.ops.moe
        blocks = []
        for layer in range(self.config.n_layers):
            x, saved = self._block(layer, x, (1, len(positions)), rotation, partial(attend, layer), moe)
            blocks.append(saved)
        for tokens, cache in zip(sequences, caches):
            cache.advance(len(tokens))
        x, _ = self.ops.rmsnorm(x[self.place(ends - 1)], self.params["norm"], self.config.norm_eps)
        logits = self.host(self.ops.linear(x, self._head())[0])  # the first that a device is waited for
        for layer, saved in enumerate(blocks):
            self._check_finite(layer, saved)
        return logits, [self.host(saved.ffn.routing.experts) for saved in blocks] if self.config.num_experts else []

    def router_logits(self, tokens: Array) -> list[Array]:
        """Return the router's logits (N, E) of tokens (B, T), layer by layer; nothing for a dense model."""
        tokens = self._checked(tokens)
        if self.config.num_experts == 0:
            return []
        forward = self._forward(tokens, self._rotation(np.arange(tokens.shape[1])))
        return [self.host(saved.ffn.routing.logits) for saved in forward.blocks]

    def _forward(self, tokens: Array, rotation: Array) -> Forward:
        x, embedding_saved = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])  # (N, D)
        blocks = []
        for layer in range(self.config.n_layers):
            x, saved = self._block(layer, x, tokens.shape, rotation, self._attend)
            blocks.append(saved)
        hidden, norm_saved = self.ops.rmsnorm(x, self.params["norm"], self.config.norm_eps)
        return Forward(embedding_saved, blocks, norm_saved, hidden)

    def _block(
        self, layer: int, x: Array, shape: tuple[int, int], rotation: Array, attend: Attend, moe: Any = None
    ) -> tuple[Array, BlockSaved]:
        def weights(name: str) -> Array:
            return self.params[f"layers.{layer}.{name}"]

        try:
            return block(self.ops, self.config, weights, x, shape, rotation, attend, moe)
        except FloatingPointError as error:
            raise FloatingPointError(f"layer {layer}: {error}") from None

    def _attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        return self.ops.attention(q, k, v, self.config.sliding_window)

    def _rotation(self, positions: Array) -> Array:
        return self.ops.rope_table(positions, self.config.head_dim, self.config.rope_theta, self.dtype)

    def _head(self) -> Any:
        return self.place(self.params["tok_embeddings" if self.config.tie_embeddings else "output"])

    def _ids(self, tokens: Array) -> Any:
        """Return token ids or targets as one row, on the device as int32."""
        return self.place(tokens.ravel(), np.int32)

    def _number(self, value: Any) -> float:
        """Return a loss term as a number: the reference gives one, the device an array of one."""
        return np.asarray(self.host(value)).item()

    def _check_finite(self, layer: int, saved: BlockSaved) -> None:
        """Raise what the reference's router raises, if the device's has set its flag."""
        if self.config.num_experts and self.backend == "cuda" and self.host(saved.ffn.routing.not_finite).any():
            raise FloatingPointError(f"layer {layer}: the router's logits are not finite")

    # Loss and backward.

    def loss(self, tokens: Array, targets: Array) -> float:
        """Return the mean cross-entropy in nats over the targets (B, T) that are not −100, without gradients."""
        tokens, targets = self._checked_pair(tokens, targets)

        def part(tokens: Array, targets: Array) -> float:
            logits = self._logits(tokens)
            loss, _ = self.ops.cross_entropy(logits.reshape(-1, self.config.vocab_size), self._ids(targets))
            return self._number(loss) * np.count_nonzero(targets != IGNORED)

        sums = workers.run(part, self._split(tokens), self._split(targets), workers=self.num_workers)
        return float(sum(sums) / np.count_nonzero(targets != IGNORED))

    def loss_and_grads(
        self,
        tokens: Array,
        targets: Array,
        aux_loss_coef: float | None = None,
        z_loss_coef: float | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """Return the training loss and its gradient by every parameter.

        loss = cross-entropy + aux_loss_coef · (mean over layers of the Switch loss)
        + z_loss_coef · (mean over layers of the z-loss). Its terms are left in ``losses``.

        The batch is cut over the workers. Every term is a mean over tokens, so the parts meet only twice: in the
        experts' load, which the Switch loss takes as given, and in the sum of the gradients.

        Parameters
        ----------
        tokens
            (B, T) integers.
        targets
            (B, T) integers, −100 where a position does not count.
        aux_loss_coef, z_loss_coef
            None: the config's.

        Raises
        ------
        InputError
            Tokens or targets are out of range or misshapen, or no target counts.
        FloatingPointError
            A layer's router logits are not finite.
        """
        tokens, targets = self._checked_pair(tokens, targets)
        if not isinstance(self.params, dict):
            raise InputError("a memory-mapped model only reads its weights: load it without mmap to train it")
        aux = self.config.aux_loss_coef if aux_loss_coef is None else aux_loss_coef
        z = self.config.z_loss_coef if z_loss_coef is None else z_loss_coef
        if not (0 <= aux < np.inf and 0 <= z < np.inf):
            raise InputError(f"aux_loss_coef is {aux} and z_loss_coef {z}; give finite numbers of at least 0")
        tokens_of, targets_of = self._split(tokens), self._split(targets)
        rotation = self._rotation(np.arange(tokens.shape[1]))
        forwards = workers.run(lambda part: self._forward(part, rotation), tokens_of, workers=self.num_workers)
        load = self._load(forwards)
        count = np.count_nonzero(targets != IGNORED)

        def backward(forward: Forward, part: Array) -> tuple[Losses, dict[str, Array]]:
            of_targets, of_tokens = np.count_nonzero(part != IGNORED) / count, part.size / targets.size
            return self._backward(forward, self._ids(part), load, of_targets, of_tokens, aux, z)

        parts = workers.run(backward, forwards, targets_of, workers=self.num_workers)
        terms = [losses for losses, _ in parts]
        self.losses = Losses(
            float(sum(t.cross_entropy for t in terms)),
            sum(t.switch for t in terms),
            sum(t.z for t in terms),
            np.stack([self.host(of_layer) for of_layer in load]),
        )
        loss = self.losses.cross_entropy
        if self.config.num_experts:
            loss += aux * float(self.losses.switch.mean()) + z * float(self.losses.z.mean())
        return loss, self._sum([grads for _, grads in parts])

    def _backward(
        self,
        forward: Forward,
        targets: Any,
        load: list[Any],
        of_targets: float,
        of_tokens: float,
        aux: float,
        z: float,
    ) -> tuple[Losses, dict[str, Array]]:
        """Return one part's share of the loss terms, and of the gradient of the whole loss.

        ``of_targets`` and ``of_tokens`` are the part's fractions of the batch's counted targets and of its tokens. The
        loss terms are read at the end: until then a device need not wait for the host.
        """
        ops, layers = self.ops, self.config.n_layers
        grads: dict[str, Array] = {}
        logits, head = ops.linear(forward.hidden, self._head())  # (N, V)
        cross_entropy, saved = ops.cross_entropy(logits, targets)
        dhidden, dhead = ops.linear_backward(ops.cross_entropy_backward(of_targets, saved), head)
        switch: list[Any] = [0.0] * layers
        z_terms: list[Any] = [0.0] * layers
        dx, grads["norm"] = ops.rmsnorm_backward(dhidden, forward.norm)
        for layer in reversed(range(layers)):
            saved_block, dlogits = forward.blocks[layer], None
            if self.config.num_experts:
                router_logits = saved_block.ffn.routing.logits  # (N, E)
                switch[layer], saved = ops.switch_loss(router_logits, load[layer])
                dlogits = ops.switch_loss_backward(aux * of_tokens / layers, saved)
                if z:
                    z_terms[layer], saved = ops.z_loss(router_logits)
                    dlogits += ops.z_loss_backward(z * of_tokens / layers, saved)
            dx, block_grads = block_backward(ops, self.config, dx, dlogits, saved_block)
            grads |= {f"layers.{layer}.{name}": grad for name, grad in block_grads.items()}
        grads["tok_embeddings"] = ops.embedding_backward(dx, forward.embedding)
        if self.config.tie_embeddings:
            grads["tok_embeddings"] += dhead
        else:
            grads["output"] = dhead
        for layer, saved_block in enumerate(forward.blocks):
            self._check_finite(layer, saved_block)
        of_layers = [np.array([self._number(term) for term in terms]) * of_tokens for terms in (switch, z_terms)]
        return Losses(self._number(cross_entropy) * of_targets, of_layers[0], of_layers[1], np.empty(0)), grads

    # The batch over the workers.

    def _split(self, batch: Array) -> list[Array]:
        """Cut (B, T) into one part per worker, but none so small that handing over costs more than it saves."""
        worthwhile = max(1, batch.size * self.config.dim // LEAST_PART)
        return np.array_split(batch, min(self.num_workers, len(batch), worthwhile))

    def _load(self, forwards: list[Forward]) -> list[Any]:
        """Return the load (E,) of the whole batch in each layer."""
        if self.config.num_experts == 0:
            return [np.zeros(0)] * self.config.n_layers
        experts = [[f.blocks[layer].ffn.routing.experts for f in forwards] for layer in range(self.config.n_layers)]
        whole = [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in experts]
        return [self.ops.expert_load(of_layer, self.config.num_experts) for of_layer in whole]

    def _sum(self, parts: list[dict[str, Array]]) -> dict[str, Array]:
        """Return the sum of the parts' gradients, in the order of the workers and under the order of ``params``."""
        total, *others = parts

        def add(names: list[str]) -> None:
            for name in names:
                for part in others:
                    total[name] += part[name]

        names = list(self.params)
        if others:
            workers.run(add, [names[i :: self.num_workers] for i in range(self.num_workers)], workers=self.num_workers)
        return {name: total[name] for name in names}

    # Checks at the public edge.

    def _checked(self, tokens: Array) -> Array:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise InputError(f"tokens must be integers of shape (B, T); got {tokens.dtype} of shape {tokens.shape}")
        check_tokens(tokens, self.config.vocab_size)
        return tokens

    def _checked_pair(self, tokens: Array, targets: Array) -> tuple[Array, Array]:
        tokens, targets = self._checked(tokens), np.asarray(targets)
        if targets.shape != tokens.shape or targets.dtype.kind not in "iu":
            raise InputError(
                f"targets must be integers of the tokens' shape {tokens.shape}; got {targets.dtype} of {targets.shape}"
            )
        targets = targets.astype(np.int64, copy=False)
        counted = targets[targets != IGNORED]
        if counted.size == 0:
            raise InputError(f"every target is {IGNORED}, ignored: there is nothing to learn from")
        check_tokens(counted, self.config.vocab_size)
        return tokens, targets


def check_tokens(tokens: Array, vocab_size: int) -> None:
    """Raise InputError if a token lies outside the vocabulary."""
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InputError(f"token {wrong} is outside the vocabulary of {vocab_size}")


def check_params(config: MixtralConfig, params: Params, backend: str = "reference") -> None:
    """Raise InputError unless the parameters are exactly those of the config, in one dtype that the backend takes."""
    names = set()
    for name, shape in config.parameter_shapes():
        if name not in params:
            raise InputError(f"parameter {name} is missing")
        if (found := shape_of(params, name)) != shape:
            raise InputError(f"parameter {name} has shape {found}; the config asks for {shape}")
        names.add(name)
    if isinstance(params, dict):
        dtype, dtypes = params["norm"].dtype, DTYPES[backend]
        for name, p in params.items():
            if p.dtype.name not in dtypes or p.dtype != dtype:
                raise InputError(f"parameter {name} has dtype {p.dtype}; all must be {' or all '.join(dtypes)}")
    if extra := sorted(params.keys() - names):
        raise InputError(f"parameter {extra[0]} does not belong to this config")


def shape_of(params: Params, name: str) -> tuple[int, ...]:
    """Return a parameter's shape without reading it from disk."""
    shapes = getattr(params, "shapes", None)
    return shapes[name] if shapes is not None else params[name].shape


def _check_backend(backend: str) -> None:
    if backend not in DTYPES:
        raise InputError(f"no backend {backend!r}; there is {', '.join(DTYPES)}")


def _checked_dtype(dtype: str, backend: str) -> np.dtype:
    name = getattr(dtype, "__name__", str(dtype))  # np.float32 is "float32", too
    if name not in DTYPES[backend]:
        raise InputError(f"dtype {name!r} is not one to compute in on {backend}; give {' or '.join(DTYPES[backend])}")
    return _dtype(name)


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
