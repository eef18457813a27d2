"""What is made of committed records: the directives `model-record`, `compile-record` and `moe-record`."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tinymoe.bench.goals import newest, page, table
from tinymoe.bench.roofline import described, roofline

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tinymoe" / "bench" / "records"
UNMEASURED = "Nothing has been measured on a GPU yet: there is no record of `tinymoe bench moe` from one."
COMPILE = ROOT / "docs" / "records" / "compile.json"


def model_record(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show a record of `tinymoe bench model`: ratios, no times of a shared machine."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("numpy", "torch", "transformers") if name in machine)
    yield f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f} when it began."
    yield f"Python {machine['python']}, tinymoe {machine['tinymoe']}, {versions}. Medians of {record['rounds']} rounds."
    yield ""
    sizes = record["sizes"]
    ratios = list(dict.fromkeys(name for size in sizes.values() for name in size["ratios"]))
    rows = [[ratio, *(f"{size['ratios'][ratio]:.2f}" for size in sizes.values())] for ratio in ratios]
    yield from table(["ratio", *sizes], rows)
    yield ""
    for name, size in sizes.items():
        yield f"* {name}: `{size['shape']}`"
    grouped, per_token = record["grouped"], record["experts"]
    least = min(per_token, key=int)
    rows = [[experts, f"{time / per_token[least]:.2f}"] for experts, time in per_token.items()]
    times = {form: median(taken) for form, taken in grouped["times"].items()}
    yield ""
    yield f"The grouped experts take 1 / {times['naive'] / times['grouped']:.1f} of the time of the loop over tokens."
    yield f"A token's time in an MoE layer, over that with {least} experts, at the same k and the same sizes:"
    yield ""
    yield from table(["experts", "time"], rows)


def compile_record(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show what every kernel takes of a card."""
    kernels, architectures = record["kernels"], record["architectures"]
    spills = sum(taken["spills"] for kernel in kernels for taken in kernel["taken"].values())
    yield f"{record['date']}, NVRTC {record['nvidia-cuda-nvrtc']}, tinymoe {record['tinymoe']}: "
    yield f"{len(kernels)} instantiations of {len({kernel['file'] for kernel in kernels})} files, for "
    yield f"{', '.join(architectures)}; {spills} bytes spilled in all."
    for file in dict.fromkeys(kernel["file"] for kernel in kernels):
        rows = []
        for kernel in kernels:
            if kernel["file"] == file:
                taken = kernel["taken"].values()
                values = [[str(of[what]) for of in taken] for what in ("registers", "spills")]
                shared = sorted({str(of["shared"]) for of in taken})
                rows.append([f"`{kernel['kernel']}`", " / ".join(values[0]), " / ".join(shared), " / ".join(values[1])])
        yield ""
        yield f"### {file}"
        yield ""
        yield from table(["kernel", "registers of a thread", "shared bytes of a block", "spilled bytes"], rows)


class RecordDirective(SphinxDirective):
    """Show a record as Markdown."""

    def show(self, path: Path, lines: Any) -> list[nodes.Node]:
        """Return the nodes of a record, which the page now depends on."""
        self.env.note_dependency(str(path))
        return self.parse_text_to_nodes("\n".join(lines(json.loads(path.read_text()))), allow_section_headings=True)


class ModelRecord(RecordDirective):
    """The newest record of `tinymoe bench model`."""

    def run(self) -> list[nodes.Node]:
        """Return its nodes."""
        return self.show(max(MODEL.glob("model-*.json")), model_record)


class CompileRecord(RecordDirective):
    """The record that compile_table.py writes."""

    def run(self) -> list[nodes.Node]:
        """Return its nodes."""
        return self.show(COMPILE, compile_record)


class MoERecord(RecordDirective):
    """The newest record of `tinymoe bench moe` on a GPU: its goals, its comparisons and its roofline."""

    folder = MODEL

    def run(self) -> list[nodes.Node]:
        """Return its nodes."""
        path = newest(self.folder)
        if path is None:
            return self.parse_text_to_nodes(UNMEASURED)
        record, picture = json.loads(path.read_text()), io.BytesIO()
        roofline(record).savefig(picture, format="png", dpi=120)
        data = base64.b64encode(picture.getvalue()).decode()  # no file beside the sources that nobody wrote
        image = nodes.image(uri=f"data:image/png;base64,{data}", alt=described(record))
        return [*self.show(path, page), image]


def setup(app: Sphinx) -> dict[str, Any]:
    """Take part in the build."""
    app.add_directive("model-record", ModelRecord)
    app.add_directive("compile-record", CompileRecord)
    app.add_directive("moe-record", MoERecord)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
