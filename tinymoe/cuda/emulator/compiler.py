"""Compile the emulator's runtime and kernels with the machine's C++ compiler, once for each content."""

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tinymoe.errors import InputError

HERE = Path(__file__).parent
INCLUDE = HERE.parent / "include"
RUNTIME = [HERE / name for name in ("scheduler.cpp", "checker.cpp", "asynchronous.cpp", "hopper.cpp", "fiber.cpp")]
FLAGS = ["-std=c++17", "-fPIC", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # its longjmp refuses to leave a fiber whose stack lies above the caller's
KERNEL_FLAGS = {  # of the two builds
    "emulated": ["-O2", "-fno-plt"],  # no stubs, whose instructions are of no line
    "checked": ["-O1", "-fno-plt", "-fsanitize=thread,bounds,alignment"],
}


def compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, which may have options, or the first of g++ and clang++.

    Raises
    ------
    InputError
        There is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise InputError(
        "running CUDA kernels on this CPU needs a C++17 compiler (apt install g++, or set CXX); on an NVIDIA GPU it "
        "needs CuPy (pip install 'tinymoe[cuda13]')"
    )


def runtime() -> Path:
    """Return the library with the scheduler and the checker."""
    return _built("runtime", RUNTIME, [], ["-O2", "-shared"], "")


def library(source: Path, expressions: tuple[str, ...], build: str) -> Path:
    """Return the library with instantiations of a source's kernels.

    Parameters
    ----------
    source
        A .cu file.
    expressions
        Kernels with their template arguments, ``name<float, 64>``: number i becomes the entry ``kernel_i``.
    build
        ``"emulated"`` or ``"checked"``.

    Raises
    ------
    RuntimeError
        It does not compile; the message is the compiler's.
    """
    entries = "".join(f"EMULATOR_KERNEL({i}, {expression})\n" for i, expression in enumerate(expressions))
    text = f'#include "{source.resolve()}"\n{entries}EMULATOR_LIBRARY\n'
    # The library's .bss must hold shared memory and nothing else, hence neither start files nor unique symbols.
    link = ["-shared", "-nostartfiles", "-nostdlib", "-Wl,-Bsymbolic", str(runtime())]
    return _built(f"{source.stem}-{build}", [source, *source.parent.glob("*.h")], KERNEL_FLAGS[build], link, text)


def _built(name: str, sources: list[Path], flags: list[str], link: list[str], text: str) -> Path:
    """Return the library built of ``text`` if given, else of the sources; its name tells all that it depends on."""
    if "clang" not in _version():
        flags = ["-fno-gnu-unique", *flags]
    command = [*compiler(), *FLAGS, *flags, f"-I{INCLUDE}", f"-I{HERE}"]
    digest = hashlib.sha256(repr((_version(), command, link, text)).encode())
    for path in sorted([*sources, *HERE.glob("*.h"), *INCLUDE.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    target = cache() / f"{name}-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        unit, compiled, partial = (Path(folder) / name for name in ("unit.cpp", "unit.o", "library.so"))
        if text:
            unit.write_text(text)
            _run([*command, "-c", str(unit), "-o", str(compiled)])
            _run([*compiler(), str(compiled), *link, "-o", str(partial)])
        else:
            _run([*command, *map(str, sources), *link, "-o", str(partial)])
        os.replace(partial, target)  # others may build the same: whoever renames last wins, all alike
    return target


def cache() -> Path:
    """Return the folder of compiled kernels: $TINYMOE_CACHE, or tinymoe in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TINYMOE_CACHE") or home / "tinymoe")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def line_of(library: Path, offset: int) -> tuple[str, int] | None:
    """Return file and line of the instruction at an offset in a library, or None where no tool tells."""
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if not tool or sys.platform != "linux":
        return None
    done = subprocess.run([tool, "-e", str(library), "-i", hex(offset)], capture_output=True, text=True)
    # Of the inlined lines the first that is not in a header of ours is the kernel's.
    lines = [found for found in map(re.compile(r"([^?].*):(\d+)").match, done.stdout.splitlines()) if found]
    chosen = next(
        (found for found in lines if Path(found[1]).parent not in (HERE, INCLUDE)), lines[0] if lines else None
    )
    return (chosen[1], int(chosen[2])) if chosen else None
