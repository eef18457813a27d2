"""What a machine with a GPU is asked for, step after step, whatever fails: what `make gpu` runs.

Run as ``python tests/gpu_steps.py [--out FOLDER] [STEP ...]``, without a step all of them in their order, by a Python
that has CuPy, cuda-bindings, pytest and Hypothesis. Records get their names from the time.
"""

import argparse
import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tinymoe.cuda.device import gpu_is_there

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "tinymoe" / "bench" / "records"
LONGEST = 600  # seconds of a step, so that one that hangs leaves time to the next
SANITIZER = "compute-sanitizer"


def steps(out, now):
    """Return the command of each step, in order."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--confcutdir=tests"]  # not the site's examples
    repeat, others = "tests/cuda/test_repeat.py", ("tests/test_bench_kernels.py", "tests/test_log_probs.py")
    bench = [sys.executable, "-m", "tinymoe", "bench"]
    sanitizer, every = [SANITIZER, "--error-exitcode=1", "--tool"], [sys.executable, "tests/every_kernel.py"]
    return {
        "tests": [*pytest, "tests/cuda", *others, f"--ignore={repeat}"],
        "memcheck": [*sanitizer, "memcheck", *every],
        "racecheck": [*sanitizer, "racecheck", *every],
        "repeat": [*pytest, repeat],
        "kernels": [*bench, "kernels", "--out", str(out / f"kernels-{now}.json")],
        "moe": [*bench, "moe", "--out", str(out / f"moe-{now}.json")],
    }


def run(name, command):
    """Run a step in the repository and return how it went, in a word or a few."""
    if shutil.which(command[0]) is None:
        return f"skipped: {command[0]} is not installed"
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    step = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = step.wait(LONGEST)
    except subprocess.TimeoutExpired:
        return f"failed: not done after {LONGEST} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(step.pid, signal.SIGKILL)  # whatever it has started: the next step is to have the GPU alone
        step.wait()
    return f"{f'failed: status {status}' if status else 'passed'}, {time.monotonic() - began:.0f} s"


def main(arguments=None):
    """Run the steps that are asked for, and say of each how it went; 1 if any failed."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", nargs="*", help=", ".join(steps(RECORDS, now)))
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records (tinymoe/bench/records)")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    every = steps(out, now)
    unknown = [name for name in options.step if name not in every]
    if unknown:
        parser.error(f"no step {unknown[0]!r}; there is {', '.join(every)}")
    if not gpu_is_there():
        print("no GPU that CuPy can use: nothing was run", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    told = {name: run(name, every[name]) for name in options.step or every}
    print("", *(f"{name:<12}{how}" for name, how in told.items()), f"records: {out}", sep="\n")
    return int(any(how.startswith("failed") for how in told.values()))


if __name__ == "__main__":
    sys.exit(main())
