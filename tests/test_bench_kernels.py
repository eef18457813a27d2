"""`tinymoe bench kernels`: it times everything there is, knows the floors, and refuses what it cannot measure."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from tinymoe import cli, cuda
from tinymoe.bench import components, kernels
from tinymoe.bench.components import COMPONENTS, SIZES
from tinymoe.bench.timing import machine
from tinymoe.cuda import device
from tinymoe.cuda.grouped_gemm import RUNGS
from tinymoe.errors import InputError

COMMAND = ["bench", "kernels", "--rounds", "1"]


@pytest.fixture(autouse=True)
def emulated():
    with device.using("emulated"):
        yield


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr(kernels, "COPIED_EMULATED", 2**12)
    monkeypatch.setattr(kernels, "SQUARE_EMULATED", 8)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "kernels.json"
    with device.using("emulated"):
        assert cli.main([*COMMAND, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def refused(capsys, *arguments):
    assert cli.main([*COMMAND, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"tinymoe: error: [^\n]+\n", err), err
    return err


# ---- what is measured


def test_every_component_and_every_rung_is_in_the_record(record):
    assert {case["component"] for case in record["cases"]} == {*COMPONENTS}
    assert {f"grouped_gemm {rung}" for rung in RUNGS} < {*COMPONENTS}
    # of others:
    inside = {"AdamW", "Variation", "adamw", "expert_ffn", "ffn", "swiglu", "route", "moe_decode", "rope_table"}
    names = {name.removesuffix("_backward") for name in cuda.__all__}
    assert names - inside - {"hf_load_balancing_loss"} <= {*COMPONENTS}  # that loss is for transformers' sake


def test_every_case_has_a_time_and_a_floor_or_a_reason(record):
    for case in record["cases"]:
        if "skipped" in case:
            assert case["component"].startswith("grouped_gemm")
            assert case["skipped"] == "it does not take float32"
            continue
        assert len(case["times"]) == record["rounds"] == 1
        assert case["median"] == case["times"][0] > 0
        assert case["bytes"] > 0
        ceilings = record["ceilings"]
        compute = case["flops"] / ceilings["bfloat16" if case["dtype"] == "bfloat16" else "float32"]
        assert case["floor"] == max(compute, case["bytes"] / ceilings["bytes"]) > 0


def test_record_says_that_it_was_emulated(record, capsys, briefly):
    assert record["device"] == "emulated"
    assert "no figure says anything of a GPU" in record["note"]
    assert record["machine"]["cores"] > 0
    assert record["sizes"]["toy"]["N"] == SIZES["toy"].N
    assert cli.main([*COMMAND, "--only", "rmsnorm", "3_register"]) == 0
    out = capsys.readouterr().out
    assert "no figure says anything of a GPU" in out
    lines = [line.split()[:2] for line in out.split("\n\n")[1].splitlines()[2:]]
    assert lines == [["rmsnorm", "forward"], ["rmsnorm", "backward"], *6 * [["grouped_gemm", "3_register"]]]


def test_draws_are_random_and_repeat_with_their_seed(monkeypatch):
    monkeypatch.setattr(components, "BLOCK", 7)
    first, again, other = (components.Draw("float32", seed)(5, 4) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert len({row.tobytes() for row in first}) == 5
    experts = components.Draw("int32", 0).experts(SIZES["toy"])
    assert all(len({*row}) == SIZES["toy"].k for row in experts.tolist())


# ---- floors, worked by hand


def work(name, size, itemsize=2):
    return COMPONENTS[name].work(SIZES[size], itemsize)


def test_work_of_the_experts():
    one = 3 * 4096 * 14336 * 2  # bytes of an expert: 352 MB
    assert one == 352_321_536
    (flops, moved), (flops_back, _) = work("experts", "mixtral-4096")
    assert (flops, flops_back) == (2_886_218_022_912, 5_772_436_045_824)
    assert moved == pytest.approx(8 * one + 2 * 8192 * 4096 * 2)
    (flops, moved), (_, moved_back) = work("experts", "mixtral-1")
    assert flops == 704_643_072
    assert moved == pytest.approx(2 * one + 4 * 4096 * 2)  # one token reads two experts,
    assert moved_back == pytest.approx((2 + 8) * one + (6 * 4096 + 4 * 14336) * 2)  # and all have a gradient


def test_work_of_attention():
    (flops, moved), (flops_back, moved_back) = work("attention", "mixtral-4096")
    pairs = 4096 * 4097 // 2
    assert pairs == 8_390_656
    assert (flops, flops_back) == (32 * 128 * 4 * pairs, 32 * 128 * 10 * pairs)
    assert moved == 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024)  # q, o, and the narrower k, v
    assert moved_back == 2 * moved
    ((flops, moved),) = work("attention_decode", "mixtral-1")
    assert (flops, moved) == (536_870_912, 2 * (2 * 4096 + 2 * 32768 * 1024))


@pytest.mark.parametrize("rung", RUNGS)
def test_work_of_the_grouped_gemm(rung):
    forward, dx, dw = work(f"grouped_gemm {rung}", "toy", 4)  # 40 tokens, 80 slots, 4 experts of 32 x 48
    assert [flops for flops, _ in (forward, dx, dw)] == 3 * [245_760]
    assert forward[1] == pytest.approx(4 * (40 * 32 + 4 * 32 * 48 + 80 * 48))
    assert dx[1] == pytest.approx(4 * (80 * 48 + 4 * 32 * 48 + 80 * 32))
    assert dw[1] == 4 * (40 * 32 + 80 * 48 + 4 * 32 * 48)
    assert work(f"grouped_gemm {rung}", "mixtral-4096")[0][0] == 962_072_674_304


@pytest.mark.parametrize("size", SIZES)
def test_every_pass_moves_bytes_at_every_size(size):
    for component in COMPONENTS.values():
        assert all(flops >= 0 and moved > 0 for flops, moved in component.work(SIZES[size], 2))


# ---- what is refused, and what goes wrong


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "huge"], "no size 'huge'; there is toy"),
        (["--size", "toy", "mixtral-4096"], "mixtral-4096 needs a GPU"),
        (["--only", "rmsnorm", "softmax"], "no component 'softmax'; there is embedding"),
        (["--out", "/nosuch/kernels.json"], "/nosuch"),
        (["--out", "/"], "give a file"),
    ],
)
def test_refusals_come_before_any_measurement(arguments, says, capsys):
    assert says in refused(capsys, *arguments)


def test_the_model_has_no_components(capsys):
    assert cli.main(["bench", "model", "--only", "moe"]) == 2
    assert "--only" in capsys.readouterr().err


def test_a_wrong_rung_is_not_timed(capsys, briefly, monkeypatch, tmp_path):
    right = COMPONENTS["grouped_gemm 2_tiled"]

    def wrong(size, draw):
        passes = right.make(size, draw)
        return passes | {"dw": lambda: passes["dw"]() * 1.1}

    monkeypatch.setitem(COMPONENTS, "grouped_gemm 2_tiled", right._replace(make=wrong))
    assert cli.main([*COMMAND, "--only", "2_tiled", "--out", str(tmp_path / "record.json")]) == 2
    out, err = capsys.readouterr()
    assert "dw of toy in float32, is wrong" in err
    assert err.count("\n") == 1
    assert "2_tiled" not in out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "reason"), [(MemoryError(), "not enough memory"), (InputError("a head of 512"), "a head of 512")]
)
def test_what_a_device_or_a_launcher_refuses_is_skipped(error, reason, capsys, briefly, monkeypatch):
    def refusing(size, draw):
        raise error

    monkeypatch.setitem(COMPONENTS, "moe", COMPONENTS["moe"]._replace(make=refusing))
    assert cli.main([*COMMAND, "--only", "moe", "rope"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"moe +bfloat16 +skipped: .*{reason}", out)
    assert re.search(r"rope +backward", out)


def test_long_measurements_have_fewer_rounds(briefly, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST", 0.0)
    assert len(kernels._times([lambda: None], 7, lambda: None)[0]) == 1


# ---- a GPU


def test_events_time_a_gpu(monkeypatch):
    done = []

    class Event:
        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("synchronised")

        done = True

    runtime = SimpleNamespace(getDeviceProperties=lambda card: {"name": b"Toy"}, runtimeGetVersion=lambda: 13020)
    fake = SimpleNamespace(
        __version__="14.2.0",
        is_available=lambda: True,
        cuda=SimpleNamespace(
            Event=Event,
            get_elapsed_time=lambda start, stop: 1.5,
            Device=lambda: SimpleNamespace(id=0),
            runtime=runtime,
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.delitem(sys.modules, "tinymoe.cuda.gpu", raising=False)
    monkeypatch.delattr(cuda, "gpu", raising=False)
    monkeypatch.setattr(device, "gpu_is_there", lambda: True)
    with device.using("gpu"):
        assert device.seconds(lambda: done.append("run"), lambda: done.append("ahead")) == (0.0015, True)
    assert done == ["ahead", "event", "run", "event", "synchronised"]
    where = machine()
    assert (where["gpu"], where["cuda"], where["cupy"]) == ("Toy", "13.2", "14.2.0")
    assert "driver" in where


@pytest.mark.gpu
def test_smallest_size_on_a_gpu(tmp_path):
    out = tmp_path / "kernels.json"
    with device.using("gpu"):
        assert cli.main(["bench", "kernels", "--size", "small", "--rounds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["device"] == "gpu"
    assert found["machine"]["gpu"]
    assert {case["component"] for case in found["cases"]} == {*COMPONENTS}
    assert all(case["floor"] > 0 for case in found["cases"] if "skipped" not in case)
