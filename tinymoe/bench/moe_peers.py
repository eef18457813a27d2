"""The peers of `tinymoe bench moe`: the expert block in torch and in transformers, on the same data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tinymoe.bench.moe import Batch, Passes, Weights
from tinymoe.cuda import device


class Tensors:
    """A batch and the weights as torch's tensors, w1 above w3 as in transformers, and ways to compute the block."""

    def __init__(self, weights: Weights, batch: Batch):
        self.x, self.dy, self.experts, self.mixing = map(tensor, batch)
        w1, w2, w3 = map(tensor, weights)
        self.w13, self.w2 = torch.cat([w1, w3], dim=1), w2  # (E, 2F, D), (E, D, F)

    def grouped_mm(self, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        """Compute the block around torch's grouped_mm, the sort and the mixing in torch as well."""
        (N, k), E = self.experts.shape, len(w2)
        flat = self.experts.flatten()
        order = torch.argsort(flat, stable=True)
        ends = torch.cumsum(torch.bincount(flat, minlength=E), 0).to(torch.int32)
        both = torch.nn.functional.grouped_mm(x[order // k], w13.transpose(-2, -1), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        out = torch.nn.functional.grouped_mm(hidden, w2.transpose(-2, -1), offs=ends)
        by_choice = torch.empty_like(out).index_copy(0, order, out).view(N, k, -1)
        return (by_choice * self.mixing[:, :, None].to(out.dtype)).sum(dim=1)

    def transformers(self, way: str) -> Callable[..., torch.Tensor]:
        """Return transformers' module for the experts, with one of its implementations."""
        E, width, D = self.w13.shape
        config = transformers.MixtralConfig(
            hidden_size=D, intermediate_size=width // 2, num_local_experts=E, num_experts_per_tok=self.experts.shape[1]
        )
        config._experts_implementation = way
        with torch.device("meta"):
            module: Any = MixtralExperts(config)
        experts = self.experts.long()

        def block(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
            values = {"gate_up_proj": w13, "down_proj": w2}
            y: torch.Tensor = torch.func.functional_call(module, values, (x, experts, self.mixing.to(x.dtype)))
            return y

        return block

    def passes(self, block: Callable[..., torch.Tensor]) -> Passes:
        """Return the forward without a gradient, and forward and backward by torch's automatic one."""

        def forward() -> Any:
            with torch.no_grad():
                return array(block(self.x, self.w13, self.w2))

        def both() -> Any:
            inputs = [t.detach().requires_grad_() for t in (self.x, self.w13, self.w2)]
            y = block(*inputs)
            torch.autograd.grad(y, inputs, self.dy)
            return array(y.detach())

        return {"forward": forward, "both": both}


def contestants(weights: Weights, batch: Batch) -> dict[str, Passes]:
    """Return torch's and transformers' passes; batched_mm copies an expert's weights for every pair, so of few only."""
    tensors = Tensors(weights, batch)
    ways = ["grouped_mm", "eager"] + ["batched_mm"] * (batch.experts.size <= 32)
    found = {"torch grouped_mm": tensors.passes(tensors.grouped_mm)}
    return found | {f"transformers {way}": tensors.passes(tensors.transformers(way)) for way in ways}


def tensor(array: Any) -> torch.Tensor:
    """Return an array of the device as a tensor of the same memory."""
    if array.dtype == device.BFLOAT16:
        return torch.utils.dlpack.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.utils.dlpack.from_dlpack(array)


def array(tensor: torch.Tensor) -> Any:
    """Return a bfloat16 tensor as an array of the device, of the same memory."""
    bits = tensor.contiguous().view(torch.int16)
    if device.current() == "gpu":
        import cupy

        return cupy.from_dlpack(bits).view(device.BFLOAT16)
    return bits.numpy().view(device.BFLOAT16)
