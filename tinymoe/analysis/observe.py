"""A text as the router sees it: which windows of it are read, and where they go in every layer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinymoe import workers
from tinymoe.model import Mixtral
from tinymoe.reference.softmax import softmax

Array = np.ndarray
BATCH = 2048  # tokens that a worker sends through the model together, unless one window is longer


class Window(NamedTuple):
    """Consecutive tokens of one document, read with nothing before them."""

    document: int
    start: int
    tokens: Array  # (T,) or fewer


class Observed(NamedTuple):
    """Windows one after the other: N tokens, and what the routers of L layers with experts say to them."""

    tokens: Array  # (N,)
    document: Array  # (N,) which document each is of
    window: Array  # (N,) which window; the tokens of one are neighbours in the text
    experts: Array  # (L, N, k) the choices, first choice first
    probs: Array  # (L, N, E) float32, softmax of the router's logits


def sample(documents: Sequence[Array], seq_len: int, most: int) -> list[Window]:
    """Return windows of up to ``seq_len`` tokens, all of them, or as many as ``most`` tokens need, evenly spread.

    Parameters
    ----------
    documents
        The tokens of each, (n,) integers; n may be 0.
    seq_len
        T, at least 1.
    most
        At least 1; the last window may be cut for it.
    """
    windows = [
        Window(number, start, document[start : start + seq_len])
        for number, document in enumerate(documents)
        for start in range(0, len(document), seq_len)
    ]
    total = sum(len(window.tokens) for window in windows)
    if total > most:
        count = -(-len(windows) * most // total)  # rounded up
        windows = [windows[len(windows) * number // count] for number in range(count)]
    before = np.cumsum([0, *(len(window.tokens) for window in windows)])
    kept = [window._replace(tokens=window.tokens[: max(0, most - start)]) for window, start in zip(windows, before)]
    return [window for window in kept if len(window.tokens)]


def passage(documents: Sequence[Array], seq_len: int, most: int) -> list[Window]:
    """Return the windows of a text to read: the longest document's first ``most`` tokens, then the next longest's."""
    windows: list[Window] = []
    for number in sorted(range(len(documents)), key=lambda number: -len(documents[number])):
        document = documents[number][:most]
        most -= len(document)
        windows += [Window(number, i, document[i : i + seq_len]) for i in range(0, len(document), seq_len)]
    return windows


def observe(model: Mixtral, windows: Sequence[Window], seq_len: int) -> Observed:
    """Let the model read windows, at least one, of up to ``seq_len`` tokens each.

    A short window is padded at its end, where no token before looks.

    Raises
    ------
    FloatingPointError
        A layer's router logits are not finite.
    """

    def read(batch: Sequence[Window]) -> tuple[Array, Array]:
        T = max(len(window.tokens) for window in batch)
        inputs, real = np.zeros((len(batch), T), np.int64), np.zeros((len(batch), T), bool)
        for row, window in enumerate(batch):
            inputs[row, : len(window.tokens)] = window.tokens
            real[row, : len(window.tokens)] = True
        routing = model.routing(inputs)
        experts = np.stack([experts[real.ravel()] for _, experts, _ in routing])
        return experts, np.stack([softmax(logits[real.ravel()].astype(np.float32)) for _, _, logits in routing])

    at_once = max(1, BATCH // seq_len)
    batches = [windows[first : first + at_once] for first in range(0, len(windows), at_once)]
    parts = workers.run(read, batches, workers=model.num_workers)
    lengths = [len(window.tokens) for window in windows]
    return Observed(
        np.concatenate([window.tokens for window in windows]).astype(np.int64),
        np.repeat([window.document for window in windows], lengths),
        np.repeat(np.arange(len(windows)), lengths),
        np.concatenate([experts for experts, _ in parts], axis=1).astype(np.int64),
        np.concatenate([probs for _, probs in parts], axis=1),
    )
