"""Which expert gets which token, and why one should believe it: section 5 of the paper on any model and any text."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymoe.analysis import explorer, figures, routing, summary
from tinymoe.analysis.colours import colours
from tinymoe.analysis.observe import Observed, observe, passage, sample
from tinymoe.analysis.pieces import token_pieces
from tinymoe.atomic import replacing, write_json
from tinymoe.data import Document
from tinymoe.errors import InputError
from tinymoe.model import Mixtral
from tinymoe.tokenizer import Tokenizer

TOKENS = 50_000  # of each text


def command(
    model: Mixtral,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[Document]],
    seq_len: int,
    folder: Path,
    name: str,
    tokens: int = TOKENS,
) -> None:
    """Analyse texts; print a summary, and write routing.json, figures and explorer.html.

    Parameters
    ----------
    model, tokenizer, texts, seq_len, name, tokens
        See `analyse`.
    folder
        To write to; made if need be.

    Raises
    ------
    InputError
        See `analyse`; or the folder cannot be written.
    """
    _check(model, tokens)
    _make(folder)
    numbers, passages = analyse(model, tokenizer, texts, seq_len, name, tokens)
    _write(folder, numbers, passages)
    summary.show(numbers, passages)
    print(f"\n{folder / 'explorer.html'} shows every token in a browser; beside it are the figures and routing.json")


def analyse(
    model: Mixtral,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[Document]],
    seq_len: int,
    name: str,
    tokens: int = TOKENS,
) -> tuple[dict[str, Any], dict[str, explorer.Passage]]:
    """Let the model read texts and count where their tokens go; print a line for each.

    Parameters
    ----------
    model, tokenizer
        Of one directory.
    texts
        Domain → its documents; of paths, the last part is shown if it tells them apart.
    seq_len
        Tokens in a window, at most the model's context.
    name
        Of the model, for titles.
    tokens
        The most that are read of each domain.

    Returns
    -------
    numbers
        Plain JSON: ``model``, ``layers`` (those with experts), ``num_experts``, ``top_k``, ``seq_len``, ``colours``
        (of the experts), ``chance`` (of repetition, see `routing.repetition_by_chance`), and ``domains``, each with
        ``documents`` and what `routing.summarise` returns.
    passages
        Domain → some of its text, token by token.

    Raises
    ------
    InputError
        The model is dense, or its experts choose tokens; or a text has no token.
    """
    _check(model, tokens)
    config = model.config
    texts = dict(zip(_short(list(texts)), texts.values()))
    encoded = {domain: [tokenizer.encode(document.text) for document in texts[domain]] for domain in texts}
    for domain, documents in encoded.items():
        if not any(map(len, documents)):
            raise InputError(f"{domain} has no token for this tokenizer: give a text that is not empty")
    numbers: dict[str, Any] = {
        "model": name,
        "layers": list(config.moe_layers),
        "num_experts": config.num_experts,
        "top_k": config.top_k_experts,
        "seq_len": seq_len,
        "colours": colours(config.num_experts),
        "chance": {
            "first": routing.repetition_by_chance(config.num_experts, 1),
            "chosen": routing.repetition_by_chance(config.num_experts, config.top_k_experts),
        },
        "domains": {},
    }
    room = explorer.passage_tokens(len(config.moe_layers), config.num_experts, config.top_k_experts, len(texts))
    passages = {}
    for domain, documents in encoded.items():
        observed = observe(model, sample(documents, seq_len, tokens), seq_len)
        print(f"read {len(observed.tokens):,} of {sum(map(len, documents)):,} tokens of {domain}", flush=True)
        documents_read = len(np.unique(observed.document))
        numbers["domains"][domain] = {"documents": documents_read, **routing.summarise(observed)}
        read = observe(model, passage(documents, seq_len, room), seq_len)
        passages[domain] = _passage(tokenizer, read, [document.name for document in texts[domain]])
    return numbers, passages


def _check(model: Mixtral, tokens: int) -> None:
    if model.config.num_experts == 0:
        raise InputError("this model is dense: it has no experts, so there is no routing to analyse")
    if model.config.expert_choice:
        raise InputError("this model's experts choose their tokens: no token has a first choice to analyse")
    if tokens < 1:
        raise InputError(f"--tokens is {tokens}; give at least 1")


def _short(domains: list[str]) -> list[str]:
    names = [Path(domain).name or domain for domain in domains]
    return names if len(set(names)) == len(names) else domains


def _passage(tokenizer: Tokenizer, read: Observed, names: Sequence[str]) -> explorer.Passage:
    starts = np.flatnonzero(np.diff(read.document, prepend=-1))
    pieces: list[str] = []
    for tokens in np.split(read.tokens, starts[1:]):  # so that no character reaches over the end of a document
        pieces += token_pieces(tokenizer, tokens)
    documents = {int(start): names[read.document[start]] for start in starts} if len(names) > 1 else {}
    return explorer.Passage(pieces, documents, read.probs, read.experts)


def _make(folder: Path) -> None:
    """Make the folder and try to write to it, before minutes are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; give another folder with --out DIR"
        ) from None


def _write(folder: Path, numbers: dict[str, Any], passages: dict[str, explorer.Passage]) -> None:
    texts = {domain: (passage.pieces, passage.experts) for domain, passage in passages.items()}
    drawn = {
        "shares": figures.share_figure(numbers),
        "repetition": figures.repetition_figure(numbers),
        "confidence": figures.confidence_figure(numbers),
        "text": figures.text_figure(numbers, texts),
    }
    if numbers["top_k"] > 1:
        drawn["pairs"] = figures.pair_figure(numbers)
    for name, figure in drawn.items():
        with replacing(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=120)
    with replacing(folder / "explorer.html") as partial:
        partial.write_text(explorer.page(numbers, passages), "utf-8")
    write_json(folder / "routing.json", numbers)
