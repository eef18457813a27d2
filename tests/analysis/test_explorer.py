"""The page's data: exact, small, and unable to break out of where it stands."""

import html.parser
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from tinymoe.analysis import explorer
from tinymoe.analysis.colours import LEAST_CONTRAST, colours, contrast_with_black


@given(st.integers(1, 70), st.sampled_from([0.01, 1.0, 100.0]), rngs)
def test_parts_add_up_to_one_and_keep_the_order(E, spread, rng):
    probs = rng.dirichlet(np.full(E, spread), 5).astype(np.float32)
    parts = explorer.whole_parts(probs)
    assert (parts.sum(axis=1, dtype=np.int64) == explorer.WHOLE).all()
    assert np.abs(parts / explorer.WHOLE - probs).max() < 2 / explorer.WHOLE
    for row, part in zip(probs, parts.astype(np.int64)):
        assert (np.diff(part[np.argsort(row, kind="stable")]) >= 0).all()


@given(st.recursive(st.text() | st.sampled_from(["</script>", "<!--", "]]>", "\u2028"]), st.lists))
def test_json_in_a_script_element_neither_ends_it_nor_changes(value):
    text = explorer.script_json(value)
    assert not set(text) & set("<>&")
    assert text.isascii()
    assert json.loads(text) == value


def test_there_is_room_for_less_text_in_a_larger_model():
    assert explorer.passage_tokens(4, 8, 2, 3) == explorer.MOST_TOKENS
    for layers, E, k, domains in ((32, 8, 2, 3), (56, 64, 4, 2)):
        tokens = explorer.passage_tokens(layers, E, k, domains)
        assert tokens * layers * (E + k) * domains <= explorer.MOST_NUMBERS
    assert explorer.passage_tokens(100, 256, 8, 100) == 16


def test_colours_are_all_different_and_black_text_is_readable_on_them():
    for E in (1, 8, 9, 10, 64, 200):
        assert len(set(colours(E))) == E
        assert min(map(contrast_with_black, colours(E))) >= LEAST_CONTRAST


class Outside(html.parser.HTMLParser):
    """Collects what the page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "data")]


def test_the_template_refers_to_nothing_outside():
    numbers = dict.fromkeys(("model", "layers", "num_experts", "top_k", "seq_len", "chance", "colours"), 0)
    page = explorer.page(numbers | {"domains": {}}, {})
    outside = Outside()
    outside.feed(page)
    assert outside.found == ["data:,"]
    assert "@DATA@" not in page
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
