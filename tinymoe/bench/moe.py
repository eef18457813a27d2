"""`tinymoe bench moe`: the expert block of Mixtral 8x7B beside cuBLAS and every peer that is installed.

The block takes tokens and their routing, which is drawn, and gives the mixed outputs: dispatch, gather, the experts'
products, SwiGLU, combine. All contestants compute the same block of the same data in bfloat16, and are compared with
float64 on sampled tokens before they are timed; then they run in turns. ``dense`` is no contestant but the ceiling: two
plain products of as many FLOPs. What the figures say of the goals stands at the end, and in the record.

Its floor is the larger of its FLOPs over the rate of a large product and its bytes over the rate of reading, both
measured in the same run. Weights are larger than any cache, so every round reads them from memory.
"""

import importlib
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymoe import cuda
from tinymoe.atomic import replacing
from tinymoe.bench.components import Draw
from tinymoe.bench.goals import BOTH, CEILING, CUBLAS, FORWARD, GRAPH, OURS, comparisons, goals, told
from tinymoe.bench.kernels import EMULATED, GPU, describe, find_ceilings
from tinymoe.bench.timing import machine
from tinymoe.cuda import device
from tinymoe.cuda.dispatch import GatherSaved
from tinymoe.cuda.experts import ExpertsSaved, gathered_ffn
from tinymoe.cuda.few_tokens import FEW_PAIRS, few_tokens_ffn
from tinymoe.cuda.graph import Graph
from tinymoe.cuda.grouped_gemm import grouped_linear, grouped_swiglu
from tinymoe.cuda.linear import matmul
from tinymoe.errors import InputError

SHAPE = dict(D=4096, F=14336, E=8, k=2)
TOY = dict(D=64, F=96, E=8, k=2)
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
TOY_TOKENS = (1, 16, 80)
ROUTINGS = ("uniform", "skewed")  # skewed: a half of all assignments go to one expert
SAMPLED = 8  # tokens that are compared with float64
CLOSE = 2e-2  # largest relative error of a contestant
# What our training keeps of an expert's rows, in arrays of (S, F): gate, up and hidden; gate and up; none of them.
KEPT = {BOTH: 3, "both, 2 kept": 2, "both, 0 kept": 0}
GATHERING = "gathering"  # the forward, whose first product gathers its rows by itself
PEERS = {"moe_peers": "torch and transformers", "moe_jax": "jax"}
HEADER = f"{'microseconds:':<39}{'median':>11} {'spread':>8}{'of floor':>10}{'TFLOP/s':>10}{'GB/s':>10}{'error':>10}"

Passes = dict[str, Callable[[], Any]]  # "forward"; "graph", the same as one; "both …", forward + backward: return y


class Weights(NamedTuple):
    """The experts of a layer."""

    w1: Any  # (E, F, D)
    w2: Any  # (E, D, F)
    w3: Any  # (E, F, D)


class Batch(NamedTuple):
    """Tokens and where they go."""

    x: Any  # (N, D)
    dy: Any  # (N, D), the gradient of the result
    experts: Any  # (N, k) int32
    weights: Any  # (N, k) float32


def command(tokens: list[int] | None, rounds: int, out: str | None) -> None:
    """Measure, print every contestant beside the floor, and write the record if asked.

    Parameters
    ----------
    tokens
        Of a batch; None: 1 to 16384 on a GPU, a few of a toy layer under the emulator.
    rounds
        Of each measurement.
    out
        Path of the JSON record.

    Raises
    ------
    InputError
        There are too many tokens for the emulator, or the record cannot be written.
    FloatingPointError
        Our results are not those of float64.
    """
    here = device.current() == "gpu"
    shape, counts = (SHAPE, tokens or [*TOKENS]) if here else (TOY, tokens or [*TOY_TOKENS])
    if not here and max(counts) > 256:
        raise InputError(f"{max(counts)} tokens need a GPU: {device.current()} on this CPU is slow; give up to 256")
    if out and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise InputError(f"the record cannot be written to {out}: give a file in a folder that is there")
    ceilings, ahead = find_ceilings(rounds)
    ceilings["read"] = read_rate(rounds, ahead)
    cases: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "machine": machine(),
        "device": device.current(),
        "note": GPU if here else EMULATED,
        "rounds": rounds,
        "shape": shape,
        "ceilings": ceilings,
        "cases": cases,
    }
    print(describe(record) + f"; reading {ceilings['read'] / 1e9:.4g} GB/s")
    draw = Draw("bfloat16", 0)
    D, F, E, k = shape.values()
    weights = Weights(*(_scaled(draw(*s), s[-1]) for s in ((E, F, D), (E, D, F), (E, F, D))))
    for routing in ROUTINGS:
        for N in counts:
            batch = draw_batch(N, D, E, k, routing)
            print(f"\n{N} tokens, {routing}: {np.bincount(device.host(batch.experts).ravel(), minlength=E).tolist()}")
            print(HEADER)
            for case in measure(weights, batch, rounds, ceilings, ahead):
                cases.append({"tokens": N, "routing": routing} | case)
                print(line(cases[-1]), flush=True)
            record |= {"comparisons": comparisons(record), "goals": [goal._asdict() for goal in goals(record)]}
            if out:  # what has been measured, whatever becomes of the rest
                with replacing(Path(out)) as partial:
                    partial.write_text(json.dumps(record, indent=1) + "\n")
    print("", *told(record), sep="\n")


def draw_batch(N: int, D: int, E: int, k: int, routing: str) -> Batch:
    """Draw N tokens, whose choices are uniform, or skewed: expert 0 is in every token's k, E/k times its fair share."""
    draw = Draw("bfloat16", N)
    liking = draw.rng.random((N, E))
    if routing == "skewed":
        liking[:, 0] = -1.0
    experts = np.argsort(liking, axis=1)[:, :k].astype(np.int32)
    mixing = draw.rng.dirichlet(np.ones(k), N).astype(np.float32)
    return Batch(draw(N, D), draw(N, D), device.array(experts), device.array(mixing))


def read_rate(rounds: int, ahead: Callable[[], None]) -> float:
    """Return how many bytes a second a large sum reads."""
    numbers = Draw("float32", 0)(2**29 if device.current() == "gpu" else 2**20)
    numbers.sum()
    return float(numbers.nbytes / statistics.median(device.seconds(numbers.sum, ahead)[0] for _ in range(rounds)))


def measure(
    weights: Weights, batch: Batch, rounds: int, ceilings: dict[str, float], ahead: Callable[[], None]
) -> list[dict[str, Any]]:
    """Return a case for each contestant and pass: checked against float64 first, then timed in turns.

    Raises
    ------
    FloatingPointError
        Our results are wrong. A peer whose are, or that cannot run, is left out with the reason.
    """
    cases: list[dict[str, Any]] = []
    runs: dict[tuple[str, str], tuple[Callable[[], Any], float | None]] = {}
    sample, expected = exact(weights, batch)
    for name, passes in contestants(weights, batch).items():
        try:
            for each, run in passes.items():
                error = None if name == CEILING else _error(run(), sample, expected)
                if error is not None and not error <= CLOSE:
                    raise FloatingPointError(f"{name}, {each}: the error is {error:.1e} of the result")
                runs[name, each] = run, error
        except Exception as failure:  # a peer's, of whatever kind
            if name == OURS:
                raise
            reason = str(failure).strip().partition("\n")[0]
            cases.append({"contestant": name, "skipped": f"{type(failure).__name__}: {reason}"})
            device.free()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    waited: dict[tuple[str, str], bool] = dict.fromkeys(runs, False)
    for _ in range(rounds):
        for key, (run, _) in runs.items():
            seconds, late = device.seconds(run, ahead)
            times[key].append(seconds)
            waited[key] |= late
    for (name, each), (_, error) in runs.items():
        flops, moved = work(weights, batch, each)
        floor = max(flops / ceilings["bfloat16"], moved / ceilings["read"])
        figures = {"flops": flops, "bytes": moved, "floor": floor, "median": statistics.median(times[name, each])}
        timed = {"times": times[name, each], "waited": waited[name, each], "error": error}
        if name == OURS and each in KEPT:
            timed["kept"] = KEPT[each] * batch.experts.size * weights.w1.shape[1] * weights.w1.dtype.itemsize
        cases.append({"contestant": name, "pass": each} | figures | timed)
    return cases


def work(weights: Weights, batch: Batch, each: str) -> tuple[float, float]:
    """Return the FLOPs of a pass, and the bytes that it must move: chosen experts' weights, and tokens in and out."""
    (N, k), (E, F, D) = batch.experts.shape, weights.w1.shape
    chosen, element = len(np.unique(device.host(batch.experts))), weights.w1.dtype.itemsize
    flops, moved = 6 * N * k * D * F, element * (3 * chosen * D * F + 2 * N * D)
    if not each.startswith(BOTH):
        return flops, moved
    return 3 * flops, 2 * moved + element * (3 * E * D * F + N * D)  # and every gradient written


def contestants(weights: Weights, batch: Batch) -> dict[str, Passes]:
    """Return the passes of all that are here, ours first."""
    found = {OURS: ours(weights, batch), CEILING: dense(weights, batch), CUBLAS: loop(weights, batch)}
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or jax takes most of the memory
    for peer, name in PEERS.items():
        try:
            found |= importlib.import_module(f"tinymoe.bench.{peer}").contestants(weights, batch)
        except Exception as failure:  # not installed, or of whatever kind: it is told with those that cannot run
            found[name] = {FORWARD: _failing(failure)}
    return found


def _failing(failure: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise failure

    return fail


def ours(weights: Weights, batch: Batch) -> Passes:
    """Return the block as `tinymoe.cuda.moe` and `moe_decode` run it, behind the router."""
    x, dy, experts, mixing = batch
    few = experts.size <= FEW_PAIRS

    def forward() -> tuple[Any, ExpertsSaved, Any]:
        plan = cuda.dispatch(experts, len(weights.w1))
        out, saved = gathered_ffn(x, plan.tokens, *weights, plan.offsets)
        y, combine_saved = cuda.combine(out, mixing, plan)
        return y, saved, combine_saved

    def both(**forgotten: None) -> Any:
        y, saved, combine_saved = forward()
        saved = saved._replace(**forgotten)
        dout, _ = cuda.combine_backward(dy, combine_saved)
        drows, *_ = cuda.expert_ffn_backward(dout, saved)
        cuda.gather_backward(drows, GatherSaved(combine_saved.plan))
        return y

    def decode() -> Any:
        return few_tokens_ffn(x, mixing, cuda.dispatch(experts, len(weights.w1)), *weights)

    def gathering() -> Any:
        plan = cuda.dispatch(experts, len(weights.w1))
        rows = plan.offsets, plan.tokens
        _, _, hidden = grouped_swiglu(x, weights.w1, weights.w3, *rows, "5_hopper_gather")
        return cuda.combine(grouped_linear(hidden, weights.w2, plan.offsets), mixing, plan)[0]

    alone = decode if few else lambda: forward()[0]
    forgetful = both, lambda: both(hidden=None), lambda: both(hidden=None, swiglu=None)
    passes: Passes = {FORWARD: alone, GRAPH: Graph(alone)}
    if not few and device.architecture() in ("sm_90a", None):  # rung 5's variant, beside the copy that it spares
        passes[GATHERING] = gathering
    return passes | dict(zip(KEPT, forgetful, strict=True))


def dense(weights: Weights, batch: Batch) -> Passes:
    """Return plain products of as many FLOPs: S rows by (D, 2F) and by (F, D), and their gradients'."""
    S, (_, F, D), draw = batch.experts.size, weights.w1.shape, Draw("bfloat16", 1)
    x, h, up, down = draw(S, D), draw(S, F), draw(2 * F, D), draw(D, F)
    dx, dh, rows = draw(S, D), draw(S, 2 * F), draw(S, F)

    def forward() -> None:
        matmul(x, up.T)
        matmul(h, down.T)

    def both() -> None:
        forward()
        for dy, w, of in ((dh, up, x), (dx, down, rows)):
            matmul(dy, w)
            matmul(dy.T, of)

    return {FORWARD: forward, BOTH: both}


def loop(weights: Weights, batch: Batch) -> Passes:
    """Return the forward as a loop over experts of library products, the counts being known to the host for nothing."""
    x, _, experts, mixing = batch
    counts = np.bincount(device.host(experts).ravel(), minlength=len(weights.w1))
    ends = np.cumsum(counts)

    def forward() -> Any:
        plan = cuda.dispatch(experts, len(weights.w1))
        rows, _ = cuda.gather(x, plan)
        out = device.empty(rows.shape, rows.dtype)
        for (w1, w2, w3), count, end in zip(zip(*weights), counts, ends):
            if count:
                part = rows[end - count : end]
                hidden, _ = cuda.swiglu(matmul(part, w1.T), matmul(part, w3.T))
                out[end - count : end] = matmul(hidden, w2.T)
        return cuda.combine(out, mixing, plan)[0]

    return {FORWARD: forward}


def exact(weights: Weights, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return sampled tokens and their results in float64, on the device but by none of what is measured."""
    sample = np.unique(np.linspace(0, len(batch.x) - 1, SAMPLED).astype(int))
    result = np.zeros((len(sample), batch.x.shape[1]))
    experts, mixing = device.host(batch.experts), device.host(batch.weights)
    for row, n in enumerate(sample):
        x = _double(batch.x[n])
        for e, weight in zip(experts[n].tolist(), mixing[n].tolist()):
            gate, up = _double(weights.w1[e]) @ x, _double(weights.w3[e]) @ x
            hidden = device.host(gate / (1 + np.exp(-gate)) * up)
            result[row] += weight * device.host(_double(weights.w2[e]) @ device.array(hidden))
    return sample, result


def line(case: dict[str, Any]) -> str:
    """Return a case as a line of the table."""
    if "skipped" in case:
        return f"  {case['contestant']}: {case['skipped']}"
    median, times, error = case["median"], case["times"], case["error"]
    rates = f"{case['flops'] / median / 1e12:>10.3g}{case['bytes'] / median / 1e9:>10.3g}"
    return (
        f"  {case['contestant']:<24}{case['pass']:<13}{1e6 * median:>11.1f}{'*' if case['waited'] else ' '}"
        f"{(max(times) - min(times)) / median:>8.0%}{case['floor'] / median:>10.2%}{rates}"
        f"{'' if error is None else f'{error:.1e}':>10}"
    )


def _error(y: Any, sample: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    found = device.host(y[sample]).astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _double(array: Any) -> Any:
    return array.astype(np.float32).astype(np.float64)


def _scaled(w: Any, inner: int) -> Any:
    """Scale in place, so that results are of the size of what comes in."""
    w[...] = w * np.asarray(inner**-0.5, w.dtype)
    return w
