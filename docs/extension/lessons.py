"""Two things that the gallery of lessons needs.

Answers in notebooks: what the pages fold with raw HTML is there a bold word, and code cells that are collapsed. And the
folder of a model beside the lessons has a README.md, but is no gallery of its own.
"""

import functools
from collections.abc import Callable
from typing import Any

from sphinx.application import Sphinx
from sphinx_gallery import gen_rst

OPENS, CLOSES = '<details class="answers">', "</details>"
INVITATION = "**Answers.** Try first; the code cells below are collapsed."


def fold(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook whose answers can be read without the site."""
    cells, inside = [], False
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        is_raw = cell["cell_type"] == "markdown" and ".. raw:: html" in text
        if is_raw and OPENS in text:
            inside = True
            cell["source"] = [INVITATION]
        elif is_raw and CLOSES in text:
            inside = False
            continue
        elif inside and cell["cell_type"] == "code":
            cell["metadata"] = {**cell["metadata"], "jupyter": {"source_hidden": True}}
        cells.append(cell)
    notebook["cells"] = cells
    return notebook


def folding(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return sphinx-gallery's maker of notebooks, followed by ours."""

    @functools.wraps(make)
    def made(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        return fold(make(*arguments, **keywords))

    return made


def head_with_rst_only(app: Sphinx) -> None:
    """Let README.rst begin a gallery, and no README.md."""
    app.config.sphinx_gallery_conf["source_suffix"] = {".rst": "restructuredtext"}


def setup(app: Sphinx) -> dict[str, Any]:
    """Take part in the build."""
    if not hasattr(gen_rst.jupyter_notebook, "__wrapped__"):
        gen_rst.jupyter_notebook = folding(gen_rst.jupyter_notebook)
    app.connect("builder-inited", head_with_rst_only, priority=100)  # after its configuration, before its work
    return {"parallel_read_safe": True, "parallel_write_safe": True}
