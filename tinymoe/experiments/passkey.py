"""A passkey hidden in a text and asked for at its end: how far back a small model finds it, and where that stops.

What to look at (after figure 4 of Mixtral of Experts, arXiv 2401.04088; the task is Mohtashami and Jaggi's, arXiv
2305.16300):

* Inside the trained length a model with full attention finds the key in every text, wherever it is hidden.
* With a sliding window of W, what is further back than W − 1 tokens is out of sight of one layer, and what is further
  back than L · (W − 1) tokens out of reach of all L: not even a trace of the key arrives, and retrieval is chance. In
  between it takes tokens on the way that pick the key up in one layer, for the next layer to find it there: they learn
  to, and retrieval goes down only where the reach of all layers ends, however long the text.
* Beyond the trained length full attention meets rotary angles that it never saw, and retrieval breaks down, in patches
  that differ from seed to seed.
* On text, the loss of the same bytes falls with the context before them; beyond the trained length it jumps under full
  attention, and stays where it was under a window, which never sees a distance that it was not trained on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinymoe import training
from tinymoe.config import MixtralConfig
from tinymoe.experiments.learning import learn, text
from tinymoe.model import Mixtral
from tinymoe.reference import AdamW
from tinymoe.reference.loss import IGNORED

Array = np.ndarray
SENTENCE, STOP = b"the pass key is ", b". "
WORDS = b"the grass is green the sky is blue the sun is yellow here we go there and back again".split()
DIGITS = 4
SHORTEST = 2 * (len(SENTENCE) + DIGITS) + len(STOP)  # no filler at all
TRAINED = 128  # bytes
TOKENS = 2304  # of a training batch, about
GROWTH = 0.4  # of the steps: until the longest texts are as long as the trained length
TEXT_WINDOWS = 128


class Passages(NamedTuple):
    """Texts of one length, each ending in the question and its answer."""

    tokens: Array  # (n, length) bytes
    keys: Array  # (n, DIGITS) bytes of the digits
    starts: Array  # (n,) where the first digit of the hidden key stands


def passages(count: int, length: int, rng: np.random.Generator, depth: float | None = None) -> Passages:
    """Return texts of filler words in which "the pass key is 4821. " is hidden, and "the pass key is 4821" the end.

    The digits of a key differ. So the byte before the second to fourth digit of the answer says where in the key it is,
    and an induction head (Olsson et al. 2022, arXiv 2209.11895) can copy what followed it. The first needs a longer
    match.

    Parameters
    ----------
    count
        n.
    length
        Of each text in bytes, with question and answer; at least `SHORTEST`.
    depth
        Where the sentence is hidden: 0 at the beginning, 1 right before the question; None draws a place for each.
    """
    room = length - SHORTEST
    if room < 0:
        raise ValueError(f"length is {length}; a passage has at least {SHORTEST} bytes")
    tokens = np.empty((count, length), np.int64)
    keys = rng.permuted(np.tile(np.arange(ord("0"), ord("9") + 1), (count, 1)), axis=1)[:, :DIGITS]
    starts = np.empty(count, np.int64)
    for row, key in enumerate(keys):
        at = round(room * depth) if depth is not None else int(rng.integers(room + 1))
        words = b" ".join(WORDS[i] for i in rng.integers(len(WORDS), size=room // 3 + 1))
        filler = (words + b" ")[:room]
        answer = key.astype(np.uint8).tobytes()
        parts = filler[:at], SENTENCE, answer, STOP, filler[at:], SENTENCE, answer
        tokens[row] = np.frombuffer(b"".join(parts), np.uint8)
        starts[row] = at + len(SENTENCE)
    return Passages(tokens, keys, starts)


class PasskeyBatches:
    """Training batches of passages; ``batches[step]`` depends on the seed and the step alone.

    A batch has texts of one length, drawn from `SHORTEST` up to a longest that grows to ``longest`` over the first
    `GROWTH` of the steps: in short texts the key is soon found, and what finds it there finds it further away, too.
    Only the answer's digits are targets.
    """

    def __init__(self, steps: int, longest: int, tokens: int, seed: int):
        self.steps, self.longest, self.tokens, self.seed = steps, longest, tokens, seed

    def __getitem__(self, step: int) -> tuple[Array, Array]:
        rng = np.random.default_rng([self.seed, step])
        grown = min(1.0, step / (GROWTH * self.steps))
        length = int(rng.integers(SHORTEST, SHORTEST + round(grown * (self.longest - SHORTEST)) + 1))
        tokens = passages(max(1, self.tokens // length), length, rng).tokens
        targets = np.full_like(tokens[:, 1:], IGNORED)
        targets[:, -DIGITS:] = tokens[:, -DIGITS:]
        return tokens[:, :-1], targets


def retrieved(model: Mixtral, asked: Passages) -> Array:
    """Return (n,), whether the model's most probable answer is the key, all its digits.

    The true digits are fed: the answer that greedy decoding writes is right exactly if each digit is the most
    probable after the true ones before it.
    """
    logits = model(asked.tokens[:, :-1])[:, -DIGITS:]  # (n, DIGITS, V)
    return (logits.argmax(-1) == asked.keys).all(axis=1)


def reach(config: MixtralConfig) -> int | None:
    """Return L · (W − 1), how far back anything can influence a token through all layers; None without a window."""
    return None if config.sliding_window is None else config.n_layers * (config.sliding_window - 1)


def loss_by_context(model: Mixtral, windows: Array, contexts: Sequence[int], scored: int) -> list[float]:
    """Return the mean loss in nats of the same tokens, the last ``scored`` of windows (n, T), after more and more text.

    With a context of c the model reads c tokens before the first of them, so it is predicted from c, the last from
    c + scored − 1.
    """
    losses = []
    for context in contexts:
        part = windows[:, -(context + scored) :]
        targets = part[:, 1:].copy()
        targets[:, : context - 1] = IGNORED
        losses.append(model.loss(part[:, :-1], targets))
    return losses


def run(seed: int, quick: bool) -> dict[str, Any]:
    """Return exact retrieval by length and position, and the loss on text by context, with and without a window."""
    inside = (48, 64) if quick else (48, 64, 80, 96, 112, TRAINED)
    beyond = (80,) if quick else (160, 192, 256, 384, 512)
    depths = np.linspace(0, 1, 3 if quick else 10).tolist()
    count = 4 if quick else 50
    shape = dict(dim=64, n_layers=3, hidden_dim=32, n_heads=4, n_kv_heads=2, num_experts=4, vocab_size=128)
    if quick:
        shape |= dict(dim=16, n_layers=1)
    steps, longest, tokens = (3, inside[-1], 256) if quick else (3600, TRAINED, TOKENS)
    models: dict[str, Any] = {}
    for name, window in (("full", None), ("window", 16 if quick else 32)):
        config = MixtralConfig(**shape, sliding_window=window)  # type: ignore[arg-type]
        model, losses = _learn_passkeys(config, PasskeyBatches(steps, longest, tokens, seed), seed, quick)
        rng = np.random.default_rng([seed, steps])  # of no batch
        cells = [_cell(model, length, depth, count, rng) for length in (*inside, *beyond) for depth in depths]
        models[name] = {
            "window": window,
            "reach": reach(config),
            "loss": losses,
            "inside": _total(cells, inside),
            "beyond": _total(cells, beyond),
            "cells": cells,
        }
        if not quick:
            print(f"{name}: {models[name]['inside']} inside, {models[name]['beyond']} beyond", flush=True)
    return {
        "digits": DIGITS,
        "trained_length": longest,
        "keys_per_cell": count,
        "models": models,
        "text": _losses_on_text(seed, quick),
    }


def _learn_passkeys(
    config: MixtralConfig, batches: PasskeyBatches, seed: int, quick: bool
) -> tuple[Mixtral, list[float]]:
    """Return a model trained on the batches, and the mean loss of its answers in every twentieth of the steps."""
    options = training.Options(steps=batches.steps, warmup=batches.steps // 40, seed=seed)
    model = Mixtral.init(config, seed)
    optimizer = AdamW(model.params, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay)
    task = training.Task(batches, training.of_text, lambda model: {})
    losses = []
    for step in range(1, batches.steps + 1):
        losses.append(training.take_step(model, optimizer, task, options)["train_loss"])
        if step % 200 == 0 and not quick:
            print(f"window {config.sliding_window}: step {step}, loss {np.mean(losses[-50:]):.4f}", flush=True)
    return model, [float(np.mean(part)) for part in np.array_split(losses, min(20, len(losses)))]


def _cell(model: Mixtral, length: int, depth: float, count: int, rng: np.random.Generator) -> dict[str, Any]:
    asked = passages(count, length, rng, depth)
    distance = length - 1 - DIGITS - int(asked.starts[0])  # from the question's last byte back to the first digit
    exact = int(retrieved(model, asked).sum())
    return {"length": length, "depth": depth, "distance": distance, "exact": exact, "asked": count}


def _total(cells: list[dict[str, Any]], lengths: Sequence[int]) -> str:
    chosen = [cell for cell in cells if cell["length"] in lengths]
    return f"{sum(cell['exact'] for cell in chosen)} of {sum(cell['asked'] for cell in chosen)}"


def _losses_on_text(seed: int, quick: bool) -> dict[str, Any]:
    """Train on text with and without a window; return the loss by how many bytes come before, also beyond the trained.

    All losses are of the same held-out bytes, the ends of windows that stand anywhere in a document.
    """
    trained, scored = (16, 8) if quick else (TRAINED, 32)
    contexts = [4, trained - scored, 32] if quick else [4, 8, 16, 32, 64, trained - scored, 160, 256, 512, 1024]
    size = contexts[-1] + scored
    shape = dict(dim=64, n_layers=3, hidden_dim=64, n_heads=4, n_kv_heads=2, num_experts=4, vocab_size=256)
    if quick:
        shape |= dict(dim=16, n_layers=1)
    tokens, held_out = text(quick)
    rng = np.random.default_rng([seed, 1])
    documents = [d for of_domain in held_out.values() for d in of_domain if len(d) > size]
    chosen = [documents[i] for i in rng.integers(len(documents), size=4 if quick else TEXT_WINDOWS)]
    starts = [int(rng.integers(len(d) - size)) for d in chosen]
    windows = np.stack([d[start : start + size] for d, start in zip(chosen, starts)]).astype(np.int64)
    steps = 3 if quick else 700
    options = training.Options(
        steps=steps, batch_size=TOKENS // TRAINED, seq_len=trained, warmup=steps // 10, seed=seed
    )
    losses = {}
    for name, window in (("full", None), ("window", trained // 4)):
        config = MixtralConfig(**shape, sliding_window=window)  # type: ignore[arg-type]
        losses[name] = loss_by_context(learn(config, tokens, options), windows, contexts, scored)
        if not quick:
            print(f"text, {name}: {np.round(losses[name], 3)} after {contexts} bytes", flush=True)
    return {
        "trained_length": trained,
        "window": trained // 4,
        "contexts": contexts,
        "scored": scored * len(windows),
        "loss": losses,
    }


def plot(numbers: dict[str, Any]) -> Any:
    """Draw retrieval over length and position for both models, retrieval over distance, and the loss over context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 2)
    trained = numbers["trained_length"]
    for axis, of_model in zip(axes[0], numbers["models"].values()):
        _heat_map(figure, axis, of_model["cells"], trained)
        window = f"a window of {of_model['window']}" if of_model["window"] else "full attention"
        axis.set(title=f"keys retrieved, {window}: {of_model['inside']} inside the trained length")
        distances, shares = _by_distance([c for c in of_model["cells"] if c["length"] <= trained])
        axes[1, 0].plot(distances, shares, "o-", markersize=4, label=window)
    window, far = (numbers["models"]["window"][key] for key in ("window", "reach"))
    axes[1, 0].axvline(window - 1, color="black", linestyle=":", label=f"W − 1 = {window - 1}: in sight of one layer")
    axes[1, 0].axvline(far, color="black", linestyle="--", label=f"L (W − 1) = {far}: within reach of all")
    axes[1, 0].set(
        title="inside the trained length", xlabel="bytes from the question back to the key", ylabel="keys retrieved"
    )
    of_text = numbers["text"]
    for name, losses in of_text["loss"].items():
        label = "full attention" if name == "full" else f"a window of {of_text['window']}"
        axes[1, 1].plot(of_text["contexts"], losses, "o-", markersize=4, label=label)
    axes[1, 1].axvline(of_text["trained_length"], color="black", linestyle="--", label="trained length")
    axes[1, 1].set(
        title="the same held-out text after more and more context",
        xscale="log",
        xlabel="bytes of context",
        ylabel="loss, nats per byte",
    )
    for axis in axes[1]:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


def _heat_map(figure: Any, axis: Any, cells: list[dict[str, Any]], trained: int) -> None:
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
    image = np.zeros((len(depths), len(lengths)))
    for cell in cells:
        image[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["exact"] / cell["asked"]
    drawn = axis.imshow(image, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", interpolation="nearest")
    axis.axvline(sum(length <= trained for length in lengths) - 0.5, color="black", linestyle="--")
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(xlabel="length of the text, bytes (dashed: the trained length)", ylabel="where the key is hidden")
    figure.colorbar(drawn, ax=axis)


def _by_distance(cells: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    distances = sorted({cell["distance"] for cell in cells})
    of_distance = [[c for c in cells if c["distance"] == distance] for distance in distances]
    return distances, [sum(c["exact"] for c in of) / sum(c["asked"] for c in of) for of in of_distance]
