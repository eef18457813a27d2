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
FLAGS = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-g3"]  # with macros, so that a debugger knows threadIdx
FLAGS += ["-U_FORTIFY_SOURCE"]  # its longjmp refuses to leave a fiber whose stack lies above the caller's
KERNEL_FLAGS = {  # of the two builds: -Og costs the checked one nothing, and a debugger stops at barriers too
    "emulated": ["-O2", "-fno-plt"],  # no stubs, whose instructions are of no line
    "checked": ["-Og", "-fno-plt", "-fsanitize=thread,bounds,alignment"],
}
# A kernel's library must keep to itself: its .bss is shared memory and nothing else (no start files), and a kernel of
# the same name in another library is another kernel.
KERNEL_LINK = ["-shared", "-nostartfiles", "-nostdlib", "-Wl,-Bsymbolic"]
if sys.platform == "darwin":  # written for its linker, not yet run there
    KERNEL_LINK = ["-shared", "-undefined", "dynamic_lookup"]
    KERNEL_LINK += [f"-Wl,-exported_symbol,_{name}" for name in ("kernel_*", "library_*", "shared_begin")]


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
    InputError
        The checked build is not to be had here.
    """
    if build == "checked" and (sys.platform != "linux" or "clang" in _version()):  # clang checks no copy of a float4
        raise InputError("checking kernels needs g++ on Linux; TINYMOE_DEVICE=emulated runs them unchecked")
    entries = "".join(f"EMULATOR_KERNEL({i}, {expression})\n" for i, expression in enumerate(expressions))
    text = f'#include "{source.resolve()}"\n{entries}EMULATOR_LIBRARY\n'
    depends = [source, *source.parent.glob("*.h"), runtime()]
    return _built(f"{source.stem}-{build}", depends, KERNEL_FLAGS[build], KERNEL_LINK, text)


def _built(name: str, sources: list[Path], flags: list[str], link: list[str], text: str) -> Path:
    """Return the library built of ``text`` if given, else of the sources; its name tells all that it depends on."""
    # g++ would share static variables of templates among libraries; clang++ wants to be asked twice for macros.
    flags = ["-fdebug-macro" if "clang" in _version() else "-fno-gnu-unique", *flags]
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
