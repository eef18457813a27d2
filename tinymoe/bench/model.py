"""`tinymoe bench model`: a training step and decoding, beside transformers on torch and beside their bare products."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinymoe import workers
from tinymoe.atomic import replacing
from tinymoe.bench.timing import alternate, machine, ratio
from tinymoe.config import MixtralConfig
from tinymoe.errors import InputError
from tinymoe.generation import generate
from tinymoe.model import Mixtral
from tinymoe.reference import AdamW, moe, moe_naive

Array = np.ndarray
SHAPES: dict[str, tuple[dict[str, int], tuple[int, int]]] = {  # name -> config, (B, T)
    "tiny": (dict(dim=64, hidden_dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=256), (8, 64)),
    "small": (dict(dim=256, hidden_dim=512, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=512), (8, 256)),
    "medium": (dict(dim=512, hidden_dim=1024, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=4096), (4, 256)),
}
PROMPT, NEW = 16, 64  # tokens, in decoding


def command(sizes: list[str] | None, rounds: int, out: str | None) -> None:
    """Measure, print the ratios, and write the record if asked.

    Parameters
    ----------
    sizes
        Of `SHAPES`; None: all.
    rounds
        Alternating rounds of each measurement.
    out
        Path of the JSON record.

    Raises
    ------
    InputError
        There is no such size, or the record cannot be written.
    """
    if unknown := [size for size in sizes or [] if size not in SHAPES]:
        raise InputError(f"no size {unknown[0]!r}; there is {', '.join(SHAPES)}")
    if out and not Path(out).parent.is_dir():
        raise InputError(f"there is no folder {Path(out).parent} to write the record in")
    record: dict[str, Any] = {"machine": machine(), "rounds": rounds, "sizes": {}}
    print(_describe(record["machine"]))
    for size in sizes or SHAPES:
        measured = measure(size, rounds)
        record["sizes"][size] = measured
        print(f"\n{size}: {measured['shape']}")
        for name, value in measured["ratios"].items():
            print(f"  {name:<58} {value:6.2f}")
    record["grouped"] = grouped_against_naive(rounds)
    print(f"\n{'grouped experts, times as fast as the loop over tokens':<60} {record['grouped']['ratio']:6.2f}")
    record["experts"] = cost_of_experts(rounds)
    print("forward of an MoE layer, microseconds per token, top-2 of")
    for num_experts, cost in record["experts"].items():
        print(f"  {num_experts:>3} experts {cost:50.2f}")
    if out:
        with replacing(Path(out)) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Return the times in seconds and the ratios of a training step and of decoding at one size."""
    shape, (B, T) = SHAPES[size]
    config = MixtralConfig(**shape)  # type: ignore[arg-type]
    text = np.random.default_rng(0).integers(0, config.vocab_size, (B, T + 1))
    tokens, targets = text[:, :-1], text[:, 1:]
    model = Mixtral.init(config)
    optimizer = AdamW(model.params, learning_rate=1e-3)

    def step() -> None:
        optimizer.step(model.loss_and_grads(tokens, targets)[1])

    def decode() -> None:
        generate(model, tokens[0, :PROMPT], NEW)

    steps = {"tinymoe": step, "bare GEMMs": _bare_products(model, B, T)}
    decodes = {"tinymoe": decode, "bare GEMVs": _bare_decode(model)}
    peer = _peer(config, tokens, targets)
    if peer:
        steps |= peer.steps(rounds=3)
        decodes["transformers"] = peer.decode
    step_times, decode_times = alternate(steps, rounds), alternate(decodes, rounds)
    ratios = {f"step, times as fast as {name}": ratio(step_times, name, "tinymoe") for name in list(steps)[2:]}
    ratios["step, its time over that of its bare GEMMs"] = 1 / ratio(step_times, "bare GEMMs", "tinymoe")
    if peer:
        ratios["decoding, times as fast as transformers"] = ratio(decode_times, "transformers", "tinymoe")
    ratios["decoding, its time over that of its bare GEMVs"] = 1 / ratio(decode_times, "bare GEMVs", "tinymoe")
    return {"shape": f"{shape}, {B} x {T} tokens", "step": step_times, "decode": decode_times, "ratios": ratios}


def grouped_against_naive(rounds: int) -> dict[str, Any]:
    """Time an MoE layer's grouped form against the loop over tokens."""
    layer = _layer(8)
    times = alternate({"grouped": lambda: moe(*layer, top_k=2), "naive": lambda: moe_naive(*layer, top_k=2)}, rounds, 1)
    return {"times": times, "ratio": ratio(times, "naive", "grouped")}


def cost_of_experts(rounds: int) -> dict[int, float]:
    """Return the forward cost in microseconds per token of an MoE layer with 8, 16, 32 and 64 experts, top-2."""
    layers = {num_experts: _layer(num_experts) for num_experts in (8, 16, 32, 64)}

    def forward(num_experts: int) -> Callable[[], Any]:
        return lambda: moe(*layers[num_experts], top_k=2)

    times = alternate({str(num_experts): forward(num_experts) for num_experts in layers}, rounds)
    return {e: 1e6 * statistics.median(times[str(e)]) / len(x) for e, (x, *_) in layers.items()}


def _layer(
    num_experts: int, tokens: int = 4096, D: int = 256, F: int = 512
) -> tuple[Array, Array, Array, Array, Array]:
    rng = np.random.default_rng(0)
    x, gate = rng.standard_normal((tokens, D), np.float32), rng.standard_normal((num_experts, D), np.float32)
    w1, w2, w3 = (
        rng.standard_normal((num_experts, *shape), np.float32) / np.float32(shape[1] ** 0.5)
        for shape in ((F, D), (D, F), (F, D))
    )
    return x, gate, w1, w2, w3


def _bare_products(model: Mixtral, B: int, T: int) -> Callable[[], None]:
    """Return a function that does a step's products with weights, forward, dx and dw, and nothing else.

    They are cut over the workers as in the step, and each expert has its even share of the rows.
    """
    config = model.config
    parts = len(model._split(np.empty((B, T))))
    rows = B * T // parts
    products = []
    for name, w in model.params.items():
        if w.ndim == 1 or name == "tok_embeddings":
            continue
        matrices = w if w.ndim == 3 else w[None]
        n = rows * config.top_k_experts // config.num_experts if w.ndim == 3 else rows
        products += [(matrix, n) for matrix in matrices]
    largest = max(w.shape[0] for w, _ in products), max(w.shape[1] for w, _ in products)
    inputs = [np.ones((2, rows, max(largest)), np.float32) for _ in range(parts)]

    def run(part: int) -> None:
        a, b = inputs[part]
        for w, n in products:
            x, dy = a.ravel()[: n * w.shape[1]].reshape(n, -1), b.ravel()[: n * w.shape[0]].reshape(n, -1)
            x @ w.T, dy @ w, dy.T @ x

    def run_all() -> None:
        workers.run(run, range(parts), workers=model.num_workers)

    return run_all


def _bare_decode(model: Mixtral) -> Callable[[], None]:
    """Return a function that does decoding's products of a weight matrix and a vector, and nothing else.

    As in decoding the experts change from token to token, so that their weights come from memory and not from a cache.
    """
    rng, k = np.random.default_rng(0), model.config.top_k_experts
    weights = [w for name, w in model.params.items() if w.ndim > 1 and name != "tok_embeddings"]
    vectors = {w.shape[-1]: np.ones(w.shape[-1], np.float32) for w in weights}
    matrices = []
    for _ in range(NEW):
        for w in weights:
            matrices += [w[e] for e in rng.choice(len(w), k, replace=False)] if w.ndim == 3 else [w]

    def run() -> None:
        for w in matrices:
            np.dot(w, vectors[w.shape[1]])

    return run


def _peer(config: MixtralConfig, tokens: Array, targets: Array) -> Any:
    try:
        from tinymoe.bench.peer import Transformers
    except ImportError:
        print("without torch and transformers (pip install 'tinymoe[parity]') there are only the ratios to products")
        return None
    return Transformers(config, tokens, targets, PROMPT, NEW)


def _describe(where: dict[str, Any]) -> str:
    return (
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f}; Python {where['python']}, "
        f"NumPy {where['numpy']}, torch {where['torch']}, transformers {where['transformers']}; {where['date']}"
    )
