"""Text to token ids and back: the 256 bytes themselves, or the tokenizer that lies in a model directory."""

import codecs
import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinymoe.config import read_json_object
from tinymoe.errors import InputError

Tokens = Sequence[int] | np.ndarray


class TextStream:
    """The text of tokens that come one at a time, in pieces that never cut a character and together are all of it.

    Feed a prompt too, before what follows it: a tokenizer may drop the space in front of the first word that it sees.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._piece: list[int] = []
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """Return the text that this token completes; it may be empty."""
        self._pending.append(int(token))
        added = self.finish()
        if not added or added.endswith("\ufffd"):  # which may be the start of a character
            return ""
        self._piece, self._pending = self._pending, []
        return added

    def finish(self) -> str:
        """Return what was held back; bytes that never became a character come out as U+FFFD."""
        # decoded with the piece before them and less its text: alone, the first word would lose its space
        return self._decode(self._piece + self._pending)[len(self._decode(self._piece)) :]


class Tokenizer(Protocol):
    """What every tokenizer here can do; ids are below ``vocab_size``, and ``eos_token`` ends a text, unless None."""

    vocab_size: int
    eos_token: int | None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids of a text, (T,) integers, with a BOS in front where the tokenizer is made to add one.

        A lone surrogate becomes "?"; a byte that is not UTF-8 becomes U+FFFD, unless bytes are the vocabulary.
        """

    def decode(self, tokens: Tokens) -> str:
        """Return the text of ids without special tokens, with U+FFFD for bytes that are not UTF-8.

        An id beyond the tokenizer's, which a padded vocabulary can give, has no text.
        """

    def stream(self) -> TextStream:
        """Return a new decoder for tokens that come one at a time."""
        return TextStream(self.decode)


class ByteTokenizer(Tokenizer):
    """The 256 bytes as vocabulary: the ids of a text, uint8, are its UTF-8, and any bytes can be a text."""

    vocab_size = 256

    def __init__(self, eos_token: int | None = None) -> None:
        self.eos_token = eos_token

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the bytes of a text, with nothing added."""
        return np.frombuffer(text.encode(errors="replace") if isinstance(text, str) else text, np.uint8)

    def decode(self, tokens: Tokens) -> str:
        """Return the text of bytes."""
        return np.asarray(tokens).astype(np.uint8).tobytes().decode(errors="replace")

    def stream(self) -> TextStream:
        """Return a new decoder for bytes that come one at a time."""
        return _ByteStream()


class _ByteStream(TextStream):
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _JsonTokenizer(Tokenizer):
    def __init__(self, path: Path, eos_token: int | None) -> None:
        self._tokenizer = _read(path, "tokenizers", lambda package: package.Tokenizer.from_file(str(path)))
        self._tokenizer.no_truncation()  # a file may ask for it, and cut every long document
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # ids may have gaps
        self.eos_token = eos_token

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.array(self._tokenizer.encode(_text(text)).ids, np.int64)

    def decode(self, tokens: Tokens) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist())


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path, eos_token: int | None) -> None:
        self._pieces = _read(path, "sentencepiece", lambda package: package.SentencePieceProcessor(str(path)))
        self.vocab_size = self._pieces.get_piece_size()
        self.eos_token = eos_token

    def encode(self, text: str | bytes) -> np.ndarray:
        # the file cannot say whether to add its BOS; Mistral does
        return np.array(self._pieces.encode(_text(text), add_bos=self._pieces.bos_id() >= 0), np.int64)

    def decode(self, tokens: Tokens) -> str:
        return self._pieces.decode([token for token in np.asarray(tokens).tolist() if token < self.vocab_size])


def load_tokenizer(directory: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model directory.

    It is ``tokenizer.json``, else ``tokenizer.model``, else the last ``tokenizer.model.v*``, else the bytes if the
    model's vocabulary has 256 tokens. What ends a text is ``eos_token_id`` in config.json, of a list the first.

    Parameters
    ----------
    directory
        The model directory.
    vocab_size
        The size of the model's vocabulary; the tokenizer's may be smaller.

    Raises
    ------
    InputError
        There is no tokenizer for that vocabulary, or it cannot be read; the message names the file and a way out.
    """
    folder = Path(directory)
    eos_token = _eos_token(folder / "config.json", vocab_size)
    versions = sorted(folder.glob("tokenizer.model.v*"), reverse=True)
    paths = [path for path in (folder / "tokenizer.json", folder / "tokenizer.model", *versions) if path.is_file()]
    if not paths:
        if vocab_size == ByteTokenizer.vocab_size:
            return ByteTokenizer(eos_token)
        raise InputError(
            f"{folder} has neither tokenizer.json nor tokenizer.model, and its vocabulary of {vocab_size} is not "
            "the 256 bytes: put its tokenizer there, or pass token ids from Python"
        )
    kind = _JsonTokenizer if paths[0].suffix == ".json" else _SentencePieceTokenizer
    tokenizer = kind(paths[0], eos_token)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{paths[0]} has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary has only {vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer


def copy_tokenizer(source: str | os.PathLike[str], directory: Path) -> None:
    """Copy the tokenizer files of a model directory to another, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in ("tokenizer.json", "tokenizer.model*"):
        for path in Path(source).glob(pattern):
            shutil.copyfile(path, directory / path.name)


def _eos_token(config: Path, vocab_size: int) -> int | None:
    given: Any = read_json_object(config).get("eos_token_id") if config.is_file() else None
    token = given[0] if isinstance(given, list) and given else given
    if given is not None and (type(token) is not int or not 0 <= token < vocab_size):
        raise InputError(f"{config}: eos_token_id is {given!r}; give an id below {vocab_size}, or null")
    return token


def _read(path: Path, package: str, read: Callable[[Any], Any]) -> Any:
    try:
        return read(importlib.import_module(package))
    except ImportError:
        raise InputError(f"{path} needs the package {package}: pip install 'tinymoe[tokenizer]'") from None
    except Exception as error:  # tokenizers raises nothing narrower
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is no tokenizer that {package} can read: {reason}") from None


def _text(text: str | bytes) -> str:
    if isinstance(text, str):
        text = text.encode(errors="replace")
    return text.decode(errors="replace")
