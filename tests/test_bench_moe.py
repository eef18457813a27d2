"""`tinymoe bench moe`: it computes the same block in every way, checks before it times, and refuses what it cannot."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tinymoe import cli, reference
from tinymoe.bench import kernels, moe
from tinymoe.cuda import device

COMMAND = ["bench", "moe", "--rounds", "1", "--tokens"]


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(kernels, "COPIED_EMULATED", 2**12)
    monkeypatch.setattr(kernels, "SQUARE_EMULATED", 8)
    with device.using("emulated"):
        yield


@pytest.fixture
def weights():
    D, F, E, _ = moe.TOY.values()
    draw = moe.Draw("bfloat16", 0)
    return moe.Weights(*(moe._scaled(draw(*s), s[-1]) for s in ((E, F, D), (E, D, F), (E, F, D))))


def batch_of(N, routing="uniform"):
    return moe.draw_batch(N, moe.TOY["D"], moe.TOY["E"], moe.TOY["k"], routing)


def test_every_contestant_is_timed_and_ours_is_right(tmp_path, capsys):
    out = tmp_path / "moe.json"
    assert cli.main([*COMMAND, "3", "80", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {(case["tokens"], case["routing"]) for case in record["cases"]} == {
        (N, routing) for N in (3, 80) for routing in moe.ROUTINGS
    }
    timed = [case for case in record["cases"] if "skipped" not in case]
    found = {(case["contestant"], case["pass"]) for case in timed}
    assert {
        ("tinymoe", "forward"),
        ("tinymoe", "graph"),
        ("tinymoe", moe.GATHERING),
        *(("tinymoe", each) for each in moe.KEPT),
        ("dense", "both"),
        ("loop of products", "forward"),
    } <= found
    for case in timed:
        assert case["median"] > 0
        assert case["error"] is None if case["contestant"] == "dense" else case["error"] < 1e-2
    kept = {case["pass"]: case["kept"] for case in timed if "kept" in case and case["tokens"] == 80}
    assert kept == {each: arrays * 160 * 96 * 2 for each, arrays in moe.KEPT.items()}  # of (S, F), two bytes each
    assert {(of["tokens"], of["pass"]) for of in record["comparisons"]} == {
        (N, each) for N in (3, 80) for each in ("forward", "both")
    }
    assert len(record["goals"]) == 10
    assert all(goal["met"] is None for goal in record["goals"])  # of a toy in the emulator
    assert "these figures say nothing of a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("N", [3, 80])  # by the kernels for few tokens, and by the grouped products
def test_samples_and_results_are_the_reference_s(weights, N):
    batch = batch_of(N)
    sample, expected = moe.exact(weights, batch)
    x, *w = (device.host(a).astype(np.float64) for a in (batch.x, *weights))
    y = np.zeros_like(x)
    for n, k in np.ndindex(batch.experts.shape):
        w1, w2, w3 = (of[batch.experts[n, k]] for of in w)
        y[n] += batch.weights[n, k] * reference.ffn(x[n : n + 1], w1, w2, w3)[0][0]
    np.testing.assert_allclose(expected, y[sample], rtol=1e-6)
    for passes in (moe.ours(weights, batch), moe.loop(weights, batch)):
        for run in passes.values():
            assert moe._error(run(), np.arange(N), y) < 1e-2


def test_routing_is_uniform_or_skewed():
    for routing, share in (("uniform", 1 / 8), ("skewed", 1 / 2)):
        experts = device.host(batch_of(400, routing).experts)
        assert (experts[:, 0] != experts[:, 1]).all()
        assert abs((experts == 0).mean() - share) < 0.04


def test_work_counts_chosen_experts_and_gradients(weights):
    batch, expert = batch_of(1), 3 * 64 * 96
    assert moe.work(weights, batch, "forward") == (2 * 2 * expert, 2 * (2 * expert + 2 * 64))
    flops, moved = moe.work(weights, batch, "both")
    assert flops == 3 * 2 * 2 * expert
    assert moved == 2 * (2 * (2 * expert + 2 * 64) + 8 * expert + 64)


def test_wrong_results_of_ours_are_no_record(weights, monkeypatch):
    monkeypatch.setattr(moe, "few_tokens_ffn", lambda x, *_: np.zeros_like(x))
    with pytest.raises(FloatingPointError, match="tinymoe, forward"):
        moe.measure(weights, batch_of(2), 1, {"bfloat16": 1.0, "read": 1.0}, lambda: None)


def test_a_peer_that_fails_or_errs_is_left_out_with_the_reason(weights, monkeypatch):
    def fails():
        raise RuntimeError("no such card\nmore")

    peers = {"broken": {"forward": fails}, "wrong": {"forward": lambda: np.zeros((2, 64))}}
    with_ours = {"tinymoe": moe.ours(weights, batch_of(2)), **peers}
    monkeypatch.setattr(moe, "contestants", lambda *_: with_ours)
    cases = moe.measure(weights, batch_of(2), 1, {"bfloat16": 1.0, "read": 1.0}, lambda: None)
    skipped = {case["contestant"]: case["skipped"] for case in cases if "skipped" in case}
    assert skipped["broken"] == "RuntimeError: no such card"
    assert skipped["wrong"].startswith("FloatingPointError: wrong, forward: the error is 1.0e+00")


def test_a_peer_that_cannot_be_made_is_told_with_the_reason(weights, monkeypatch):
    monkeypatch.setattr(moe, "PEERS", {"no_such_peer": "nobody"})
    cases = moe.measure(weights, batch_of(2), 1, {"bfloat16": 1.0, "read": 1.0}, lambda: None)
    (absent,) = (case for case in cases if "skipped" in case)
    assert absent["contestant"] == "nobody"
    assert absent["skipped"] == "ModuleNotFoundError: No module named 'tinymoe.bench.no_such_peer'"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "moe", "--tokens", "300"], "300 tokens need a GPU"),
        (["bench", "moe", "--size", "toy"], "--tokens"),
        (["bench", "moe", "--only", "moe"], "--only goes with bench kernels"),
        (["bench", "model", "--tokens", "3"], "--tokens goes with bench moe"),
        (["bench", "moe", "--out", "nowhere/moe.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(capsys, arguments, says):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"tinymoe: error: [^\n]+\n", err)
    assert says in err


@pytest.mark.parametrize("peer", ["moe_peers", "moe_jax"])
def test_peers_compute_the_same_block(weights, peer):
    module = pytest.importorskip(f"tinymoe.bench.{peer}", reason="no such peer: pip install 'tinymoe[parity]'")
    batch = batch_of(9)
    sample, expected = moe.exact(weights, batch)
    for name, passes in module.contestants(weights, batch).items():
        if name == "jax Pallas" and device.current() != "gpu":
            continue
        for run in passes.values():
            assert moe._error(run(), sample, expected) < 1e-2, name


def test_pallas_is_told_with_the_reason_where_it_cannot_run(weights):
    pytest.importorskip("tinymoe.bench.moe_jax", reason="no such peer: pip install 'tinymoe[jax]'")
    cases = moe.measure(weights, batch_of(9), 1, {"bfloat16": 1.0, "read": 1.0}, lambda: None)
    (absent,) = (case for case in cases if case["contestant"] == "jax Pallas")
    assert absent["skipped"].startswith(("ValueError: k=96 must be a multiple", "ModuleNotFoundError: No module"))


def test_pallas_gradients_are_those_of_the_products_that_it_is_given(weights, monkeypatch):
    module = pytest.importorskip("tinymoe.bench.moe_jax", reason="no such peer: pip install 'tinymoe[jax]'")
    jax = module.jax

    def along(x, w, group_sizes, transpose_rhs=False, **tiles):
        return jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transpose_rhs else w, group_sizes)

    def transposed(x, y, group_sizes, **tiles):
        inner = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(x, y, group_sizes, inner)

    ops = "jax.experimental.pallas.ops.gpu"
    stand_ins = SimpleNamespace(
        ragged_dot_mgpu=SimpleNamespace(ragged_dot=along),
        transposed_ragged_dot_mgpu=SimpleNamespace(transposed_ragged_dot=transposed),
    )
    monkeypatch.setitem(sys.modules, ops, stand_ins)
    x, dy, w13, w2 = (np.random.default_rng(0).standard_normal(s) for s in ((9, 8), (9, 8), (4, 20, 8), (4, 8, 10)))
    experts, mixing = np.array([[1, 3]] * 4 + [[3, 0]] * 5), np.full((9, 2), 0.5)
    arrays = [jax.numpy.asarray(a, "float32") for a in (x, w13, w2)]
    rest = jax.numpy.asarray(experts), jax.numpy.asarray(mixing, "float32"), jax.numpy.asarray(dy, "float32")
    y, grads = module.compiled((0,) * 5)[1](*arrays, *rest)
    arrays[1:] = [w.swapaxes(1, 2) for w in arrays[1:]]
    expected_y, expected = module.compiled(None)[1](*arrays, *rest)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(grads, (expected[0], *(w.swapaxes(1, 2) for w in expected[1:]))):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
