"""The components again, as raw CUDA kernels: on a GPU through CuPy, on any CPU through the emulator.

The same functions as in `tinymoe.reference`, on arrays of `tinymoe.cuda.device`, in float32 and bfloat16. What the
reference returns as a Python number is here an array of one element on the device, so that the host waits once a step.
"""

from tinymoe.cuda import decode as decode
from tinymoe.cuda import device as device
from tinymoe.cuda.attention import attention, attention_backward, attention_decode
from tinymoe.cuda.balance import (
    expert_load,
    hf_load_balancing_loss,
    switch_loss,
    switch_loss_backward,
    z_loss,
    z_loss_backward,
)
from tinymoe.cuda.dispatch import combine, combine_backward, dispatch, drop_overflow, gather, gather_backward
from tinymoe.cuda.embedding import embedding, embedding_backward
from tinymoe.cuda.experts import expert_ffn, expert_ffn_backward, ffn, ffn_backward, swiglu, swiglu_backward
from tinymoe.cuda.linear import linear, linear_backward
from tinymoe.cuda.loss import cross_entropy, cross_entropy_backward
from tinymoe.cuda.moe import moe, moe_backward, moe_decode
from tinymoe.cuda.optimizer import AdamW, adamw
from tinymoe.cuda.rmsnorm import rmsnorm, rmsnorm_backward
from tinymoe.cuda.rope import rope, rope_backward, rope_table
from tinymoe.cuda.router import expert_choice, expert_choice_backward, route, route_backward
from tinymoe.cuda.variation import (
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
    "rmsnorm",
    "rmsnorm_backward",
    "rope",
    "rope_backward",
    "rope_table",
    "route",
    "route_backward",
    "router_noise",
    "router_noise_backward",
    "swiglu",
    "swiglu_backward",
    "switch_loss",
    "switch_loss_backward",
    "varied_moe",
    "varied_moe_backward",
    "z_loss",
    "z_loss_backward",
]
