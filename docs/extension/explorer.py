"""The explorer's page, made in the build from the small model of the lessons: `tinymoe analyze` writes the same."""

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "lessons" / "checkpoint"
TOKENS = 8000  # of each text


def write(app: Sphinx, error: Exception | None) -> None:
    """Write routing_explorer.html beside the pages, unless it is there, made of the same model and the same code."""
    if error or app.builder.format != "html":
        return
    from tinymoe import Mixtral, analysis, corpora
    from tinymoe.analysis import explorer
    from tinymoe.tokenizer import load_tokenizer

    target = Path(app.outdir) / "routing_explorer.html"
    sources = [*CHECKPOINT.iterdir(), *Path(analysis.__file__).parent.iterdir()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources) if path.is_file())).hexdigest()
    if target.exists() and digest in target.read_text("utf-8"):
        return
    model = Mixtral.from_pretrained(CHECKPOINT)
    tokenizer = load_tokenizer(CHECKPOINT, model.config.vocab_size)
    texts = corpora.standard_library().held_out
    seq_len = min(model.config.context_len, 128)
    with contextlib.redirect_stdout(io.StringIO()):
        numbers, passages = analysis.analyse(model, tokenizer, texts, seq_len, "the lessons' model", TOKENS)
    target.write_text(explorer.page(numbers, passages) + f"<!-- {digest} -->\n", "utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Take part in the build."""
    app.connect("build-finished", write, priority=100)  # also if a lesson failed
    return {"parallel_read_safe": True, "parallel_write_safe": True}
