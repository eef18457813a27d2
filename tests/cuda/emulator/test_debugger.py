"""A debugger stops in a kernel: at a line, in a chosen thread, and shows its arguments, its locals and threadIdx."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "kernels" / "debugger.cu"
WRITE, BARRIER = (  # lines of the kernel
    next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if words in line)
    for words in ("values[t] =", "__syncthreads")
)
PROGRAM = f"""
import numpy as np
from tinymoe.cuda import device
x, out = device.array(np.arange(1000, 1192, dtype=np.int32)), device.zeros(192, np.int32)
device.Kernels({str(SOURCE)!r}, "turned_around").launch("turned_around", 3, 64, x, out)
print("out begins with", out[0])
"""


def said_by_gdb(build, line, *commands):
    """Return what gdb says to commands in thread 37 of block 1, stopped at a line of the kernel."""
    if not shutil.which("gdb"):
        pytest.skip("no gdb")
    stop = f"break debugger.cu:{line} if blockIdx.x == 1 && threadIdx.x == 37"
    arguments = ["-nx", "-batch", "-iex", "set auto-load off", "-iex", "set debuginfod enabled off"]
    for command in ("set breakpoint pending on", stop, "run", *commands):
        arguments += ["-ex", command]
    done = subprocess.run(
        ["gdb", *arguments, "--args", sys.executable, "-c", PROGRAM],
        env=os.environ | {"TINYMOE_DEVICE": build},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"gdb may trace no process here: {done.stderr}")
    return done.stdout


@pytest.mark.parametrize("build", ["emulated", "checked"])
def test_gdb_stops_at_a_line_and_the_stack_ends_where_the_fiber_began(build):
    said = said_by_gdb(build, WRITE, "backtrace", "print threadIdx", "delete", "continue")
    frames = re.findall(r"^#\d+ .*", said, re.MULTILINE)
    assert re.match(rf"#0  turned_around \(x=.*, out=.*0x.*\) at .*debugger\.cu:{WRITE}$", frames[0]), said
    assert "emulator_first ()" in frames[-1], said
    assert "??" not in "".join(frames), said
    assert "$1 = {x = 37, y = 0, z = 0}\n" in said
    assert "\nout begins with 1063\n" in said


def test_gdb_steps_over_a_barrier_and_is_still_in_the_same_thread():
    commands = ["print t", "print values[t]", "print values[63]", "next", "print threadIdx.x", "print values[63]"]
    said = said_by_gdb("checked", BARRIER, *commands)
    values = re.findall(r"^\$\d = (.*)", said, re.MULTILINE)
    assert values == ["37", "1101", "-1", "37", "1127"], said  # -1: nobody has written it
    assert re.search(rf"^{BARRIER + 1}\s", said, re.MULTILINE), said
