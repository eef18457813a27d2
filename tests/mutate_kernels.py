"""Break the kernels, one place at a time, and see whether their tests notice.

Run as `python tests/mutate_kernels.py [FILE …]`. A mutant is a kernel without one barrier, wait or atomic, with a wait
for one copy less, or with one bound shifted by one, up or down. It is noticed if the tests of its component fail, or do
not end, with as many examples as `make test` draws. Mutants that do not compile do not count. A survivor that computes
the same as the original is listed in equivalent_mutants.py with the reason.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from equivalent_mutants import EQUIVALENT

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "tinymoe" / "cuda" / "kernels"
INCLUDE = ROOT / "tinymoe" / "cuda" / "include"
SECONDS = 600  # of a test run, after which a mutant is endless

# What to break: a pattern, and what takes its place.
MUTATIONS = [
    ("no barrier", r"__sync(threads|warp)\(\);", r"/* \g<0> */;"),
    ("no wait", r"\b\w*(wait|commit|arrive|fence)\w*(<[^>]*>)?\([^;{]*\);", r"/* \g<0> */;"),
    ("wait for less", r"(wait\w*<[^>]*)>", r"\1 + 1>"),
    ("no atomic", r"atomic\w+\([^;]*\);", r"/* \g<0> */;"),
    ("plain update", r"atomicAdd\((.*), (.*?)\);", r"*(\1) += \2;"),
    ("plain update", r"atomicOr\((.*), (.*?)\);", r"*(\1) |= \2;"),
    ("bound + 1", r" < ", " <= "),
    ("bound - 1", r" < ", " + 1 < "),
    ("bound + 1", r" <= ", " - 1 <= "),
    ("bound - 1", r" <= ", " < "),
    ("bound + 1", r" > ", " - 1 > "),
    ("bound - 1", r" > ", " >= "),
    ("bound + 1", r" >= ", " > "),
    ("bound - 1", r" >= ", " + 1 >= "),
    ("bound - 1", r"; (\w+); ", r"; \1 > 1; "),
]


class Mutant(NamedTuple):
    """One broken place."""

    path: Path
    line: int  # from 1
    what: str
    code: str  # what the line becomes

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line} {self.what}: {self.code.strip()}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a source: of its code, not of comments, directives and template parameters."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.split("//")[0].rstrip()
        if code.lstrip().startswith(("#", "template")):
            continue
        for what, pattern, replacement in MUTATIONS:
            for found in re.finditer(pattern, code):
                broken = code[: found.start()] + found.expand(replacement) + code[found.end() :]
                yield Mutant(path, number, what, broken)


def tests_of(path: Path) -> list[str]:
    """Return pytest's arguments for the tests that must notice: of the component, or of those that include a header."""
    if path.parent == INCLUDE:
        users = [source for source in sorted(KERNELS.rglob("*.cu")) if f'"{path.name}"' in source.read_text()]
        return sorted({test for user in users for test in tests_of(user) if test.endswith(".py")})
    if path.parent == KERNELS:
        return [f"tests/cuda/test_{path.stem}.py"]
    others = [rung.stem for rung in sorted(path.parent.glob("*.cu")) if rung != path]
    return [f"tests/cuda/test_{path.parent.name}.py", "-k", " and ".join(f"not {rung}" for rung in others)]


def try_out(path: Path, mutant: Mutant | None, copy: Path) -> str:
    """Run a source's tests in a copy of the project: a mutant survives, is noticed, is endless, or does not compile."""
    target = copy / path.relative_to(ROOT)
    original = target.read_text()
    if mutant:
        lines = original.splitlines()
        target.write_text("\n".join([*lines[: mutant.line - 1], mutant.code, *lines[mutant.line :], ""]))
    command = [sys.executable, "-m", "pytest", "-xq", "--tb=short", "-p", "no:cacheprovider", *tests_of(path)]
    paths = {"PYTHONPATH": str(copy), "TINYMOE_CACHE": str(copy / "cache")}
    environment = {**os.environ, **paths, "HYPOTHESIS_PROFILE": "mutation"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "endless"
    finally:
        target.write_text(original)
    if "error:" in done.stdout and "-std=c++17" in done.stdout:
        return "does not compile"
    return "noticed" if done.returncode else "survives"


def main() -> None:
    """Print every survivor and the score of each file; exit with 1 if a survivor is not known to be equivalent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="kernels or headers (all)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="mutants at a time (%(default)s: one a core)")
    arguments = parser.parse_args()
    sources = arguments.files or sorted([*KERNELS.rglob("*.cu"), *INCLUDE.glob("*.h")])
    copies, total = SimpleQueue[Path](), Counter[str]()

    def outcome_of(path: Path, mutant: Mutant | None = None) -> str:
        copy = copies.get()
        try:
            return try_out(path, mutant, copy)
        finally:
            copies.put(copy)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        for job in range(arguments.jobs):
            copy = Path(folder) / str(job)
            for part in ("tinymoe", "tests", "pyproject.toml"):
                (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, copy / part)
            copies.put(copy)
        for path in (source.resolve() for source in sources):
            here, score = list(mutants(path)), Counter[str]()
            if here and outcome_of(path) != "survives":
                sys.exit(f"{path.name}: the tests fail as it is")
            for mutant, outcome in zip(here, pool.map(lambda mutant: outcome_of(mutant.path, mutant), here)):
                reason = reason_of(mutant)
                if outcome == "survives" and reason:
                    outcome = "equivalent"
                if outcome in ("survives", "endless", "equivalent"):
                    print(f"  {outcome}: {mutant}" + (f" ({reason})" if reason else ""), flush=True)
                score[outcome] += 1
            print(f"{path.name}: {summary(score)}", flush=True)
            total += score
    print(f"all: {summary(total)}")
    sys.exit(total["survives"] > 0)


def reason_of(mutant: Mutant) -> str | None:
    """Return why a mutant is known to be equivalent, if it is."""
    code, known = "".join(mutant.code.split()), EQUIVALENT.get(mutant.path.name, {})
    return next((reason for begin, reason in known.items() if code.startswith(begin)), None)


def summary(score: Counter[str]) -> str:
    """Return how many of the mutants that count were noticed, and what became of the others."""
    noticed = score["noticed"] + score["endless"]
    others = "".join(f"; {count} {outcome}" for outcome, count in sorted(score.items()) if outcome != "noticed")
    return f"noticed {noticed} of {noticed + score['survives']}{others}"


if __name__ == "__main__":
    main()
