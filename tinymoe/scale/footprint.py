"""What a model takes: parameters by part, bytes of memory, FLOP per token, and what a decoding step reads.

Arithmetic on the config alone, so it is as quick at 141 billion parameters as at one. Bytes are decimal (1 GB = 10⁹),
a multiply-add is two FLOP. The letters are the design's: B batch, T context, D dim, H query heads, G key/value heads,
K head_dim, E experts, k experts per token, F hidden_dim, V vocabulary; L layers, and W = min(T, sliding window).
"""

from dataclasses import dataclass

from tinymoe.config import MixtralConfig

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of a number


@dataclass(frozen=True)
class Part:
    """One kind of parameter: ``copies`` blocks of ``each``, ``total`` in all, of which a token uses ``active``."""

    each: int
    copies: int
    total: int
    active: int


@dataclass(frozen=True)
class Parameters:
    """The parameters by part; ``feed_forward`` holds the experts, and the one block of each layer without."""

    embedding: Part
    output_head: Part
    attention: Part
    router: Part
    feed_forward: Part
    norms: Part
    total: int
    active: int


def count_parts(config: MixtralConfig) -> Parameters:
    """Return how many parameters are where: of 8x7B's 46.70 B, 45.10 B are experts.

    Embedding and output head D·V each (tied: once), attention 2·D·K·(H + G), router D·E (and what balances it), expert
    3·D·F, norm D.
    """
    D, L, M = config.dim, config.n_layers, len(config.moe_layers)
    assert config.head_dim is not None

    def part(each: int, copies: int, active: int | None = None) -> Part:
        return Part(each, copies, each * copies, each * (copies if active is None else active))

    parts = {
        "embedding": part(D * config.vocab_size, 1),
        "output_head": part(D * config.vocab_size, 0 if config.tie_embeddings else 1),
        "attention": part(2 * D * config.head_dim * (config.n_heads + config.n_kv_heads), L),
        "router": part(_router(config), M),
        "feed_forward": part(
            3 * D * config.hidden_dim, L - M + M * config.num_experts, L - M + M * config.top_k_experts
        ),
        "norms": part(D, 2 * L + 1),
    }
    total, active = (sum(getattr(part, column) for part in parts.values()) for column in ("total", "active"))
    return Parameters(**parts, total=total, active=active)


def weight_bytes(config: MixtralConfig, dtype: str) -> int:
    """Return the bytes of all parameters: 93.4 GB for 8x7B in bf16."""
    return config.count_parameters() * DTYPES[dtype]


def kv_bytes_per_token(config: MixtralConfig, dtype: str) -> int:
    """Return the bytes of one token's keys and values, 2·L·G·K numbers: 131 kB for 8x7B in bf16."""
    assert config.head_dim is not None
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * DTYPES[dtype]


def kv_cache_bytes(config: MixtralConfig, batch: int, context: int, dtype: str) -> int:
    """Return the bytes of the KV cache, B·W tokens: 4.29 GB for 8x7B in bf16, batch 1 and its whole context."""
    return batch * _attended(config, context) * kv_bytes_per_token(config, dtype)


def decode_flops(config: MixtralConfig, context: int) -> int:
    """Return the FLOP of decoding one token, the last of ``context``.

    2 × the active parameters that multiply (attention, router, chosen experts, output head) + 4·L·H·K·W for scores and
    values. The embedding is looked up, not multiplied; norms, rotary positions and softmax are left out as minor.
    """
    return _weight_flops(config) + _flops_per_key(config) * _attended(config, context)


def prefill_flops(config: MixtralConfig, context: int) -> float:
    """Return the FLOP per token of a causal forward pass over ``context`` tokens, with logits for every one.

    As for decoding, but over the keys that the average token attends to: W − W·(W − 1)/2T, which is (T + 1)/2 without
    a window.
    """
    window = _attended(config, context)
    return _weight_flops(config) + _flops_per_key(config) * (window - window * (window - 1) / (2 * context))


def training_flops(config: MixtralConfig, context: int) -> float:
    """Return the FLOP per token of forward and backward: 3 × the forward, each product of which has two gradients."""
    return 3 * prefill_flops(config, context)


def experts_touched(config: MixtralConfig, batch: int) -> float:
    """Return how many distinct experts of a layer a decoding step is expected to use.

    E·(1 − (1 − k/E)^B), where tokens choose independently and all experts alike. A dense layer is one expert.
    """
    E = config.num_experts
    return E * (1 - (1 - config.top_k_experts / E) ** batch) if E else 1.0


def decode_bytes(config: MixtralConfig, batch: int, context: int, dtype: str) -> float:
    """Return the bytes that one decoding step reads: once the weights that any token uses, and the KV cache.

    The weights are the experts touched and every other part but the embedding, of which B rows are next to nothing;
    tied to the output head, it is read as that.
    """
    parts = count_parts(config)
    shared = parts.total - parts.feed_forward.total - parts.output_head.total  # keeps one (V, D) table: the head
    M = len(config.moe_layers)
    experts = (config.n_layers - M + M * experts_touched(config, batch)) * parts.feed_forward.each
    return (shared + experts) * DTYPES[dtype] + kv_cache_bytes(config, batch, context, dtype)


def decode_intensity(config: MixtralConfig, batch: int, context: int, dtype: str) -> float:
    """Return the FLOP of a decoding step per byte that it reads.

    Below a device's own ratio of FLOP/s to bytes/s, decoding waits for memory: below 206 on an H200.
    """
    return batch * decode_flops(config, context) / decode_bytes(config, batch, context, dtype)


def _router(config: MixtralConfig) -> int:
    gate = config.dim * config.num_experts
    return gate * (2 if config.noisy_top_k else 1) + (config.num_experts if config.bias_update_rate else 0)


def _attended(config: MixtralConfig, context: int) -> int:
    return min(context, config.sliding_window or context)


def _weight_flops(config: MixtralConfig) -> int:
    parts = count_parts(config)
    head = parts.embedding.each  # tied or not
    return 2 * (parts.attention.active + parts.router.active + parts.feed_forward.active + head)


def _flops_per_key(config: MixtralConfig) -> int:
    assert config.head_dim is not None
    return 4 * config.n_layers * config.n_heads * config.head_dim
