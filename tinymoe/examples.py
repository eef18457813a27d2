r"""Instruction data: prompts with an answer, or with a preferred and a rejected one, as lines of JSON and as batches.

The file is JSON Lines, one example a line, its prompt taken as it is written::

    {"prompt": "upper: abc\n", "answer": "ABC"}                           to fine-tune on (SFT)
    {"prompt": "upper: abc\n", "chosen": "ABC", "rejected": "ABC."}       to prefer by (DPO)

An answer ends with the tokenizer's end of a text, which of bytes is ASCII's ETX, the byte 3: it is added to every
answer, learned with it, and stops generation. Examples are never joined: each is a sequence of its own, padded
on the right, where causal attention lets nothing look back from; no loss counts the padding.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymoe.errors import InputError
from tinymoe.reference.loss import IGNORED
from tinymoe.tokenizer import ByteTokenizer, Tokenizer

Array = np.ndarray
ETX = 3  # ASCII's end of text
KEYS = {"sft": ("prompt", "answer"), "dpo": ("prompt", "chosen", "rejected")}  # objective -> of a line


class Example(NamedTuple):
    """A line as tokens."""

    prompt: Array
    answers: tuple[Array, ...]  # SFT: the answer; DPO: chosen, rejected; each with its end


class Examples(NamedTuple):
    """The examples of a file, a tenth of its prompts held out."""

    objective: str  # sft or dpo
    manifest: dict[str, Any]  # what identifies them
    train: list[Example]
    held_out: list[Example]


class Batch(NamedTuple):
    """Sequences side by side, padded on the right with token 0."""

    inputs: Array  # (B, T)
    targets: Array  # (B, T), −100 on prompt and padding
    lengths: Array  # (B,)
    references: Array | None = None  # DPO: (2, B/2), of the chosen and the rejected answers


def _lines(path: str | Path, content: bytes, objective: str) -> list[tuple[int, dict[str, str]]]:
    """Return the lines of a JSONL file with their numbers, from 1; blank ones are passed over."""
    lines = []
    for number, text in enumerate(content.split(b"\n"), 1):
        if text.strip():
            try:
                lines.append((number, _checked(text, KEYS[objective])))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    if not lines:
        raise InputError(f"{path} holds no line: give at least two, with different prompts")
    return lines


def _checked(text: bytes, keys: tuple[str, ...]) -> dict[str, str]:
    try:
        line = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"its byte {error.start + 1} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {str(error).splitlines()[0]}") from None
    expected = f"give an object of {', '.join(keys[:-1])} and {keys[-1]}"
    if not isinstance(line, dict):
        raise ValueError(f"it is no JSON object; {expected}")
    for key in keys:
        if key not in line:
            raise ValueError(f"it lacks {key!r}; {expected}")
        if not isinstance(line[key], str):
            raise ValueError(f"{key!r} is no string")
        if not line[key]:
            raise ValueError(f"{key!r} is empty")
    if extra := sorted(line.keys() - set(keys)):
        raise ValueError(f"it has the unknown key {extra[0]!r}; {expected}")
    if len({line[key] for key in keys[1:]}) < len(keys) - 1:
        raise ValueError("'chosen' and 'rejected' are the same: there is nothing to prefer")
    return line


def read_examples(path: str | Path, objective: str, tokenizer: Tokenizer, seq_len: int) -> Examples:
    """Read the examples of a JSONL file, see the module for its lines, and hold a tenth of the prompts out.

    A prompt is held out, with all its lines, if its SHA-256 starts with a byte below 26, so that files which share
    prompts hold out the same. Where that is no prompt of the file, or all of them, the one with the smallest is.

    Parameters
    ----------
    path
        The file.
    objective
        ``sft`` or ``dpo``.
    tokenizer
        Prompt and answer are tokenized apart.
    seq_len
        The most tokens of an example, its end among them.

    Raises
    ------
    InputError
        The file cannot be read; a line, whose number the message has, is not what the objective needs, is too long, or
        its answer holds the end of one; or all prompts are the same.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    lines = _lines(path, content, objective)
    end = end_token(tokenizer)
    bos = len(tokenizer.encode(""))  # what a tokenizer puts in front of every text, an answer must not repeat
    by_prompt: dict[str, list[Example]] = {}
    for number, line in lines:
        prompt = tokenizer.encode(line["prompt"])
        answers = tuple(np.append(tokenizer.encode(line[key])[bos:], end) for key in KEYS[objective][1:])
        for key, answer in zip(KEYS[objective][1:], answers):
            if end in answer[:-1]:
                raise InputError(
                    f"{path}, line {number}: {key!r} holds {tokenizer.decode([end])!r}, which ends an answer"
                )
            if len(prompt) + len(answer) > seq_len:
                raise InputError(
                    f"{path}, line {number}: prompt and {key!r} have {len(prompt) + len(answer)} tokens with the end, "
                    f"more than --seq-len {seq_len}: shorten them, or give more up to the model's context"
                )
        by_prompt.setdefault(line["prompt"], []).append(Example(prompt, answers))
    if len(by_prompt) < 2:
        raise InputError(f"{path} has a single prompt: give another, to hold one out")
    hashes = {text: hashlib.sha256(text.encode(errors="replace")).digest() for text in by_prompt}
    held_out = {text for text, digest in hashes.items() if digest[0] < 26}
    if len(held_out) in (0, len(hashes)):
        held_out = {min(hashes, key=lambda text: hashes[text])}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for text, examples in by_prompt.items():
        parts[text in held_out].extend(examples)
    manifest = {
        "source": "examples",
        "paths": [str(path)],
        "sha256": hashlib.sha256(content).hexdigest(),
        "train": len(parts[0]),
        "held_out": len(parts[1]),
    }
    return Examples(objective, manifest, *parts)


def end_token(tokenizer: Tokenizer) -> int:
    """Return the token that ends an answer.

    Raises
    ------
    InputError
        The tokenizer names none, and has other tokens than bytes.
    """
    if tokenizer.eos_token is not None:
        return tokenizer.eos_token
    if not isinstance(tokenizer, ByteTokenizer):
        raise InputError("nothing ends an answer: name the tokenizer's end of a text as eos_token_id in config.json")
    return ETX


def padded(sequences: Sequence[tuple[Array, Array]]) -> Batch:
    """Return (prompt, answer) pairs as a batch: each predicts the tokens of its answer from those before them."""
    lengths = np.array([len(prompt) + len(answer) - 1 for prompt, answer in sequences])
    inputs = np.zeros((len(sequences), lengths.max()), np.int64)
    targets = np.full_like(inputs, IGNORED)
    for row, (prompt, answer) in enumerate(sequences):
        inputs[row, : lengths[row]] = np.concatenate([prompt, answer[:-1]])
        targets[row, len(prompt) - 1 : lengths[row]] = answer
    return Batch(inputs, targets, lengths)


def pairs(examples: Sequence[Example], references: Array) -> Batch:
    """Return DPO's examples as a batch, all chosen answers before all rejected; references are (2, B)."""
    return padded([(e.prompt, e.answers[i]) for i in (0, 1) for e in examples])._replace(references=references)


class Shuffled:
    """Training batches: ``batches[step]`` depends on the seed and the step alone; every example comes once an epoch.

    Parameters
    ----------
    count, batch_size
        Of the examples, and of those in a batch.
    make
        Makes a batch of the examples with these numbers.
    """

    def __init__(self, count: int, batch_size: int, seed: int, make: Callable[[Array], Batch]) -> None:
        self.count, self.batch_size, self.seed, self.make = count, batch_size, seed, make

    def __getitem__(self, step: int) -> Batch:
        epochs, places = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.count)
        order = {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.count) for epoch in set(epochs)}
        return self.make(np.array([order[epoch][place] for epoch, place in zip(epochs, places)]))
