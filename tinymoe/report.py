"""What a run came to: its loss beside what it means, two samples, and the picture of the training."""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinymoe.data import Corpus, Document, held_out_windows
from tinymoe.generation import generate
from tinymoe.model import Mixtral
from tinymoe.tokenizer import Tokenizer
from tinymoe.training import evaluate

if TYPE_CHECKING:
    from rich.console import RenderableType

Array = np.ndarray
LARGEST_BIGRAM = 4096  # vocabulary; the table of counts has its square


class Yardsticks(NamedTuple):
    """What simpler models of the same text reach on a held-out domain, in nats per token."""

    uniform: float  # every token alike: ln V
    unigram: float  # its frequency in the training text
    bigram: float | None  # its frequency after the token before; None for a large vocabulary
    zlib: float | None  # the held-out text compressed, level 9; None unless tokens are bytes


class DomainLoss(NamedTuple):
    """A model's loss on a held-out domain, in nats per token, over all of its text."""

    loss: float
    tokens: int
    yardsticks: Yardsticks


def yardsticks(train: Array, documents: list[Array], text: bytes, vocab_size: int) -> Yardsticks:
    """Measure what uniform, unigram and bigram models and zlib make of held-out documents.

    The bigram's probability is (count(a, b) + p(b)) / (count(a) + 1): what was never seen falls back on the unigram.

    Parameters
    ----------
    train
        The training tokens, (n,).
    documents
        The held-out tokens of each document; its first is not predicted, as for the model.
    text
        The held-out text.
    vocab_size
        V.
    """
    before = np.concatenate([document[:-1] for document in documents]).astype(np.int64)
    after = np.concatenate([document[1:] for document in documents]).astype(np.int64)
    counts = np.bincount(train, minlength=vocab_size)
    p = (counts + 1) / (counts.sum() + vocab_size)  # (V,)
    unigram = float(-np.log(p[after]).mean())
    bigram = None
    if vocab_size <= LARGEST_BIGRAM:
        pairs = np.bincount(train[:-1].astype(np.int64) * vocab_size + train[1:], minlength=vocab_size**2)
        pairs = pairs.reshape(vocab_size, vocab_size)
        seen = pairs.sum(axis=1)
        bigram = float(-np.log((pairs[before, after] + p[after]) / (seen[before] + 1)).mean())
    compressed = 8 * math.log(2) * len(zlib.compress(text, 9)) / len(text) if vocab_size == 256 else None
    return Yardsticks(math.log(vocab_size), unigram, bigram, compressed)


def domain_losses(model: Mixtral, corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> dict[str, DomainLoss]:
    """Return the loss on every held-out domain, in windows of ``seq_len`` tokens, beside the yardsticks."""
    train = corpus.train_tokens(tokenizer)
    losses = {}
    for domain, documents in corpus.held_out_tokens(tokenizer).items():
        loss, tokens = evaluate(model, held_out_windows(documents, seq_len, batch_size=64))
        text = b"".join(document.text for document in corpus.held_out[domain])
        predicted = [document for document in documents if len(document) > 1]
        losses[domain] = DomainLoss(loss, tokens, yardsticks(train, predicted, text, model.config.vocab_size))
    return losses


def render(losses: Mapping[str, DomainLoss]) -> "RenderableType":
    """Return the losses as a table for rich."""
    from rich.table import Table

    table = Table(title="held-out loss, nats per token (lower is better)", title_justify="left", box=None)
    for column in ("text", "tokens", "this model", "uniform", "unigram", "bigram", "zlib"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for domain, (loss, tokens, simpler) in losses.items():
        others = ["" if value is None else f"{value:.2f}" for value in simpler]
        table.add_row(domain, f"{tokens:,}", f"[bold]{loss:.3f}[/bold]", *others)
    return table


def samples(model: Mixtral, corpus: Corpus, tokenizer: Tokenizer, seed: int = 0, tokens: int = 200) -> list[str]:
    """Return two texts that the model wrote on from the first words of held-out documents of its first two domains."""
    documents = [*corpus.held_out.values(), *corpus.held_out.values()][:2]
    prompts = [longest(of_domain).decode(errors="replace")[:32] for of_domain in documents]
    count = min(tokens, model.config.context_len // 2)
    ids = [tokenizer.encode(prompt)[:count] for prompt in prompts]
    texts = generate(model, ids, count, temperature=0.8, top_p=0.95, eos_token=tokenizer.eos_token, seed=seed)
    return [tokenizer.decode(text) for text in texts]


def longest(documents: Sequence[Document]) -> bytes:
    """Return the text of the longest document."""
    return max((document.text for document in documents), key=len)


def plot(lines: list[dict[str, Any]], path: Path, unit: str = "nats per token") -> None:
    """Draw loss.png from the lines of the metrics: the loss, and the load of each expert in every layer over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in lines]
    load = np.array([line["expert_load"] for line in lines], dtype=float)  # (steps, L, E)
    layers = sorted({0, load.shape[1] // 2, load.shape[1] - 1}) if load.size else []
    figure = Figure(figsize=(9, 4 + 1.4 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(layers), 1, sharex=True, squeeze=False, height_ratios=[3] + [1] * len(layers))[:, 0]
    axes[0].plot(steps, [line["train_loss"] for line in lines], linewidth=0.7, alpha=0.6, label="training batch")
    evaluated = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    axes[0].plot(*zip(*evaluated), "o-", markersize=3, label="held out") if evaluated else None
    axes[0].set(ylabel=f"loss ({unit})", title="Loss, and the share of assignments that each expert gets")
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    for axis, layer in zip(axes[1:], layers):
        num_experts = load.shape[2]
        image = axis.imshow(
            load[:, layer].T * num_experts,
            aspect="auto",
            interpolation="nearest",
            extent=(steps[0] - 0.5, steps[-1] + 0.5, num_experts - 0.5, -0.5),
            vmin=0,
            vmax=2,
            cmap="coolwarm",
        )
        axis.set(ylabel=f"layer {layer}\nexpert")
        figure.colorbar(image, ax=axis, label="load × E")
    axes[-1].set(xlabel="step")
    figure.savefig(path, dpi=110)
