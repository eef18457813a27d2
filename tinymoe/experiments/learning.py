"""What the experiments share: a small model that learns in memory, and is looked at on the way."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinymoe import corpora, training
from tinymoe.config import MixtralConfig
from tinymoe.data import Batches
from tinymoe.model import Mixtral
from tinymoe.reference import AdamW
from tinymoe.tokenizer import ByteTokenizer

Array = np.ndarray
Observe = Callable[[int, Mixtral, dict[str, Any]], None]  # step, model, the step's line of the metrics


def text(quick: bool) -> tuple[Array, dict[str, list[Array]]]:
    """Return training tokens, and held-out ones by domain: the standard library's bytes, in quick mode drawn ones."""
    corpus, tokenizer = corpora.synthetic(0, 8192) if quick else corpora.standard_library(), ByteTokenizer()
    return corpus.train_tokens(tokenizer), corpus.held_out_tokens(tokenizer)


def micro(**changes: Any) -> MixtralConfig:
    """Return the model of the quick modes."""
    shape = dict(dim=32, n_layers=2, hidden_dim=32, n_heads=2, n_kv_heads=1, vocab_size=256)
    return MixtralConfig(**(shape | changes))


def learn(
    config: MixtralConfig,
    tokens: Array,
    options: training.Options,
    observe: Observe = lambda step, model, line: None,
    provoke: Callable[[Mapping[str, Array]], None] = lambda params: None,
) -> Mixtral:
    """Train a model from scratch on tokens (n,), and return it.

    Parameters
    ----------
    config, options
        Of the model and the run; ``eval_every`` and ``save_every`` mean nothing here.
    observe
        Called after every step.
    provoke
        Changes the weights before the first step.
    """
    model = Mixtral.init(config, options.seed)
    provoke(model.params)
    take_step = stepper(model, tokens, options)
    for step in range(1, options.steps + 1):
        observe(step, model, take_step())
    return model


def stepper(model: Mixtral, tokens: Array, options: training.Options) -> Callable[[], dict[str, Any]]:
    """Return a function that takes the next training step and returns its line of the metrics."""
    optimizer = AdamW(model.params, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay)
    batches = Batches(tokens, options.batch_size, options.seq_len, options.seed)
    task = training.Task(batches, training.of_text, lambda model: {})
    return lambda: training.take_step(model, optimizer, task, options)
