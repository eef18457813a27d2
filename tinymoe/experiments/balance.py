"""Collapse, provoked and prevented: what each way of balancing does to a router that two experts have captured.

All experts but two start with weights a hundredth as large, so that at first only those two have anything to say. The
router finds that out, sends them its tokens, and they alone learn: without balancing it stays so. Then the same start
with each remedy. At last two losses that are in circulation and do not balance: what they say of three routers, and
what following them does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinymoe.config import MixtralConfig
from tinymoe.experiments.learning import learn, micro, text
from tinymoe.model import Mixtral
from tinymoe.reference import expert_load, softmax, switch_loss, switch_loss_backward
from tinymoe.reference.loss import IGNORED
from tinymoe.reference.router import top_k_ids
from tinymoe.training import Options, Windows, evaluate, sample_windows

Array = np.ndarray
HEAD_START = 2  # experts
OFF: dict[str, Any] = dict(aux_loss_coef=0.0)
METHODS: dict[str, dict[str, Any]] = {
    "none": OFF,
    "Switch loss": dict(aux_loss_coef=0.02),  # what the released 8x7B carries
    "bias": OFF | dict(bias_update_rate=0.005),
    "expert choice": OFF | dict(expert_choice=True),
    "capacity 1.25": OFF | dict(capacity_factor=1.25),
    "noisy top-k": OFF | dict(noisy_top_k=True),
    "jitter 0.1": OFF | dict(router_jitter=0.1),
    "z-loss": OFF | dict(z_loss_coef=0.001),
}
Loss = Callable[[Array, Array], tuple[float, Array]]  # logits (N, E), load (E,) -> value, dlogits


def run(seed: int, quick: bool) -> dict[str, Any]:
    """Return each method's measures over training, and what the losses say of three routers and do to them."""
    tokens, held_out = text(quick)
    seq_len = 16 if quick else 128
    steps, every = (4, 2) if quick else (900, 100)
    options = Options(steps=steps, batch_size=4 if quick else 16, seq_len=seq_len, warmup=steps // 10, seed=seed)
    windows = sample_windows(held_out, seq_len, most=8 if quick else 128)
    trained = {}
    for name, changes in METHODS.items():
        config = micro(**changes) if quick else MixtralConfig.small(**changes)
        trained[name] = _train(config, tokens, windows, options, every)
        if not quick:
            end = trained[name][-1]
            print(f"{name:<16} loss {end['val_loss']:.3f}, busiest expert {max(end['busiest']):.2f} x fair", flush=True)
    return {
        "provoked": f"all experts but {HEAD_START} start at 1/100",
        "methods": trained,
        "losses": wrong_losses(seed),
    }


def _train(
    config: MixtralConfig, tokens: Array, windows: Windows, options: Options, every: int
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []

    def observe(step: int, model: Mixtral, line: dict[str, Any]) -> None:
        if step % every == 0 or step == 1:
            lines.append({"step": step, **measure(model, windows, line)})

    learn(config, tokens, options, observe, _give_head_start)
    return lines


def _give_head_start(params: Mapping[str, Array]) -> None:
    for w in params.values():
        if w.ndim == 3:
            w[HEAD_START:] *= 0.01


def measure(model: Mixtral, windows: Windows, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss on held-out windows (inputs, targets), (B, T), and by layer what their routing looks like.

    ``load``: each expert's share of the assignments; ``busiest``: the largest, over the fair share 1/E; ``captured``:
    the share of first choices that go to the two most frequent; ``entropy``: of the router's probabilities, mean over
    tokens, in nats; ``dropped``: the share of the training batch's assignments without room.
    """
    E = model.config.num_experts
    real = np.concatenate([targets.ravel() != IGNORED for _, targets in windows])  # all but the padding
    by_layer = list(zip(*(model.routing(inputs) for inputs, _ in windows)))
    loads = [expert_load(np.concatenate([experts for _, experts, _ in layer])[real], E) for layer in by_layer]
    logits = [np.concatenate([logits for *_, logits in layer])[real] for layer in by_layer]
    probs = [softmax(of_layer.astype(np.float64)) for of_layer in logits]
    firsts = [np.bincount(p.argmax(axis=1), minlength=E) / len(p) for p in probs]
    return {
        "val_loss": round(evaluate(model, windows)[0], 5),
        "load": [np.round(load, 5).tolist() for load in loads],
        "busiest": [round(float(load.max() * E), 4) for load in loads],
        "captured": [round(float(np.sort(first)[-2:].sum()), 4) for first in firsts],
        "entropy": [round(float(-(p * np.log(p + 1e-30)).sum(axis=1).mean()), 4) for p in probs],
        "dropped": line.get("dropped", [0.0] * model.config.n_layers),
    }


# Two losses that do not balance.


def positive_load(logits: Array, load: Array) -> tuple[float, Array]:
    """Compute the Switch loss with the load taken as the share of probabilities above 0, and its gradient.

    A softmax is never 0: that load is 1 for every expert, the loss is E whatever the routing, and its gradient 0.
    """
    everywhere = np.mean(softmax(logits) > 0, axis=0)
    loss, saved = switch_loss(logits, everywhere)
    return loss, switch_loss_backward(1.0, saved)


def variance(logits: Array, load: Array) -> tuple[float, Array]:
    """Compute the variance of all router probabilities, (1/NE) Σ (p − 1/E)², and its gradient.

    It is small when each token is undecided, and says nothing of where the tokens go.
    """
    p = softmax(logits)
    dp = 2 * (p - 1 / p.shape[1]) / p.size  # the mean of all p is 1/E, whatever the logits
    return float(p.var()), p * (dp - np.vecdot(p, dp)[:, None])


def switch(logits: Array, load: Array) -> tuple[float, Array]:
    """Compute the Switch loss and its gradient."""
    loss, saved = switch_loss(logits, load)
    return loss, switch_loss_backward(1.0, saved)


LOSSES: dict[str, Loss] = {"Switch loss": switch, "load = probs > 0": positive_load, "variance of probs": variance}


def wrong_losses(seed: int, tokens: int = 512, E: int = 8, k: int = 2) -> dict[str, Any]:
    """Return what each loss says of three routers, and where following it alone leads them.

    The routers are linear in tokens (N, D): their top-k balanced and confident; collapsed onto k experts and confident;
    collapsed and nearly uniform, so that only the order of the probabilities tells. Each then takes 2000 steps down the
    gradient of the loss, which shorten to nothing.
    """
    rng = np.random.default_rng(seed)
    x = np.hstack([rng.standard_normal((tokens, 15)), np.ones((tokens, 1))])  # the last direction all tokens share
    scattered, towards = rng.standard_normal((E, 16)), np.zeros((E, 16))
    towards[:k, -1] = 1
    scattered[:, -1] = 0
    routers = {
        "balanced, confident": 4 * scattered,
        "collapsed, confident": scattered + 10 * towards,
        "collapsed, nearly uniform": 0.02 * scattered + 0.2 * towards,
    }
    return {
        state: {name: _followed(loss, x, w.copy(), k) for name, loss in LOSSES.items()} for state, w in routers.items()
    }


def _followed(loss: Loss, x: Array, w: Array, k: int, steps: int = 2000, rate: float = 1.0) -> dict[str, float]:
    E = len(w)

    def load_of(logits: Array) -> Array:
        return expert_load(top_k_ids(softmax(logits), k), E)

    value, gradient = loss(x @ w.T, load_of(x @ w.T))
    before = load_of(x @ w.T).max() * E
    norm = np.linalg.norm(gradient)
    for step in range(steps):
        logits = x @ w.T
        w -= rate * (1 - step / steps) * loss(logits, load_of(logits))[1].T @ x
    after = load_of(x @ w.T).max() * E
    return {"value": value, "gradient": float(norm), "busiest_before": float(before), "busiest_after": float(after)}


def plot(numbers: dict[str, Any]) -> Any:
    """Draw, by method, the busiest expert, the captured first choices, the entropy and the loss over training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    titles = {
        "busiest": "busiest expert, times its fair share (worst layer)",
        "captured": "share of first choices on two experts (worst layer)",
        "entropy": "entropy of the router, nats (mean over layers)",
        "val_loss": "held-out loss, nats per byte",
    }
    for axis, (key, title) in zip(axes, titles.items()):
        for name, lines in numbers["methods"].items():
            reduce = np.mean if key in ("entropy", "val_loss") else np.max
            values = [reduce(line[key]) for line in lines]
            axis.plot([line["step"] for line in lines], values, label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].axhline(1, color="black", linewidth=0.7, linestyle=":")
    axes[0].legend(fontsize=8)
    return figure
