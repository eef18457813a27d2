"""`make gpu`: every step runs whatever became of those before, and a machine without a GPU is told so in a line."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import every_kernel
import gpu_steps
import pytest

from tinymoe.cuda import device


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(gpu_steps, "gpu_is_there", lambda: True)


def python(code):
    return [sys.executable, "-c", code]


def test_each_step_is_told_as_passed_failed_or_skipped_and_none_keeps_the_next(gpu, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new"
    done = {
        "tests": python("raise SystemExit(3)"),
        "memcheck": ["no-such-sanitizer", "memcheck"],
        "repeat": python("import time; time.sleep(60)"),
        "kernels": python(f"import tinymoe; open({str(out / 'kernels.json')!r}, 'w')"),
    }
    monkeypatch.setattr(gpu_steps, "steps", lambda *_: done)
    monkeypatch.setattr(gpu_steps, "LONGEST", 5)
    assert gpu_steps.main(["--out", str(out)]) == 1
    *_, tests, memcheck, repeat, kernels, where = capsys.readouterr().out.splitlines()
    assert tests.startswith("tests       failed: status 3")
    assert memcheck == "memcheck    skipped: no-such-sanitizer is not installed"
    assert repeat == "repeat      failed: not done after 5 s"
    assert kernels.startswith("kernels     passed")
    assert where == f"records: {out}"
    assert (out / "kernels.json").exists()
    assert gpu_steps.main(["--out", str(out), "kernels", "memcheck"]) == 0


def test_a_step_that_is_stopped_leaves_nothing_running(monkeypatch, tmp_path):
    late = tmp_path / "late"
    grandchild = python(f"import time; time.sleep(2); open({str(late)!r}, 'w')")
    monkeypatch.setattr(gpu_steps, "LONGEST", 1)
    assert gpu_steps.run("memcheck", python(f"import subprocess; subprocess.run({grandchild!r})")).startswith("failed")
    time.sleep(2.5)
    assert not late.exists()


def test_without_a_gpu_it_stops_at_once_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_steps, "gpu_is_there", lambda: False)
    monkeypatch.setattr(gpu_steps, "run", None)
    assert gpu_steps.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr() == ("", "no GPU that CuPy can use: nothing was run\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("nvidia-smi") or not shutil.which("make"), reason="a GPU, or no make")
def test_make_installs_nothing_without_a_gpu():
    make, outside = ["make", "gpu"], {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(make, cwd=gpu_steps.ROOT, env=outside, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no GPU: nvidia-smi finds none here, and nothing was installed or run\n")


def test_an_unknown_step_is_refused_before_anything_runs(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_steps, "run", None)
    with pytest.raises(SystemExit) as refused:
        gpu_steps.main(["tests", "everything"])
    assert refused.value.code == 2
    assert "no step 'everything'; there is tests, memcheck" in capsys.readouterr().err


def test_steps_are_of_files_that_there_are_in_their_order_and_records_are_named_by_date():
    found = gpu_steps.steps(Path("/records"), "2000-01-02-0304")
    assert [*found] == ["tests", "memcheck", "racecheck", "repeat", "kernels", "moe"]
    named = {word for command in found.values() for word in command if word.startswith("tests/")}
    assert all((gpu_steps.ROOT / name).exists() for name in named)
    assert found["moe"][-1] == "/records/moe-2000-01-02-0304.json"
    run = [gpu_steps.ROOT / word for word in (*found["tests"], *found["repeat"]) if word.startswith("tests/")]
    for path in gpu_steps.ROOT.glob("tests/**/test_*.py"):
        if path != Path(__file__) and any(word in path.read_text() for word in ("mark.gpu", "EVERYWHERE")):
            assert any(path.is_relative_to(step) for step in run), f"{path} has tests of a GPU and is in no step"


def test_every_kernel_of_every_instantiation_is_launched():
    """In a process of its own, where no test has declared kernels."""
    command, emulated = [sys.executable, every_kernel.__file__], os.environ | {"TINYMOE_DEVICE": "emulated"}
    done = subprocess.run(command, env=emulated, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" kernels launched, 0 not\n")


def test_a_kernel_that_is_not_launched_is_named(monkeypatch, capsys):
    monkeypatch.setattr(every_kernel, "launch_all", lambda: None)
    with device.using("emulated"):
        assert every_kernel.main() == 1
    assert "('rope.cu', " in capsys.readouterr().out
