"""The decoder over a backend: embedding, blocks, last norm and head of one part of a batch; forward above backward."""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tinymoe.balance import Draws, is_plain
from tinymoe.block import Attend, BlockSaved, Weights, block, block_backward
from tinymoe.checks import Params
from tinymoe.config import MixtralConfig
from tinymoe.errors import InputError
from tinymoe.reference.loss import IGNORED

Array = np.ndarray


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

    def without_padding(self, array: Any) -> Any:
        """Return the rows of an array, one per token, that are no padding."""
        return array if self.rows is None else array[self.rows]


class Losses(NamedTuple):
    """The terms of a loss, apart."""

    cross_entropy: float
    switch: Array  # (L,) per layer, unweighted; 0 in a layer without experts, as all that follow
    z: Array  # (L,) per layer, unweighted; zeros when its coefficient is 0
    load: Array  # (L, E) fraction of the assignments that went to each expert
    dropped: Array  # (L,) fraction of the assignments that their expert had no room for


class Decoder:
    """The parameters on a backend, and the pass of one part of a batch through them and back.

    Parameters
    ----------
    config
        The shape.
    params
        That fit it, of a dtype that the backend takes.
    backend
        ``"reference"`` or ``"cuda"``.
    """

    def __init__(self, config: MixtralConfig, params: Params, backend: str):
        self.config = config
        self.backend = backend
        self.ops: Any = importlib.import_module(f"tinymoe.{backend}")
        self.params = params
        if backend == "cuda":
            if not isinstance(params, dict):
                raise InputError(
                    "a memory-mapped model runs on the reference: load it without mmap for the CUDA backend"
                )
            self.params = {name: self.place(p) for name, p in params.items()}
        self.dtype = params["norm"].dtype

    # Arrays: NumPy's for the reference, the device's for kernels.

    def place(self, array: Any, dtype: Any = None) -> Any:
        """Return a host array as the backend's, as ``dtype`` if given."""
        return self.ops.device.array(array, dtype) if self.backend == "cuda" else np.asarray(array)

    def host(self, array: Any) -> Array:
        """Return an array of the backend as NumPy's."""
        return self.ops.device.host(array) if self.backend == "cuda" else array

    # Forward.

    def _logits(self, tokens: Array) -> Any:
        x, _ = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])  # (N, D)
        rotation = self._rotation(np.arange(tokens.shape[1]))
        for layer in range(self.config.n_layers):
            x, _ = self._block(layer, x, tokens.shape, rotation, self._attend, self._moe(layer))
        x, _ = self.ops.rmsnorm(x, self.params["norm"], self.config.norm_eps)
        logits, _ = self.ops.linear(x, self._head())  # (N, V)
        return logits.reshape(*tokens.shape, -1)

    def _forward(self, tokens: Array, rotation: Array, draws: Mapping[int, Draws]) -> Forward:
        x, embedding_saved = self.ops.embedding(self._ids(tokens), self.params["tok_embeddings"])  # (N, D)
        blocks = []
        for layer in range(self.config.n_layers):
            moe = self._moe(layer, draws.get(layer))
            x, saved = self._block(layer, x, tokens.shape, rotation, self._attend, moe)
            blocks.append(saved)
        hidden, norm_saved = self.ops.rmsnorm(x, self.params["norm"], self.config.norm_eps)
        return Forward(embedding_saved, blocks, norm_saved, hidden)

    def _block(
        self, layer: int, x: Array, shape: tuple[int, int], rotation: Array, attend: Attend, moe: Any
    ) -> tuple[Array, BlockSaved]:
        try:
            return block(self.ops, self.config, self._weights(layer), x, shape, rotation, attend, moe)
        except FloatingPointError as error:
            raise FloatingPointError(f"layer {layer}: {error}") from None

    def _weights(self, layer: int) -> Weights:
        return lambda name: self.params[f"layers.{layer}.{name}"]

    def _forward_step(
        self, moes: list[Any], head: Any, components: Any, tokens: Any, rotation: Any, attend: Any
    ) -> tuple[Any, list[Any]]:
        """Launch a step of decoding with each layer's mixture; see the ``forward`` of `tinymoe.cuda.decode.Step`."""
        x, _ = components.embedding(tokens, self.params["tok_embeddings"])  # (N, D)
        shape, routings = (1, len(tokens)), []
        for layer, moe in enumerate(moes):
            weights, attend_here = self._weights(layer), partial(attend, layer)
            x, saved = block(components, self.config, weights, x, shape, rotation, attend_here, moe)
            if moe:
                routings.append(saved.ffn.routing)
        x, _ = components.rmsnorm(x, self.params["norm"], self.config.norm_eps)
        return components.linear(x, head)[0], routings

    def _moe(self, layer: int, draws: Draws | None = None, few: bool = False) -> Any:
        """Return a layer's mixture, or None where it has no experts.

        Noise and capacity are for training, which is where there are draws. ``few``: the kernels for few tokens.
        """
        config = self.config
        if not config.has_experts(layer):
            return None
        if is_plain(config):
            return self.ops.moe_decode if few else self.ops.moe
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
        if self.backend == "cuda":
            self._check_flags([blocks[layer].ffn.routing.not_finite for layer in self.config.moe_layers])

    def _check_flags(self, flags: Any) -> None:
        """Raise it by the flags of the layers that have experts."""
        for layer, flag in zip(self.config.moe_layers, flags):
            if self.host(flag).any():
                raise FloatingPointError(f"layer {layer}: the router's logits are not finite")

    # Backward.

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
                router_logits = self.place(share.without_padding(every))
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
