"""`tinymoe doctor`: it finds what is here, names what brings what is not, and outlives whatever is broken."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from tinymoe import doctor
from tinymoe.doctor import Finding


def finding(name: str) -> Finding:
    (look,) = [look for look in doctor.LOOKS if look[0] == name]
    return doctor._finding(*look)


def program(path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def cupy(tmp_path, monkeypatch):
    """Put a module in CuPy's place."""

    def install(text: str) -> None:
        (tmp_path / "cupy").mkdir()
        (tmp_path / "cupy" / "__init__.py").write_text(text)
        (tmp_path / "cupy" / "cuda.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))

    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        del sys.modules[name]


def test_everything_is_looked_at_once_and_what_runs_this_test_is_well():
    found = {each.name: each for each in doctor.examine()}
    assert list(found) == [look[0] for look in doctor.LOOKS]
    for name in ("Python", "NumPy", "CPU", "memory"):
        assert found[name].found
        assert found[name].fix is None
    assert ".".join(map(str, sys.version_info[:3])) in found["Python"].found


def test_whatever_a_look_raises_is_a_finding(monkeypatch, capsys):
    def fail():
        raise OSError("the disk is on fire\nand more")

    monkeypatch.setattr(doctor, "LOOKS", [(name, enables, fix, fail) for name, enables, fix, _ in doctor.LOOKS])
    doctor.command()
    text = capsys.readouterr().out
    assert text.count("OSError: the disk is on fire") == len(doctor.LOOKS)
    assert "and more" not in text


def test_absent_cupy_names_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    absent = finding("CuPy")
    assert absent.found is None
    assert "pip install 'tinymoe[cuda12]'" in absent.fix
    assert "--backend cuda" in absent.enables


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise ImportError('\\n=====\\nFailed') from ImportError('libnvrtc.so.12: no such file')", "libnvrtc.so.12"),
        ("import cupy_backends_of_another_release", "cupy_backends_of_another_release"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_broken_cupy_is_reported_as_broken_not_as_absent(cupy, text, says):
    cupy(text)
    broken = finding("CuPy")
    assert says in broken.found
    assert broken.fix


def test_gpu_is_named_by_cupy(cupy):
    cupy(
        "import sys, types\n__version__ = '14.0'\n"
        "runtime = types.SimpleNamespace(getDeviceCount=lambda: 2,\n"
        "    getDeviceProperties=lambda number: {'name': b'Toy %d' % number, 'totalGlobalMem': 8 * 10**9})\n"
        "cuda = sys.modules['cupy.cuda'] = types.SimpleNamespace(runtime=runtime)\n"
    )
    assert finding("CuPy") == Finding("CuPy", "14.0", doctor.CUDA, None)
    assert finding("GPU").found == "Toy 0, 8 GB; Toy 1, 8 GB"


def test_gpu_without_cupy_is_listed_by_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert finding("GPU").found is None
    program(tmp_path / "nvidia-smi", "echo 'Toy, 8192 MiB, 550.1'")
    assert finding("GPU").found == "Toy, 8192 MiB, 550.1 (by nvidia-smi, not by CuPy)"
    program(tmp_path / "nvidia-smi", "echo 'could not talk to the driver'; exit 9")
    assert "could not talk to the driver" in finding("GPU").found
    assert finding("GPU").fix


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_compiler_is_found_by_having_it_compile(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -O1")
    found = finding("C++ compiler")
    assert "g++" in found.found
    assert found.fix is None
    monkeypatch.setattr(doctor, "CXX17", "int main() { return no_such_name; }")
    assert "no_such_name" in finding("C++ compiler").found
    assert finding("C++ compiler").fix


def test_compiler_that_is_absent_or_misnamed_or_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    absent = finding("C++ compiler")
    assert absent.found is None
    assert "apt-get install g++" in absent.fix
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    assert "'no-such-compiler'" in finding("C++ compiler").found
    monkeypatch.setenv("CXX", "unbalanced 'quote")
    assert finding("C++ compiler").fix
    monkeypatch.delenv("CXX")
    program(tmp_path / "clang++", "echo 'unknown standard c++17' >&2; exit 1")
    assert "unknown standard c++17" in finding("C++ compiler").found
    assert finding("C++ compiler").fix
    program(tmp_path / "clang++", "echo 'toy clang 99'")
    assert finding("C++ compiler") == Finding("C++ compiler", "toy clang 99, compiles C++17", absent.enables, None)


def test_packages_are_found_by_their_metadata_alone():
    assert doctor.look_for_package("pytest")() == pytest.__version__
    assert doctor.look_for_package("no-such-distribution")() is None


def test_more_blas_threads_than_cores_are_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 0.0)
    wrong = finding("BLAS")
    assert "usable cores: 0" in wrong.found
    assert "OMP_NUM_THREADS" in wrong.fix


def test_table_keeps_to_80_columns_and_shows_the_extras_in_brackets():
    findings = [
        Finding("Python", "3.11", "everything", None),
        Finding("CuPy", None, "kernels", "pip install 'tinymoe[cuda12]'"),
        Finding("GPU", "ImportError: " + "long [bold]reason[/] " * 12, "kernels", "nothing"),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(doctor.render(findings))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "'tinymoe[cuda12]'" in text
    assert "[bold]reason[/]" in text
    assert [word for word in text.split() if word in ("ok", "absent", "wrong")] == ["ok", "absent", "wrong"]


def test_json_holds_every_finding(capsys):
    doctor.command(as_json=True)
    read = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in read] == [look[0] for look in doctor.LOOKS]
    assert all(set(each) == {"name", "found", "enables", "fix"} for each in read)


def test_doctor_speaks_even_where_numpy_and_threadpoolctl_are_broken():
    code = (
        "import sys; sys.modules.update(numpy=None, threadpoolctl=None); from tinymoe import doctor; doctor.command()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "pip install --force-reinstall numpy" in done.stdout


def test_kernels_are_shown_with_their_registers(capsys, monkeypatch):
    pytest.importorskip("cuda.bindings")
    from tinymoe.cuda import device

    monkeypatch.setattr(device, "ALL", [kernels for kernels in device.ALL if kernels.source.stem == "rmsnorm"])
    doctor.kernels()
    shown = capsys.readouterr().out
    for architecture in ("sm_80", "sm_90", "sm_90a"):
        assert architecture in shown
    assert "rmsnorm_forward<bfloat16>" in shown


def test_kernels_say_where_they_run_and_which_rung_multiplies():
    found = finding("kernels").found
    assert "emulated" in found or "gpu" in found or "checked" in found
    assert "4_tensor_core" in found
