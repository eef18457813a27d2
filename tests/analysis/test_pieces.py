"""What stands for a token on the page."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinymoe.analysis.pieces import HIDDEN, token_pieces
from tinymoe.tokenizer import ByteTokenizer, TextStream

BYTES = ByteTokenizer()


class Words:
    """A tokenizer of three words, one of which has no text."""

    words = ("", "the", " cat\x00")

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)

    def stream(self):
        return TextStream(self.decode)


@given(st.binary(max_size=80))
def test_every_byte_has_a_visible_piece(text):
    pieces = token_pieces(BYTES, np.frombuffer(text, np.uint8))
    assert len(pieces) == len(text)
    assert all(pieces)
    assert not {ord(character) for piece in pieces for character in piece} & HIDDEN
    "".join(pieces).encode()  # no lone surrogate


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]) | st.sampled_from("\n\t"), max_size=80))
def test_ascii_reads_as_it_is(text):
    assert "".join(token_pieces(BYTES, BYTES.encode(text))) == text


def test_a_character_stands_at_its_last_byte_and_what_is_none_as_bytes():
    text = "é\x07".encode() + b"\xff\xe2\x80" + "𝄞".encode() + b"\xe2\x80"
    expected = ["\\xc3", "é", "\\x07", "\\xff", "\\xe2", "\\x80", "\\xf0", "\\x9d", "\\x84", "𝄞", "\\xe2", "\\x80"]
    assert token_pieces(BYTES, list(text)) == expected


def test_text_that_turns_the_reading_direction_is_shown_not_obeyed():
    assert token_pieces(BYTES, list("\u202e".encode()))[-1] == "\\u202e"


def test_a_token_without_text_is_its_number():
    assert token_pieces(Words(), [0, 1, 2, 0]) == ["⟨0⟩", "the", " cat\\x00", "⟨0⟩"]
