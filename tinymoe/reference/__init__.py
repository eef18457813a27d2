"""Every component in readable NumPy, its forward above its hand-derived backward.

One alphabet for shapes: B batch, T time, N = B·T tokens, D dim, H query heads, G key/value heads, K head_dim,
E experts, k experts per token, F hidden_dim, V vocabulary, S slots (in attention: keys). All functions take
float32 or float64 and return what they were given.
"""

from tinymoe.reference.attention import attention, attention_backward, attention_decode, attention_plain
from tinymoe.reference.balance import (
    expert_load,
    hf_load_balancing_loss,
    switch_loss,
    switch_loss_backward,
    z_loss,
    z_loss_backward,
)
from tinymoe.reference.decode import block_decode
from tinymoe.reference.dispatch import combine, combine_backward, dispatch, drop_overflow, gather, gather_backward
from tinymoe.reference.embedding import embedding, embedding_backward
from tinymoe.reference.experts import expert_ffn, expert_ffn_backward, ffn, ffn_backward, swiglu, swiglu_backward
from tinymoe.reference.linear import linear, linear_backward
from tinymoe.reference.loss import cross_entropy, cross_entropy_backward
from tinymoe.reference.moe import moe, moe_backward, moe_decode, moe_naive
from tinymoe.reference.optimizer import AdamW, adamw
from tinymoe.reference.rmsnorm import rmsnorm, rmsnorm_backward
from tinymoe.reference.rope import rope, rope_backward, rope_table
from tinymoe.reference.router import expert_choice, expert_choice_backward, route, route_backward
from tinymoe.reference.softmax import softmax
from tinymoe.reference.variation import (
    Variation,
    router_noise,
    router_noise_backward,
    varied_moe,
    varied_moe_backward,
)

__all__ = [
    "AdamW",
    "Variation",
    "adamw",
    "attention",
    "attention_backward",
    "attention_decode",
    "attention_plain",
    "block_decode",
    "combine",
    "combine_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "dispatch",
    "drop_overflow",
    "embedding",
    "embedding_backward",
    "expert_choice",
    "expert_choice_backward",
    "expert_ffn",
    "expert_ffn_backward",
    "expert_load",
    "ffn",
    "ffn_backward",
    "gather",
    "gather_backward",
    "hf_load_balancing_loss",
    "linear",
    "linear_backward",
    "moe",
    "moe_backward",
    "moe_decode",
    "moe_naive",
    "rmsnorm",
    "rmsnorm_backward",
    "rope",
    "rope_backward",
    "rope_table",
    "route",
    "route_backward",
    "router_noise",
    "router_noise_backward",
    "softmax",
    "swiglu",
    "swiglu_backward",
    "switch_loss",
    "switch_loss_backward",
    "varied_moe",
    "varied_moe_backward",
    "z_loss",
    "z_loss_backward",
]
