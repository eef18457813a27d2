"""Compile every kernel for NVIDIA's cards and write what each takes to records/compile.json.

Run as `python docs/compile_table.py` where NVRTC is installed (the extra `nvrtc`); it needs no GPU.
"""

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path

import tinymoe.cuda  # declares all kernels
from tinymoe.cuda import device, nvrtc

RECORD = Path(__file__).parent / "records" / "compile.json"


def main() -> None:
    """Write the record."""
    kernels = []
    for declared in device.ALL:
        source = declared.source.relative_to(device.KERNELS).as_posix()
        of = {
            architecture: nvrtc.compile_cubin(declared, architecture)
            for architecture in nvrtc.architectures_of(declared)
        }
        for expression in declared.expressions:
            taken = {architecture: compiled.resources[expression]._asdict() for architecture, compiled in of.items()}
            kernels.append({"file": source, "kernel": expression, "taken": taken})
        print(source, flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "tinymoe": tinymoe.__version__,
        "nvidia-cuda-nvrtc": version("nvidia-cuda-nvrtc"),
        "architectures": list(nvrtc.ARCHITECTURES),
        "kernels": kernels,
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
