"""What is here: each thing that tinymoe can use, its version, what it is for, and the command that brings it."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tinymoe.scale.devices import cpu_quota, memory

if TYPE_CHECKING:
    from rich.table import Table

CXX17 = "#include <tuple>\nint main() { auto [a, b] = std::make_tuple(1, -1); if constexpr (true) return a + b; }\n"


class Finding(NamedTuple):
    """One thing that was looked for.

    Parameters
    ----------
    name
        What it is.
    found
        Its version and state, or what is wrong with it; None if it is not here.
    enables
        What it is for.
    fix
        What to do if it is absent or something is wrong with it; None if all is well.
    """

    name: str
    found: str | None
    enables: str
    fix: str | None


# Each look returns what is found, None if there is nothing, and raises if something is wrong.


def look_at_python() -> str:
    """Return the interpreter and the system under it."""
    return f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"


def look_at_numpy() -> str:
    """Return NumPy's version."""
    import numpy

    return numpy.__version__


def look_at_blas() -> str:
    """Return the library behind NumPy's matrix products; it is wrong to have more threads than usable cores."""
    import numpy
    import threadpoolctl

    from tinymoe.workers import usable_cores

    loaded = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    if not loaded:  # Accelerate, for one, is unknown to threadpoolctl
        built = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{built['name']} {built['version']}"
    blas, cores = loaded[0], min(usable_cores(), cpu_quota())
    found = f"{blas['internal_api']} {blas['version']}, threads: {blas['num_threads']}"
    if blas["num_threads"] >= cores + 1:  # a quota may be a fraction
        raise RuntimeError(f"{found}, but usable cores: {cores:g}")
    return found


def look_at_cpu() -> str:
    """Return the processor's model, and how many of its cores this process may use."""
    from tinymoe.workers import usable_cores

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    limit = f", for the time of {cpu_quota():g}" if cpu_quota() < usable_cores() else ""
    return f"{model}, usable cores: {usable_cores()} of {os.cpu_count()}{limit}"


def look_at_memory() -> str:
    """Return how much memory there is and how much of it is free."""
    total, available = memory()
    return f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB available"


def look_at_cupy() -> str | None:
    """Return CuPy's version, if it is installed; it must import, for a CuPy of another CUDA does not."""
    try:
        import cupy

        return cupy.__version__
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return None
        raise


def look_at_gpu() -> str | None:
    """Return the GPUs that CuPy sees, or else those that nvidia-smi lists."""
    try:
        from cupy.cuda import runtime

        gpus = [runtime.getDeviceProperties(number) for number in range(runtime.getDeviceCount())]
        return "; ".join(f"{gpu['name'].decode()}, {gpu['totalGlobalMem'] / 1e9:.0f} GB" for gpu in gpus) or None
    except Exception:  # CuPy is absent, broken or sees none
        if not shutil.which("nvidia-smi"):
            return None
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return f"{'; '.join(_output(query).splitlines())} (by nvidia-smi, not by CuPy)"


def look_at_compiler() -> str | None:
    """Return the C++ compiler, $CXX or else g++ or clang++, after it has compiled a program in C++17."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    command = chosen or next(([name] for name in ("g++", "clang++") if shutil.which(name)), [])
    if not command:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(CXX17)
        _output([*command, "-std=c++17", str(source), "-o", str(source.with_suffix(""))])
    return f"{_output([*command, '--version']).splitlines()[0]}, compiles C++17"


def look_at_kernels() -> str:
    """Return where kernels run now, and which rung of the grouped GEMM multiplies what."""
    import numpy as np

    from tinymoe.cuda import device
    from tinymoe.cuda.grouped_gemm import rung

    best, other = rung(np.empty(0, device.BFLOAT16), 8), rung(np.empty(0, np.float32), 8)
    return f"on {device.current()}; bfloat16 of sizes that 8 divides: {best}, all else: {other}"


def look_for_package(name: str) -> Callable[[], str | None]:
    """Return the look for an installed distribution, which is not imported: torch alone takes seconds."""

    def look() -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return look


CUDA = "the CUDA kernels: --backend cuda"
REPORT = "report it: this look should not fail"
TOKENIZER = "pip install 'tinymoe[tokenizer]'"
PARITY = "pip install 'tinymoe[parity]'"
# Its name, what it is for, what to do if it is absent or something is wrong with it, and the look at it.
LOOKS: list[tuple[str, str, str, Callable[[], str | None]]] = [
    ("Python", "everything", REPORT, look_at_python),
    ("NumPy", "the reference: every forward and backward", "pip install --force-reinstall numpy", look_at_numpy),
    ("BLAS", "matrix products, most of a step's time", "export OMP_NUM_THREADS=N, N the usable cores", look_at_blas),
    ("CPU", "training and generating", REPORT, look_at_cpu),
    ("memory", "weights and KV cache: `tinymoe plan` says what fits", REPORT, look_at_memory),
    ("tokenizers", "models with a tokenizer.json", TOKENIZER, look_for_package("tokenizers")),
    ("sentencepiece", "models with a tokenizer.model", TOKENIZER, look_for_package("sentencepiece")),
    ("torch", "the parity tests", PARITY, look_for_package("torch")),
    ("transformers", "the parity tests", PARITY, look_for_package("transformers")),
    (
        "C++ compiler",
        f"{CUDA}, without a GPU",
        "apt-get install g++, or export CXX=(a compiler of C++17)",
        look_at_compiler,
    ),
    ("CuPy", CUDA, "pip install 'tinymoe[cuda12]', or [cuda13] where nvidia-smi shows CUDA 13", look_at_cupy),
    (
        "NVRTC",
        "compiling the kernels where there is no GPU: `tinymoe doctor --kernels`",
        "pip install 'tinymoe[nvrtc]'",
        look_for_package("cuda-bindings"),
    ),
    ("kernels", "what runs them, and the grouped GEMM's rungs", REPORT, look_at_kernels),
    ("GPU", CUDA, "nothing, if there is none: the kernels run on this CPU, too", look_at_gpu),
]


def examine() -> list[Finding]:
    """Look for everything in ``LOOKS``; whatever a look raises is a finding too."""
    return [_finding(*look) for look in LOOKS]


def render(findings: list[Finding]) -> "Table":
    """Return the findings as a table of three columns: how it is, its name, and all there is to say."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "wrong": "red", "absent": "yellow"}
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        state = "ok" if finding.fix is None else "wrong" if finding.found else "absent"
        lines = [finding.found, f"for {finding.enables}", finding.fix and f"-> {finding.fix}"]
        # Text, since a str would be read as markup and lose the [extras].
        table.add_row(Text(state, colours[state]), Text(finding.name, "bold"), Text("\n".join(filter(None, lines))))
    return table


def command(as_json: bool = False) -> None:
    """Print what is here, as a table or as JSON."""
    findings = examine()
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        from rich.console import Console

        Console().print(render(findings))


def kernels() -> None:
    """Compile every kernel that a launcher may ask for, and print the registers and memory that each takes.

    Raises
    ------
    InputError
        NVRTC is not installed.
    """
    from tinymoe.cuda import device, nvrtc  # and with the package all its kernels

    print(f"{'kernel':<62} {'for':<7} {'registers':>9} {'shared':>7} {'stack':>6} {'spilled':>8}   bytes")
    for declared in device.ALL:
        for architecture in nvrtc.architectures_of(declared):
            compiled = nvrtc.compile_cubin(declared, architecture)
            for expression, taken in compiled.resources.items():
                name = f"{declared.source.stem}: {expression}"
                sizes = f"{taken.registers:>9} {taken.shared:>7} {taken.stack:>6} {taken.spills:>8}"
                print(f"{name:<62} {architecture:<7} {sizes}", flush=True)


def _finding(name: str, enables: str, fix: str, look: Callable[[], str | None]) -> Finding:
    try:
        found = look()
    except Exception as error:  # a doctor outlives every disease
        cause = error.__cause__ or error  # CuPy wraps the one line that matters in twenty
        reason = str(cause).strip().partition("\n")[0]
        return Finding(name, f"{type(cause).__name__}: {reason}", enables, fix)
    return Finding(name, found, enables, None if found else fix)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        telling = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(f"{command[0]} exits with {done.returncode}: {telling}")
    return done.stdout
