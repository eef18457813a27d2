"""Break the kernels, one place at a time, and see whether their tests notice.

Run as `python tests/mutate_kernels.py [FILE …]`. A mutant is a kernel without one barrier, one wait or one atomic, or
with one bound shifted by one. It is noticed if the tests of its component fail, or do not end. Mutants that do not
compile do not count. A survivor that is equivalent to the original is listed in EQUIVALENT with the reason.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "tinymoe" / "cuda" / "kernels"
INCLUDE = ROOT / "tinymoe" / "cuda" / "include"
SECONDS = 300  # of a test run, after which a mutant is endless

# What to break: a pattern, and what takes its place.
MUTATIONS = [
    ("no barrier", r"__sync(?:threads|warp)\(\);", ""),
    ("no wait", r"wait_for_copies<[^>]*>\(\);", ""),
    ("no atomic", r"atomic(?:Add)\((?P<to>&?[\w\[\]. +*/%()-]+?), (?P<by>[^;]+)\);", r"*(\g<to>) += \g<by>;"),
    ("no atomic", r"atomicOr\((?P<to>[\w&\[\]]+), (?P<by>[^;]+)\);", r"*(\g<to>) |= \g<by>;"),
    ("bound + 1", r"(?<= )<(?= )", "<="),
    ("bound - 1", r"(?<= )<=(?= )", "<"),
    ("bound + 1", r"(?<= )>=(?= )", ">"),
    ("bound - 1", r"(?<= )>(?= )", ">="),
]

# (file, line without spaces) → why the mutant computes the same.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("attention.cu", "for(ints=begin_key;s<end_key;s+=TILE){"): "one more tile, hidden or of zeros",
    ("attention.cu", "for(intt=begin_query;t<end_query;t+=TILE){"): "one more tile, hidden or of zeros",
    ("attention.cu", "for(ints=split*split_keys;s<end_key;s+=TILE){"): "one more tile, hidden or of zeros",
    ("2_tiled.cu", "for(inti=0;i<inner;i+=TILE){"): "one more tile, of zeros",
    ("2_tiled.cu", "for(intslot=offsets[e]+ty;slot-ty<end;slot+=TILE){"): "one more tile, of zeros",
    ("4_tensor_core.cu", "if(i*DEPTH<inner){"): "one more tile of nothing but zeros is copied, and never multiplied",
    ("4_tensor_core.cu", "for(inti=0;i<STAGES-1;i++)copy(i);"): "the next tile is copied twice, to the same place",
}


class Mutant(NamedTuple):
    """One broken place."""

    path: Path
    line: int  # from 1
    what: str
    text: str  # of the whole file

    def __str__(self) -> str:
        original = self.path.read_text().splitlines()[self.line - 1].strip()
        return f"{self.path.name}:{self.line} {self.what}: {original}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a source: code only, not its comments and directives."""
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if code.lstrip().startswith(("#", "template")):
            continue
        for what, pattern, replacement in MUTATIONS:
            for found in re.finditer(pattern, code):
                broken = code[: found.start()] + found.expand(replacement) + code[found.end() :]
                text = "".join([*lines[:number], broken.rstrip("\n") + "\n", *lines[number + 1 :]])
                yield Mutant(path, number + 1, what, text)


def tests_of(path: Path) -> list[str]:
    """Return the tests that must notice: of the component, or for a header all."""
    if path.parent == INCLUDE:
        return ["tests/cuda"]
    component = path.parent.name if path.parent != KERNELS else path.stem
    return [f"tests/cuda/test_{component}.py"]


def survives(mutant: Mutant, copy: Path) -> bool | None:
    """Return whether the tests pass with the mutant in a copy of the project; None if it does not compile."""
    target = copy / mutant.path.relative_to(ROOT)
    target.write_text(mutant.text)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests_of(mutant.path)]
    environment = os.environ | {"PYTHONPATH": str(copy), "TINYMOE_CACHE": str(copy / "cache")}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    finally:
        shutil.copy(mutant.path, target)
    if "error:" in done.stdout and "g++" in done.stdout:
        return None
    return done.returncode == 0


def main() -> None:
    """Print every survivor and the score; exit with 1 if one is not known to be equivalent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="kernels or headers (all)")
    files = parser.parse_args().files or sorted([*KERNELS.rglob("*.cu"), *INCLUDE.glob("*.h")])
    noticed, survivors, equivalent = 0, [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", ".hypothesis", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for path in (file.resolve() for file in files):
            for mutant in mutants(path):
                line = path.read_text().splitlines()[mutant.line - 1]
                known = EQUIVALENT.get((path.name, "".join(line.split("//")[0].split())))
                alive = survives(mutant, copy)
                noticed += alive is False
                if alive:
                    equivalent += bool(known)
                    survivors += [] if known else [mutant]
                    print(f"survives: {mutant}" + (f" ({known})" if known else ""), flush=True)
    total = noticed + len(survivors)
    print(f"noticed {noticed} of {total} mutants; {equivalent} more are equivalent")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
