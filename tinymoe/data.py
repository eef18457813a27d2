"""Text to learn from: documents in domains, what is held out of them, and batches of their tokens."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from tinymoe.errors import InputError
from tinymoe.reference.loss import IGNORED
from tinymoe.tokenizer import Tokenizer


class Document(NamedTuple):
    """A UTF-8 text, whole or from byte ``start`` of it on; no other of its domain has its name."""

    domain: str
    name: str
    text: bytes
    start: int = 0


Documents = tuple[Document, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents held out to evaluate with.

    Attributes
    ----------
    origin
        Where the text comes from, in the words of the manifest.
    train, held_out
        Domain → its documents. Both have the same domains in the same order, and none is empty.
    """

    origin: dict[str, Any]
    train: dict[str, Documents]
    held_out: dict[str, Documents]

    @classmethod
    def split(cls, documents: Iterable[Document], origin: dict[str, Any]) -> "Corpus":
        """Hold out about a tenth of the documents of each domain, by their names alone.

        A document is held out if the SHA-256 of its name starts with a byte below 26. Where that is no document of a
        domain, or all of them, the last tenth of each is held out instead. Of documents with the same text one is
        kept, to train on if there is the choice. Empty documents are dropped.

        Raises
        ------
        InputError
            A domain has no text left to train on.
        """
        documents = [document for document in documents if document.text]
        kept: dict[bytes, Document] = {}
        for document in sorted(documents, key=_is_held_out):  # False, for training, first
            kept.setdefault(document.text, document)
        train: dict[str, Documents] = {}
        held_out: dict[str, Documents] = {}
        for domain in dict.fromkeys(document.domain for document in documents):
            own = [document for document in documents if document.domain == domain and kept[document.text] is document]
            train[domain], held_out[domain] = _split_domain(own)
            if not train[domain]:
                size = sum(len(document.text) for document in own)
                raise InputError(
                    f"{domain} has {size} bytes that the other text does not have, too few to train on and to hold "
                    "some out: give more, or leave it out"
                )
        return cls(origin, train, held_out)

    def manifest(self) -> dict[str, Any]:
        """Return what identifies the text, for JSON: the origin, and files, bytes and SHA-256 by domain and part.

        The hash is that of the documents one after another; held-out ones are listed with their first held-out byte.
        """
        domains = {}
        for domain, held_out in self.held_out.items():
            listed = {document.name: document.start for document in held_out}
            domains[domain] = {
                "train": _fingerprint(self.train[domain]),
                "held_out": {**_fingerprint(held_out), "from_byte": listed},
            }
        return {**self.origin, "domains": domains}

    def train_tokens(self, tokenizer: Tokenizer) -> np.ndarray:
        """Return the training text of all domains as one array, (n,).

        Every document is tokenized by itself (so it starts with a BOS if the tokenizer adds one) and ends in a
        newline, its own or one more; nothing else is put between two of them.
        """
        documents = [document.text for documents in self.train.values() for document in documents]
        return np.concatenate([tokenizer.encode(text if text.endswith(b"\n") else text + b"\n") for text in documents])

    def held_out_tokens(self, tokenizer: Tokenizer) -> dict[str, list[np.ndarray]]:
        """Return domain → one array of tokens for each of its held-out documents.

        Raises
        ------
        InputError
            A domain has nothing to predict: no document of two tokens.
        """
        tokens = {
            domain: [tokenizer.encode(document.text) for document in documents]
            for domain, documents in self.held_out.items()
        }
        for domain, documents in tokens.items():
            if max(map(len, documents)) < 2:
                raise InputError(f"the held-out text of {domain} is single tokens, nothing to predict: give more text")
        return tokens


class Batches:
    """Training batches: ``batches[step]`` depends on the tokens, the seed and the step alone.

    So a run that resumes at a step needs no other state to read what it would have read.

    Parameters
    ----------
    tokens
        The training text, (n,) integers.
    batch_size, seq_len
        Shape (B, T) of a batch: B windows that start anywhere in the text, drawn with replacement.
    seed
        At least 0.

    Raises
    ------
    InputError
        A number is too small, or the text is shorter than a window and its next token.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("seq_len", seq_len, 1), ("seed", seed, 0)):
            if value < least:
                raise InputError(f"{name} is {value}; give at least {least}")
        if len(tokens) <= seq_len:
            raise InputError(
                f"the training text has {len(tokens)} tokens, and sequences of {seq_len} need {seq_len + 1}: "
                "give more text, or shorter sequences"
            )
        self.tokens, self.batch_size, self.seq_len, self.seed = tokens, batch_size, seq_len, seed

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, step])
        starts = random.integers(len(self.tokens) - self.seq_len, size=(self.batch_size, 1))
        positions = starts + np.arange(self.seq_len)  # (B, T)
        return self.tokens[positions].astype(np.int64), self.tokens[positions + 1].astype(np.int64)


def held_out_windows(
    documents: Iterable[np.ndarray], seq_len: int, batch_size: int = 32
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches (inputs, targets), (≤ batch_size, T) int64, that predict every token but a document's first once.

    Window i of a document has the inputs ``document[i*T : i*T + T]`` and the targets one further on, so a token is
    predicted from those before it in its window. The end of a last window is padded: input 0, target −100.

    Parameters
    ----------
    documents
        The tokens of each, (n,) integers.
    seq_len
        T, at least 1.
    batch_size
        The most windows in a batch, at least 1.
    """
    T = seq_len
    windows = (document[i : i + T + 1] for document in documents for i in range(0, len(document) - 1, T))
    while batch := list(islice(windows, batch_size)):
        inputs = np.zeros((len(batch), T), np.int64)
        targets = np.full((len(batch), T), IGNORED, np.int64)
        for row, window in enumerate(batch):
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield inputs, targets


def _is_held_out(document: Document) -> bool:
    # file names need not be UTF-8
    return hashlib.sha256(document.name.encode(errors="surrogateescape")).digest()[0] < 26


def _split_domain(documents: Sequence[Document]) -> tuple[Documents, Documents]:
    train = tuple(document for document in documents if not _is_held_out(document))
    held_out = tuple(document for document in documents if _is_held_out(document))
    if train and held_out:
        return train, held_out
    cuts = [(document, _last_tenth(document.text)) for document in documents]
    train = tuple(document._replace(text=document.text[:cut]) for document, cut in cuts if cut)
    return train, tuple(document._replace(text=document.text[cut:], start=cut) for document, cut in cuts)


def _last_tenth(text: bytes) -> int:
    cut = len(text) * 9 // 10
    while cut and text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


def _fingerprint(documents: Documents) -> dict[str, Any]:
    text = b"".join(document.text for document in documents)
    return {"files": len(documents), "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
