"""Imports run downhill, and `import tinymoe` is fast because it imports next to nothing."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tinymoe

ROOT = Path(tinymoe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = {"numpy", "matplotlib", "rich", "safetensors", "ml_dtypes", "threadpoolctl", "cupy", "torch", "transformers"}
# Bottom first: a module may import those of its own floor and of the floors below.
FLOORS = [
    {"errors"},
    {"atomic", "config", "workers"},
    {"reference", "cuda"},
    {"balance", "block", "cache", "checkpoint", "checks", "corpora", "data", "data_parallel", "decoder", "examples"}
    | {"model", "optimizer", "tokenizer"},
    {"analysis", "bench", "doctor", "generation", "instruct", "progress", "report", "runs", "scale", "training"}
    | {"writing", "experiments"},
    {"cli"},
]


def name_of(file):
    parts = [ROOT.name, *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file):
    """Yield every module or name that a file imports, wherever in it, by its full name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(name):
    room = name.split(".")[1] if name.startswith("tinymoe.") else None
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), None)


def run_python(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("file", sorted(set(FILES) - {ROOT / "__init__.py", ROOT / "__main__.py"}), ids=name_of)
def test_imports_run_downhill(file):
    floor = floor_of(name_of(file))
    assert floor is not None, "a new room needs a place in FLOORS"
    for name in imports_of(file):
        assert (floor_of(name) or 0) <= floor, f"{name_of(file)} imports {name}"


@pytest.mark.parametrize("file", sorted((ROOT / "reference").glob("*.py")), ids=name_of)
def test_reference_imports_only_numpy_config_and_workers(file):
    for name in imports_of(file):
        allowed = name.split(".")[0] in {*sys.stdlib_module_names, "numpy"}
        assert allowed or name.startswith(("tinymoe.reference", "tinymoe.config", "tinymoe.workers")), name


@pytest.mark.parametrize("module", ["tinymoe", "tinymoe.config", "tinymoe.errors"])
def test_light_modules_import_nothing_heavy(module):
    loaded = run_python(f"import sys, {module}; print(*sys.modules)")
    assert module in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("module", ["tinymoe.model", "tinymoe.generation", "tinymoe.reference"])
def test_the_model_needs_only_numpy_and_threadpoolctl(module):
    loaded = set(run_python(f"import sys, {module}; print(*sys.modules)"))
    assert loaded & HEAVY == {"numpy", "threadpoolctl"}


def test_kernels_are_not_imported_for_numpy_s_parameters():
    code = "import sys, numpy, tinymoe; tinymoe.AdamW({'w': numpy.ones(2)}); print(*sys.modules)"
    assert not [name for name in run_python(code) if name.startswith("tinymoe.cuda")]


def test_every_module_can_be_imported_first():
    left_out = {"__main__"}
    left_out |= set() if find_spec("torch") and find_spec("transformers") else {"peer", "moe_peers", "moe_jax"}
    left_out |= set() if find_spec("jax") else {"moe_jax"}
    names = [name_of(file) for file in FILES if file.stem not in left_out and "cuda" not in file.parts]
    code = """
import importlib, sys
for name in {names!r}:
    for loaded in [m for m in sys.modules if m.split(".")[0] == "tinymoe"]:
        del sys.modules[loaded]
    importlib.import_module(name)
    print(name)
"""
    assert run_python(code.format(names=names)) == names


def test_public_names_are_found_and_others_are_not():
    for name in tinymoe.__all__:
        assert getattr(tinymoe, name) is not None
        assert name in dir(tinymoe)
    assert not hasattr(tinymoe, "no_such_name")
