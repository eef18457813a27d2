"""Mixtral, the model: opened and saved, run on tokens, and learning from batches that are cut over workers."""

import os
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from tinymoe import workers
from tinymoe.balance import Draws, is_plain
from tinymoe.cache import KVCache
from tinymoe.checks import (
    Params,
    check_backend,
    check_params,
    check_tokens,
    checked_dtype,
    checked_pair,
    checked_tokens,
)
from tinymoe.config import MixtralConfig
from tinymoe.data_parallel import draw_for_parts, load_of_batch, share_out, sum_gradients
from tinymoe.decoder import Decoder, Forward, Losses
from tinymoe.errors import InputError
from tinymoe.reference.loss import IGNORED

Array = np.ndarray
LEAST_PART = 2**16  # elements (tokens · dim) of a worker's part: with fewer, threads mostly wait for the interpreter


class Mixtral(Decoder):
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
        check_backend(backend)
        check_params(config, params, backend)
        if num_workers is not None and num_workers < 1:
            raise InputError(f"num_workers is {num_workers}; give at least 1")
        super().__init__(config, params, backend)
        self.num_workers = (num_workers or workers.usable_cores()) if backend == "reference" else 1
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
        check_backend(backend)
        to = checked_dtype(dtype, backend)
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

        check_backend(backend)
        config, params = checkpoint.load(directory, checked_dtype(dtype, backend), mmap=mmap)
        return cls(config, params, backend, num_workers)

    def save_pretrained(self, directory: str | os.PathLike[str], eos_token: int | None = None) -> None:
        """Write config.json and model.safetensors in transformers' layout; each is replaced whole or not at all.

        ``eos_token`` is what config.json then says ends a text.
        """
        from tinymoe import checkpoint

        params = self.params if self.backend == "reference" else {n: self.host(p) for n, p in self.params.items()}
        checkpoint.save(directory, params, self.config, eos_token=eos_token)

    # Logits.

    @workers.kept_memory()
    def __call__(self, tokens: Array) -> Array:
        """Return the logits (B, T, V) of the token after each of tokens (B, T).

        Memory is O(T): nothing is kept for a backward pass.
        """
        return self.host(self._logits(checked_tokens(tokens, self.config.vocab_size)))

    def cache(self, capacity: int) -> KVCache:
        """Return an empty cache for a sequence of up to so many tokens."""
        return KVCache(self.config, capacity, self.dtype, self.ops.device.empty if self.backend == "cuda" else np.empty)

    def extend(self, sequences: list[Array], caches: list[KVCache]) -> tuple[Array, list[Array]]:
        """Feed new tokens to sequences whose past is in their caches, one cache each, which grow by them.

        The sequences may differ in length, past and new: their rows are packed one after the other, without padding,
        and only attention looks at each apart. On the CUDA backend one new token of each is a step that is recorded and
        then repeated, `tinymoe.cuda.decode.Step`.

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
        if len(packed) == 1 and self.backend == "reference" and is_plain(self.config):
            return self._decode(packed, caches[0])
        if len(packed) == len(sequences) and self.backend == "cuda":
            return self._step(packed, caches)
        return self._extend(packed, sequences, caches)

    def _decode(self, token: Array, cache: KVCache) -> tuple[Array, list[Array]]:
        """Do what `extend` does for one token, on vectors."""
        config, ops, chosen = self.config, self.ops, []
        x = ops.embedding(token, self.params["tok_embeddings"])[0][0]  # (D,)
        rotation = self._rotation(np.array([cache.length]))
        for layer in range(config.n_layers):

            def weights(name: str, layer: int = layer) -> Array:
                return self.params[f"layers.{layer}.{name}"]

            def attend(q: Array, k: Array, v: Array, layer: int = layer) -> Array:
                return ops.attention_decode(q, *cache.update(layer, k, v))

            top_k = config.top_k_experts if config.has_experts(layer) else 0
            try:
                x, experts = ops.block_decode(x, weights, rotation, attend, config.norm_eps, top_k)
            except FloatingPointError as error:
                raise FloatingPointError(f"layer {layer}: {error}") from None
            if experts is not None:
                chosen.append(experts[None])
        cache.advance(1)
        x, _ = ops.rmsnorm(x[None], self.params["norm"], config.norm_eps)
        return ops.linear(x, self._head())[0], chosen

    def _step(self, tokens: Array, caches: list[KVCache]) -> tuple[Array, list[Array]]:
        """Do what `extend` does for one token of each sequence, by launches that are recorded once for these caches."""
        for cache in caches:
            cache.check_room(1)
        if caches[0].step is None or not caches[0].step.serves(caches, self.params.values()):
            self._record(caches)
        found = caches[0].step(tokens, [cache.length for cache in caches])
        logits, experts, not_finite = (self.host(array).copy() for array in found)  # the next step overwrites them
        for cache in caches:
            cache.advance(1)
        self._check_flags(not_finite)
        return logits, list(experts)

    def _record(self, caches: list[KVCache]) -> None:
        """Make the step of decoding of these caches, which know it from then on."""
        config = self.config
        rotations = self._rotation(np.arange(max(cache.capacity for cache in caches)))
        routed = len(config.moe_layers), config.num_experts if config.expert_choice else config.top_k_experts
        moes = [self._moe(layer, few=True) for layer in range(config.n_layers)]
        forward = partial(self._forward_step, moes, self._head())
        self.ops.decode.Step(caches, rotations, routed, forward, self.params.values())

    @workers.kept_memory()
    def _extend(self, packed: Array, sequences: list[Array], caches: list[KVCache]) -> tuple[Array, list[Array]]:
        """Do what `extend` does: ``packed`` are its sequences one after the other."""
        ends = list(accumulate(len(tokens) for tokens in sequences))
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
            moe = self._moe(layer, few=self.backend == "cuda")
            x, saved = self._block(layer, x, (1, len(packed)), rotation, partial(attend, layer), moe)
            blocks.append(saved)
        for tokens, cache in zip(sequences, caches):
            cache.advance(len(tokens))
        x, _ = self.ops.rmsnorm(x[self.place(np.array(ends) - 1)], self.params["norm"], self.config.norm_eps)
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
        tokens = checked_tokens(tokens, self.config.vocab_size)
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

    # Losses and their gradients.

    def loss(self, tokens: Array, targets: Array) -> float:
        """Return the mean cross-entropy in nats over the targets (B, T) that are not −100, without gradients."""
        tokens, targets = checked_pair(tokens, targets, self.config.vocab_size)

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
        tokens, targets = checked_pair(tokens, targets, self.config.vocab_size)
        parts = self._split(tokens)
        forwards = self._forwards(parts, draw_for_parts(self.config, parts))
        return self._backwards(forwards, targets, aux_loss_coef, z_loss_coef, lengths)

    def log_probs(self, tokens: Array, targets: Array) -> Array:
        """Return the log-probability of each sequence's targets, (B,): Σ log p over those that are not −100."""
        tokens, targets = checked_pair(tokens, targets, self.config.vocab_size)

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
        tokens, targets = checked_pair(tokens, targets, self.config.vocab_size)
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
        shares = share_out(self._split(targets), lengths, dlog_probs, self.place)
        load = load_of_batch(self.ops, self.config, forwards, shares)
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
        return loss, sum_gradients([grads for _, grads in parts], self.params, self.num_workers)

    def _split(self, batch: Array) -> list[Array]:
        """Cut (B, T) into one part per worker, but none so small that handing over costs more than it saves."""
        worthwhile = max(1, batch.size * self.config.dim // LEAST_PART)
        return np.array_split(batch, min(self.num_workers, len(batch), worthwhile))
