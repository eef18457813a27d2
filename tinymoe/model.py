"""Mixtral: parameters, blocks, and the forward and backward pass over a backend's components."""

import importlib
import os
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tinymoe import workers
from tinymoe.balance import Draws, draw, is_plain
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


class Share(NamedTuple):
    """What one worker has of a batch."""

    targets: Array  # (b, T) of its b sequences
    rows: Any  # of its b·T tokens those that are no padding; None: all
    dlog_probs: Array | None  # (b,) the loss's gradient by the sequences' log-probabilities; None: cross-entropy
    of_targets: float  # fraction of the batch's targets that count
    of_tokens: float  # fraction of the batch's tokens without padding


class Losses(NamedTuple):
    """The terms of a loss, apart."""

    cross_entropy: float
    switch: Array  # (L,) per layer, unweighted; 0 in a layer without experts, as all that follow
    z: Array  # (L,) per layer, unweighted; zeros when its coefficient is 0
    load: Array  # (L, E) fraction of the assignments that went to each expert
    dropped: Array  # (L,) fraction of the assignments that their expert had no room for


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
        `Losses` of the last backward pass.

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

        Norm weights are 1, the router's noise and bias 0, all others normal with standard deviation 0.02, those that
        write into the residual stream (wo and w2) divided by √(2 n_layers), so that its variance does not grow with
        depth (GPT-2).
        """
        if seed < 0:
            raise InputError(f"seed is {seed}; give 0 or more")
        _check_backend(backend)
        to = _checked_dtype(dtype, backend)
        rng = np.random.default_rng(seed)
        params = {}
        for name, shape in config.parameter_shapes():
            if name.endswith(("norm", "moe.noise", "moe.bias")):
                params[name] = np.full(shape, name.endswith("norm"), to)
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

    def save_pretrained(self, directory: str | os.PathLike[str], eos_token: int | None = None) -> None:
        """Write config.json and model.safetensors in transformers' layout; each is replaced whole or not at all.

        ``eos_token`` is what config.json then says ends a text.
        """
        from tinymoe import checkpoint

        params = self.params if self.backend == "reference" else {n: self.host(p) for n, p in self.params.items()}
        checkpoint.save(directory, params, self.config, eos_token=eos_token)

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
            x, _ = self._block(layer, x, tokens.shape, rotation, self._attend, self._moe(layer))
        x, _ = self.ops.rmsnorm(x, self.params["norm"], self.config.norm_eps)
        logits, _ = self.ops.linear(x, self._head())  # (N, V)
        return logits.reshape(*tokens.shape, -1)

    def first_layer_not_finite(self, tokens: Array) -> int | None:
        """Return the first layer whose output for tokens (B, T) is not finite, or None: where a divergence began."""
        x, _ = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])
        rotation = self._rotation(np.arange(tokens.shape[1]))
        for layer in range(self.config.n_layers):
            try:
                x, _ = self._block(layer, x, tokens.shape, rotation, self._attend, self._moe(layer))
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
            Per layer that has experts the chosen ones (N, k) of the N packed tokens.
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
        blocks = []
        for layer in range(self.config.n_layers):
            moe = self._moe(layer, single=len(positions) == 1)
            x, saved = self._block(layer, x, (1, len(positions)), rotation, partial(attend, layer), moe)
            blocks.append(saved)
        for tokens, cache in zip(sequences, caches):
            cache.advance(len(tokens))
        x, _ = self.ops.rmsnorm(x[self.place(ends - 1)], self.params["norm"], self.config.norm_eps)
        logits = self.host(self.ops.linear(x, self._head())[0])  # the first that a device is waited for
        self._check_finite(blocks)
        return logits, [self.host(blocks[layer].ffn.routing.experts) for layer in self.config.moe_layers]

    def routing(self, tokens: Array) -> list[tuple[Array, Array, Array]]:
        """Return where each of tokens (B, T) goes, of each layer that has experts.

        Returns
        -------
        layers
            Of each: weights (N, k), experts (N, k), and the router's logits (N, E), as the backend's ``route`` gives
            them, on the host.
        """
        tokens = self._checked(tokens)
        x, _ = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])  # (N, D)
        rotation, layers = self._rotation(np.arange(tokens.shape[1])), []
        for layer in range(self.config.n_layers):
            x, saved = self._block(layer, x, tokens.shape, rotation, self._attend, self._moe(layer))
            if self.config.has_experts(layer):
                weights, experts, logits, *_ = saved.ffn.routing
                layers.append((self.host(weights), self.host(experts), self.host(logits)))
        return layers

    def router_logits(self, tokens: Array) -> list[Array]:
        """Return the router's logits (N, E) of tokens (B, T), of each layer that has experts."""
        return [logits for _, _, logits in self.routing(tokens)]

    def _forward(self, tokens: Array, rotation: Array, draws: Mapping[int, Draws]) -> Forward:
        x, embedding_saved = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])  # (N, D)
        blocks = []
        for layer in range(self.config.n_layers):
            moe = self._moe(layer, draws.get(layer))
            x, saved = self._block(layer, x, tokens.shape, rotation, self._attend, moe)
            blocks.append(saved)
        hidden, norm_saved = self.ops.rmsnorm(x, self.params["norm"], self.config.norm_eps)
        return Forward(embedding_saved, blocks, norm_saved, hidden)

    def _moe(self, layer: int, draws: Draws | None = None, single: bool = False) -> Any:
        """Return a layer's mixture, or None where it has no experts.

        Noise and capacity are for training, which is where there are draws. ``single``: the fast form for one token.
        """
        config = self.config
        if not config.has_experts(layer):
            return None
        if is_plain(config):
            return self.ops.moe_decode if single else self.ops.moe
        bias = self.params[f"layers.{layer}.moe.bias"] if config.bias_update_rate else None
        variation = self.ops.Variation(
            bias=None if bias is None else self.place(bias, self._statistics),
            capacity_factor=config.capacity_factor if draws or config.expert_choice else None,
            by_experts=config.expert_choice,
        )
        if draws:
            jitter, normal = (None if drawn is None else self.place(drawn, self._statistics) for drawn in draws)
            w_noise = None if normal is None else self.params[f"layers.{layer}.moe.noise"]
            variation = variation._replace(jitter=jitter, w_noise=w_noise, normal=normal)
        return partial(self.ops.varied_moe, variation=variation)

    @property
    def _statistics(self) -> Any:
        """The dtype of what is not rounded to bfloat16."""
        return np.float32 if self.backend == "cuda" else self.dtype

    def _block(
        self, layer: int, x: Array, shape: tuple[int, int], rotation: Array, attend: Attend, moe: Any
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

    def _check_finite(self, blocks: list[BlockSaved]) -> None:
        """Raise what the reference's router raises, if the device's has set its flag in a layer."""
        for layer in self.config.moe_layers if self.backend == "cuda" else ():
            if self.host(blocks[layer].ffn.routing.not_finite).any():
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
        lengths: Array | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """Return the training loss and its gradient by every parameter.

        loss = cross-entropy + aux_loss_coef · (mean over layers of the Switch loss)
        + z_loss_coef · (mean over layers of the z-loss). Its terms are left in ``losses``.

        The batch is cut over the workers. Every term is a mean over tokens, so the parts meet only twice: in the
        experts' load, which the Switch loss takes as given, and in the sum of the gradients. A capacity is that of a
        part, as on devices that each hold one.

        Parameters
        ----------
        tokens
            (B, T) integers.
        targets
            (B, T) integers, −100 where a position does not count.
        aux_loss_coef, z_loss_coef
            None: the config's.
        lengths
            (B,) integers, how many tokens of each sequence are no padding: those after them count in no balance loss
            and in no load. None: there is no padding.

        Raises
        ------
        InputError
            Tokens, targets or lengths are out of range or misshapen, or no target counts.
        FloatingPointError
            A layer's router logits are not finite.
        """
        tokens, targets = self._checked_pair(tokens, targets)
        parts = self._split(tokens)
        forwards = self._forwards(parts, self._draws(parts))
        return self._backwards(forwards, targets, aux_loss_coef, z_loss_coef, lengths)

    def log_probs(self, tokens: Array, targets: Array) -> Array:
        """Return the log-probability of each sequence's targets, (B,): Σ log p over those that are not −100."""
        tokens, targets = self._checked_pair(tokens, targets)

        def part(tokens: Array, targets: Array) -> Array:
            return self._log_probs(self._logits(tokens), targets)

        return np.concatenate(workers.run(part, self._split(tokens), self._split(targets), workers=self.num_workers))

    def log_probs_and_backward(
        self, tokens: Array, targets: Array, lengths: Array | None = None
    ) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
        """Return what `log_probs` returns, without noise and capacity, and the backward of any loss on it.

        The parameters and the errors are those of `loss_and_grads`.

        Returns
        -------
        log_probs
            (B,) float64.
        backward
            Takes dlog_probs (B,), a loss's gradient by them, and returns its gradient by every parameter; the balance
            losses join it with the config's coefficients, and ``losses`` is left as by `loss_and_grads`.
        """
        tokens, targets = self._checked_pair(tokens, targets)
        parts = self._split(tokens)
        forwards = self._forwards(parts, [{}] * len(parts))

        def part(forward: Forward, targets: Array) -> Array:
            logits, _ = self.ops.linear(forward.hidden, self._head())  # (N, V)
            return self._log_probs(logits.reshape(*targets.shape, -1), targets)

        def backward(dlog_probs: Array) -> dict[str, Array]:
            return self._backwards(forwards, targets, None, None, lengths, dlog_probs)[1]

        log_probs = workers.run(part, forwards, self._split(targets), workers=self.num_workers)
        return np.concatenate(log_probs), backward

    def _log_probs(self, logits: Any, targets: Array) -> Array:
        """Return Σ log p over the counted targets of each sequence, (B,), from logits (B, T, V)."""
        apart = [self.place(of_sequence.copy()) for of_sequence in logits]  # a kernel's array starts on 16 bytes
        means = [self.ops.cross_entropy(rows, self._ids(row))[0] for rows, row in zip(apart, targets)]
        return -np.array([self._number(mean) for mean in means]) * np.count_nonzero(targets != IGNORED, axis=1)

    def _forwards(self, parts: list[Array], draws: list[dict[int, Draws]]) -> list[Forward]:
        """Run the forward pass of the parts of a batch, with noise and capacity where there are draws."""
        if not isinstance(self.params, dict):
            raise InputError("a memory-mapped model only reads its weights: load it without mmap to train it")
        rotation = self._rotation(np.arange(parts[0].shape[1]))
        return workers.run(
            lambda part, of_part: self._forward(part, rotation, of_part), parts, draws, workers=self.num_workers
        )

    def _backwards(
        self,
        forwards: list[Forward],
        targets: Array,
        aux_loss_coef: float | None,
        z_loss_coef: float | None,
        lengths: Array | None = None,
        dlog_probs: Array | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """Return the loss and the gradients of a batch from its forward passes; fill ``losses``.

        With ``dlog_probs`` the gradients are of the loss that they come from in place of the cross-entropy.
        """
        aux = self.config.aux_loss_coef if aux_loss_coef is None else aux_loss_coef
        z = self.config.z_loss_coef if z_loss_coef is None else z_loss_coef
        if not (0 <= aux < np.inf and 0 <= z < np.inf):
            raise InputError(f"aux_loss_coef is {aux} and z_loss_coef {z}; give finite numbers of at least 0")
        shares = self._shares(targets, lengths, dlog_probs)
        load = self._load(forwards, shares)
        parts = workers.run(
            lambda forward, share: self._backward(forward, share, load, aux, z),
            *(forwards, shares),
            workers=self.num_workers,
        )
        terms = [losses for losses, _ in parts]
        self.losses = Losses(
            float(sum(t.cross_entropy for t in terms)),
            sum(t.switch for t in terms),
            sum(t.z for t in terms),
            np.zeros((self.config.n_layers, self.config.num_experts)),
            sum(t.dropped for t in terms),
        )
        for layer, of_layer in load.items():
            self.losses.load[layer] = self.host(of_layer)
        balance = aux * float(self.losses.switch.sum()) + z * float(self.losses.z.sum())
        loss = self.losses.cross_entropy + balance / max(1, len(load))
        return loss, self._sum([grads for _, grads in parts])

    def _backward(
        self,
        forward: Forward,
        share: Share,
        load: dict[int, Any],
        aux: float,
        z: float,
    ) -> tuple[Losses, dict[str, Array]]:
        """Return one part's share of the loss terms, and of the gradient of the whole loss.

        The loss terms are read at the end: until then a device need not wait for the host.
        """
        ops, with_experts = self.ops, self.config.moe_layers
        grads: dict[str, Array] = {}
        logits, head = ops.linear(forward.hidden, self._head())  # (N, V)
        cross_entropy, saved = ops.cross_entropy(logits, self._ids(share.targets))
        dhidden, dhead = ops.linear_backward(self._dlogits(saved, share), head)
        switch: list[Any] = [0.0] * self.config.n_layers
        z_terms: list[Any] = [0.0] * self.config.n_layers
        dropped = [getattr(saved_block.ffn, "dropped", 0.0) for saved_block in forward.blocks]
        backward_of_moe = ops.moe_backward if is_plain(self.config) else ops.varied_moe_backward
        dx, grads["norm"] = ops.rmsnorm_backward(dhidden, forward.norm)
        for layer in reversed(range(self.config.n_layers)):
            saved_block, dlogits, moe_backward = forward.blocks[layer], None, None
            if layer in with_experts:
                moe_backward = backward_of_moe
                every = saved_block.ffn.routing.logits  # (N, E)
                router_logits = self.place(_taken(every, share.rows))
                switch[layer], saved = ops.switch_loss(router_logits, load[layer])
                dlogits = ops.switch_loss_backward(aux * share.of_tokens / len(with_experts), saved)
                if z:
                    z_terms[layer], saved = ops.z_loss(router_logits)
                    dlogits += ops.z_loss_backward(z * share.of_tokens / len(with_experts), saved)
                if share.rows is not None:  # padding has no part in these losses
                    whole = every * 0
                    whole[share.rows] = dlogits
                    dlogits = self.place(whole)
            dx, block_grads = block_backward(ops, dx, dlogits, saved_block, moe_backward)
            grads |= {f"layers.{layer}.{name}": grad for name, grad in block_grads.items()}
        grads["tok_embeddings"] = ops.embedding_backward(dx, forward.embedding)
        if self.config.tie_embeddings:
            grads["tok_embeddings"] += dhead
        else:
            grads["output"] = dhead
        self._check_finite(forward.blocks)
        of_layers = [
            np.array([self._number(term) for term in terms]) * share.of_tokens for terms in (switch, z_terms, dropped)
        ]
        loss = self._number(cross_entropy) * share.of_targets
        return Losses(loss, of_layers[0], of_layers[1], np.empty(0), of_layers[2]), grads

    def _dlogits(self, saved: Any, share: Share) -> Any:
        """Return the gradient of a part's logits (N, V): by the mean cross-entropy, or by the log-probabilities."""
        if share.dlog_probs is None:
            return self.ops.cross_entropy_backward(share.of_targets, saved)
        # A row's log-probability is minus its cross-entropy: undo the mean, and weigh each row as its sequence.
        dlogits = self.ops.cross_entropy_backward(float(np.count_nonzero(share.targets != IGNORED)), saved)
        of_rows = np.repeat(-share.dlog_probs, share.targets.shape[1])[:, None]  # (N, 1)
        return dlogits * self.place(of_rows.astype(dlogits.dtype))

    # The batch over the workers.

    def _split(self, batch: Array) -> list[Array]:
        """Cut (B, T) into one part per worker, but none so small that handing over costs more than it saves."""
        worthwhile = max(1, batch.size * self.config.dim // LEAST_PART)
        return np.array_split(batch, min(self.num_workers, len(batch), worthwhile))

    def _shares(self, targets: Array, lengths: Array | None, dlog_probs: Array | None) -> list[Share]:
        """Cut a batch's targets, and what else belongs to its sequences, as `_split` cuts its tokens."""
        parts, T = self._split(targets), targets.shape[1]
        rows: list[Any] = [None] * len(parts)
        if lengths is not None:
            lengths = np.asarray(lengths)
            if lengths.shape != targets.shape[:1] or not ((lengths >= 1) & (lengths <= T)).all():
                raise InputError(f"lengths must be {len(targets)} numbers from 1 to {T}; got {lengths.tolist()}")
            real = np.arange(T) < lengths[:, None]  # (B, T)
            rows = [self.place(np.flatnonzero(part)) for part in np.array_split(real, len(parts))]
        weights: list[Array | None] = [None] * len(parts)
        if dlog_probs is not None:
            weights = list(np.array_split(dlog_probs, len(parts)))
        counts = [np.count_nonzero(part != IGNORED) for part in parts]
        tokens = [part.size if of is None else len(of) for part, of in zip(parts, rows)]
        return [
            Share(part, of_rows, of_weights, count / sum(counts), size / sum(tokens))
            for part, of_rows, of_weights, count, size in zip(parts, rows, weights, counts, tokens)
        ]

    def _draws(self, parts: list[Array]) -> list[dict[int, Draws]]:
        """Return for each part of the batch its share of each layer's random numbers, by layer.

        The batch is their seed: the same tokens meet the same noise, however often and wherever they are computed.
        """
        if is_plain(self.config):
            return [{}] * len(parts)
        ends = np.cumsum([part.size for part in parts])
        seed = zlib.crc32(np.concatenate([part.ravel() for part in parts]).astype(np.int64).tobytes())
        draws = {layer: draw(self.config, seed, layer, ends[-1]) for layer in self.config.moe_layers}

        def share(rows: slice) -> dict[int, Draws]:
            return {
                layer: Draws(*(None if drawn is None else drawn[rows] for drawn in of_layer))
                for layer, of_layer in draws.items()
            }

        return [share(slice(end - part.size, end)) for end, part in zip(ends, parts)]

    def _load(self, forwards: list[Forward], shares: list[Share]) -> dict[int, Any]:
        """Return the load (E,) of the whole batch, by layer that has experts."""
        load = {}
        for layer in self.config.moe_layers:
            parts = [_taken(f.blocks[layer].ffn.routing.experts, share.rows) for f, share in zip(forwards, shares)]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            load[layer] = self.ops.expert_load(whole, self.config.num_experts)
        return load

    def _sum(self, parts: list[dict[str, Array]]) -> dict[str, Array]:
        """Return the sum of the parts' gradients, in the order of the workers and under the order of ``params``."""
        total, *others = parts

        def add(names: list[str]) -> None:
            for name in names:
                for part in others:
                    total[name] += part[name]

        names = list(total)
        if others:
            workers.run(add, [names[i :: self.num_workers] for i in range(self.num_workers)], workers=self.num_workers)
        # A bias only selects, and noise that was not drawn has no scale to learn: no component gives their gradients.
        apart = {n: np.zeros_like(p) for n, p in self.params.items() if n.endswith(("moe.bias", "moe.noise"))}
        total = apart | total
        return {name: total[name] for name in self.params}

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


def _taken(array: Any, rows: Any) -> Any:
    """Return the rows of an array; None: all."""
    return array if rows is None else array[rows]


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
