"""A mixture against dense models of as many active parameters, and of as many in all; and what its shape is worth.

Same text, same batches, same number of tokens, three seeds. The mixture has E experts of F hidden units, of which a
token uses k; the dense models have one feed-forward block of k·F units (as many active parameters, as many FLOPs) or of
E·F (as many parameters in all). Where the mixture should win is the loss for the FLOPs; where it should lose is memory,
and time where the FLOPs are not what costs: at batch 1, and on a CPU whose matrix products get smaller.

Time is measured apart from the training, the three models taking turns, so that a slow minute of a shared machine is
nobody's alone: the seconds of a curve are its steps times the median time of a step.
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from tinymoe.bench.timing import alternate
from tinymoe.config import MixtralConfig
from tinymoe.experiments.learning import learn, micro, stepper, text
from tinymoe.generation import generate
from tinymoe.model import Mixtral
from tinymoe.scale.footprint import training_flops
from tinymoe.training import Options, evaluate, sample_windows

Array = np.ndarray
SEEDS = 3
DECODED = 64  # tokens, of a timed text at batch 1


def shapes(base: MixtralConfig) -> dict[str, dict[str, Any]]:
    """Return name → changes of the three models to compare."""
    F, E, k = base.hidden_dim, base.num_experts, base.top_k_experts
    dense = dict(num_experts=0, top_k_experts=0)
    return {
        "mixture": {},
        "dense, as many active": dense | dict(hidden_dim=k * F),
        "dense, as many in all": dense | dict(hidden_dim=E * F),
    }


def ablations(base: MixtralConfig) -> dict[str, dict[str, Any]]:
    """Return name → changes of mixtures of other shapes, each to compare with the plain one."""
    k, F, E = base.top_k_experts, base.hidden_dim, base.num_experts
    return {
        **{f"top-{n}": dict(top_k_experts=n) for n in (1, 2, 4, 8)},
        **{f"{n} experts": dict(num_experts=n) for n in (2, 4, 16, 32, 64)},
        "twice the experts, half the size": dict(num_experts=2 * E, top_k_experts=2 * k, hidden_dim=F // 2),
        "half the experts, twice the size": dict(num_experts=E // 2, top_k_experts=k // 2, hidden_dim=2 * F),
        "experts in every other layer": dict(moe_every=2),
    }


def run(seed: int, quick: bool) -> dict[str, Any]:
    """Return the curves of all models and seeds, the margins beside their spread, and the ablations of one seed."""
    tokens, held_out = text(quick)
    base = micro() if quick else MixtralConfig.tiny(n_layers=3)
    seq_len, steps = (16, 4) if quick else (128, 1000)
    windows = sample_windows(held_out, seq_len, most=8 if quick else 256)

    def options(seed: int) -> Options:
        return Options(steps=steps, batch_size=4 if quick else 16, seq_len=seq_len, warmup=steps // 10, seed=seed)

    def trained(changes: dict[str, Any], seed: int) -> dict[str, Any]:
        return _curve(_changed(base, changes), tokens, windows, options(seed), every=steps // 2 if quick else 50)

    compared: dict[str, list[dict[str, Any]]] = {name: [] for name in shapes(base)}
    for s in range(seed, seed + (1 if quick else SEEDS)):
        for name, changes in shapes(base).items():
            compared[name].append(trained(changes, s))
            _say(quick, f"seed {s}", name, compared[name][-1])
    shaped = {}
    for name, changes in list(ablations(base).items())[: 2 if quick else None]:
        shaped[name] = trained(changes, seed)
        _say(quick, "shape", name, shaped[name])
    configs = {name: _changed(base, changes) for name, changes in shapes(base).items()}
    times = _times(configs, tokens, options(seed), quick)
    return {"compared": compared, "margins": margins(compared), "ablations": shaped, "seconds": times}


def _changed(base: MixtralConfig, changes: dict[str, Any]) -> MixtralConfig:
    return MixtralConfig(**{**vars(base), **changes})


def _say(quick: bool, what: str, name: str, found: dict[str, Any]) -> None:
    if not quick:
        print(f"{what}: {name:<34} {found['curve'][-1]['val_loss']:.4f}", flush=True)


def _curve(config: MixtralConfig, tokens: Array, windows: Any, options: Options, every: int) -> dict[str, Any]:
    """Train a model; return its held-out loss by step and FLOP, and its size."""
    lines: list[dict[str, float]] = []
    flops = training_flops(config, options.seq_len) * options.batch_size * options.seq_len

    def observe(step: int, model: Mixtral, line: dict[str, Any]) -> None:
        if step % every == 0:
            lines.append(dict(step=step, flop=step * flops, val_loss=round(evaluate(model, windows)[0], 5)))

    learn(config, tokens, options, observe)
    return {
        "curve": lines,
        "parameters": config.count_parameters(),
        "active": config.count_active_parameters(),
    }


def _times(configs: dict[str, MixtralConfig], tokens: Array, options: Options, quick: bool) -> dict[str, Any]:
    """Return each model's median seconds of a training step and of a token decoded at batch 1, the models in turns."""

    def training_step(config: MixtralConfig) -> Callable[[], Any]:
        return stepper(Mixtral.init(config), tokens, options)

    def decoding(config: MixtralConfig) -> Callable[[], Any]:
        model = Mixtral.init(config)
        return lambda: generate(model, np.zeros(8, np.int64), DECODED)

    step = alternate({name: training_step(config) for name, config in configs.items()}, rounds=1 if quick else 40)
    token = alternate({name: decoding(config) for name, config in configs.items()}, rounds=1 if quick else 20)
    return {
        name: {"step": statistics.median(step[name]), "token": statistics.median(token[name]) / DECODED}
        for name in configs
    }


def margins(compared: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return by how much the mixture's last loss is below each dense model's, seed by seed, and the spread over seeds.

    The margin of a seed compares runs over the same batches; ``spread`` is the largest difference between two seeds of
    one model: a margin below it shows nothing.
    """
    last = {name: [run["curve"][-1]["val_loss"] for run in runs] for name, runs in compared.items()}
    ours = last["mixture"]
    return {
        "last_losses": last,
        "spread": round(max(max(losses) - min(losses) for losses in last.values()), 5),
        "below": {
            name: [round(theirs - mine, 5) for theirs, mine in zip(losses, ours)]
            for name, losses in last.items()
            if name != "mixture"
        },
    }


def plot(numbers: dict[str, Any]) -> Any:
    """Draw the held-out loss by step, FLOP and second, every seed, and the last loss of each other shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    grid = figure.subplots(2, 2).ravel()
    for axis, (key, label) in zip(grid, {"step": "steps", "flop": "FLOP", "seconds": "seconds on this CPU"}.items()):
        for colour, (name, runs) in enumerate(numbers["compared"].items()):
            seconds = numbers["seconds"][name]["step"]
            for number, one in enumerate(runs):
                xs = [line["step"] * seconds if key == "seconds" else line[key] for line in one["curve"]]
                ys = [line["val_loss"] for line in one["curve"]]
                axis.plot(xs, ys, color=f"C{colour}", linewidth=1, label=name if number == 0 else None)
        axis.set(xlabel=label, ylabel="held-out loss, nats per byte")
        axis.grid(alpha=0.3)
    grid[0].legend(fontsize=8)
    names = list(numbers["ablations"])
    losses = [numbers["ablations"][name]["curve"][-1]["val_loss"] for name in names]
    grid[3].barh(names, losses, color="C0")
    grid[3].axvline(numbers["compared"]["mixture"][0]["curve"][-1]["val_loss"], color="black", linewidth=0.8)
    grid[3].set(
        xlim=(min(losses) - 0.05, max(losses) + 0.02), xlabel="last held-out loss; the line is the plain mixture"
    )
    grid[3].invert_yaxis()
    return figure
