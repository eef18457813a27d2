"""Names in docstrings: what a docstring calls `route` or `runs.create` is found where the API documents it."""

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Return a link to the object whose documented name ends in a short one: of the nearest package, or of NumPy's."""
    if node.get("refdomain") != "py":
        return None
    documented, target = env.domains["py"].objects, node["reftarget"]
    found = [name for name in documented if name.startswith("tinymoe.") and name.endswith(f".{target}")]
    if not found:
        return None
    here = node.get("py:module") or "tinymoe"

    def distance(name: str) -> tuple[bool, bool, int, str]:
        package = ".".join(here.split(".")[:2])
        return not name.startswith(f"{package}."), ".cuda." in name, name.count("."), name

    name = min(found, key=distance)
    entry = documented[name]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Take part in the build."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
