"""The explorer: one HTML file with its data inside, in which a reader walks through text, layer by layer."""

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
WHOLE = 2**16 - 1  # of what each probability is a whole-numbered part
MOST_TOKENS = 2000  # of each text
MOST_NUMBERS = 750_000  # of all texts, layers, tokens and experts: 2 MB in base64


class Passage(NamedTuple):
    """Text to read, and its routing."""

    pieces: Sequence[str]  # N, each the visible text of a token
    documents: Mapping[int, str]  # index of a document's first token → its name
    probs: Array  # (L, N, E)
    experts: Array  # (L, N, k), first choice first


def passage_tokens(layers: int, num_experts: int, top_k: int, domains: int) -> int:
    """Return how many tokens of each text the file has room for."""
    return max(16, min(MOST_TOKENS, MOST_NUMBERS // (domains * layers * (num_experts + top_k))))


def page(numbers: Mapping[str, Any], passages: Mapping[str, Passage]) -> str:
    """Return the HTML.

    Parameters
    ----------
    numbers
        Of the whole analysis, see `tinymoe.analysis.analyse`.
    passages
        Domain → what to show of it.
    """
    kept = ("repeat_first", "repeat_chosen", "entropy")
    domains = [
        {
            "name": name,
            "tokens": numbers["domains"][name]["tokens"],
            "layers": [of["first"] | {key: of[key] for key in kept} for of in numbers["domains"][name]["layers"]],
            "pieces": list(passage.pieces),
            "documents": passage.documents,
            "probs": _words(whole_parts(passage.probs)),
            "experts": _words(passage.experts),
        }
        for name, passage in passages.items()
    ]
    about = ("model", "layers", "num_experts", "top_k", "seq_len", "chance", "colours")
    data = {key: numbers[key] for key in about} | {"domains": _rounded(domains)}
    template = resources.files("tinymoe.analysis").joinpath("explorer.html").read_text("utf-8")
    return template.replace("@DATA@", script_json(data))


def script_json(value: Any) -> str:
    """Return JSON, all ASCII, that cannot end the script element it stands in, whatever text it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def whole_parts(probs: Array) -> Array:
    """Return probabilities (…, E) in 65,535ths, whole numbers that add up to exactly one and keep the order.

    Each is rounded down; what is missing goes, one by one, to those that lost most.
    """
    exact = probs.astype(np.float64)
    exact *= WHOLE / exact.sum(axis=-1, keepdims=True)
    parts = np.floor(exact).astype(np.int64)
    missing = WHOLE - parts.sum(axis=-1, keepdims=True)
    rank = np.argsort(np.argsort(parts - exact, axis=-1, kind="stable"), axis=-1, kind="stable")
    return (parts + (rank < missing)).astype(np.uint16)


def _words(array: Array) -> str:
    return base64.b64encode(array.astype("<u2").tobytes()).decode()


def _rounded(value: Any) -> Any:
    """Return JSON values with floats to five digits: what a page shows."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(of) for key, of in value.items()}
    return [_rounded(of) for of in value] if isinstance(value, list) else value
