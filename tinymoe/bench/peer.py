"""The peer of the model's benchmark: the same Mixtral in transformers, on torch, on the same cores."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from tinymoe.bench.timing import alternate
from tinymoe.config import MixtralConfig
from tinymoe.workers import usable_cores

MOST_GATHERED = 2**31  # bytes; batched_mm copies an expert's weights for every token, and keeps them for the backward


class Transformers:
    """A Mixtral of random weights in transformers.

    Parameters
    ----------
    config
        Its shape.
    tokens, targets
        The batch of a training step, (B, T) each.
    prompt, new
        Tokens of the prompt, and tokens to add, in decoding.
    """

    def __init__(self, config: MixtralConfig, tokens: np.ndarray, targets: np.ndarray, prompt: int, new: int):
        torch.set_num_threads(usable_cores())
        torch.manual_seed(0)
        hf = transformers.MixtralConfig(**config.to_hf() | {"output_router_logits": True, "pad_token_id": 0})
        self.model: Any = transformers.MixtralForCausalLM(hf)
        self.tokens, self.targets = torch.tensor(tokens), torch.tensor(targets)
        self.prompt, self.new = self.tokens[:1, :prompt], new
        expert = 3 * config.dim * config.hidden_dim * 4  # bytes
        self.gathered = tokens.size * config.top_k_experts * expert * config.n_layers

    def steps(self, rounds: int) -> dict[str, Callable[[], None]]:
        """Return a step with torch's default AdamW and one with its fused one, the experts run in the fastest way."""
        plain = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        fused = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

        def using(implementation: str, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
            def step() -> None:
                self.model.config._experts_implementation = implementation
                self._step(optimizer)

            return step

        ways = ["eager", "grouped_mm"]  # transformers' ways to run the experts
        if self.gathered <= MOST_GATHERED:
            ways.append("batched_mm")
        tried = alternate({name: using(name, plain) for name in ways}, rounds, warmup=1)
        best = min(tried, key=lambda name: statistics.median(tried[name]))
        return {f"transformers ({best})": using(best, plain), f"transformers ({best}, fused AdamW)": using(best, fused)}

    def decode(self) -> None:
        """Continue the prompt greedily over a KV cache."""
        with torch.no_grad():
            self.model.config.output_router_logits = False
            self.model.generate(self.prompt, max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False)
            self.model.config.output_router_logits = True

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        out = self.model(input_ids=self.tokens, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), self.targets.flatten())
        (loss + self.model.config.router_aux_loss_coef * out.aux_loss if out.aux_loss is not None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
