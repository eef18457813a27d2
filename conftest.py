"""Examples run as tests: README's Python, the blocks of the documentation, and the docstrings of the package.

The blocks of one page run one after the other in one namespace, with or without prompts. Names that a page uses
without making them stand in a comment that readers do not see: `<!--- invisible-code-block: python … -->`.
"""

import os
import tempfile
from doctest import ELLIPSIS

from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.myst import DocTestDirectiveParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser
from sybil.sybil import SybilCollection


def enter(namespace):
    """Work in a folder of the page's own, so that what it writes is gone afterwards."""
    namespace["_folder"], namespace["_before"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_folder"].name)


def leave(namespace):
    """Return to where the tests run."""
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


PAGE = dict(
    parsers=[DocTestDirectiveParser(ELLIPSIS), PythonCodeBlockParser(doctest_optionflags=ELLIPSIS), SkipParser()],
    setup=enter,
    teardown=leave,
)
readme = Sybil(patterns=["README.md"], **PAGE)
pages = Sybil(path="docs", patterns=["*.md"], **PAGE)
docstrings = Sybil(
    path="tinymoe",
    patterns=["*.py"],
    parsers=[DocTestParser(ELLIPSIS)],
    document_types={".py": PythonDocStringDocument},
)
pytest_collect_file = SybilCollection([readme, pages, docstrings]).pytest()
