"""The text of each single token: what a reader sees where it stands."""

from collections.abc import Sequence

import numpy as np

from tinymoe.tokenizer import ByteTokenizer, Tokenizer

# Control characters but for tab and newline, and what changes the direction or the width of a text.
HIDDEN = {*range(32), *range(127, 160), 0x061C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)}
HIDDEN = HIDDEN - {9, 10} | {0xFEFF, 0x00AD}


def token_pieces(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> list[str]:
    r"""Return one visible text for each token, never empty; together they read as the text does.

    A character of several tokens is shown at its last, and a control character as its escape. A byte that completes
    no character is ``\xNN``; another token without text, such as a BOS, is its id, ``⟨1⟩``.
    """
    ids = [int(token) for token in tokens]
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_pieces(bytes(ids))
    stream = tokenizer.stream()
    texts = [stream.feed(token) for token in ids]
    return [visible(text) if text else f"⟨{token}⟩" for text, token in zip(texts, ids)]


def visible(text: str) -> str:
    """Return a text with its control characters as escapes, all but tab and newline."""
    return "".join(_escape(character) if ord(character) in HIDDEN else character for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _byte_pieces(text: bytes) -> list[str]:
    pieces: list[str] = []
    while (position := len(pieces)) < len(text):
        for length in range(1, 5):
            try:
                character = text[position : position + length].decode()
            except UnicodeDecodeError:
                continue
            pieces += [f"\\x{byte:02x}" for byte in text[position : position + length - 1]]
            pieces.append(visible(character))
            break
        else:
            pieces.append(f"\\x{text[position]:02x}")
    return pieces
