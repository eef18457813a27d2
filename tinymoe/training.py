"""Training: the schedule, clipping, accumulation and evaluation, in a loop that can be stopped and resumed anywhere."""

import dataclasses
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from tinymoe import runs
from tinymoe.balance import moved_biases
from tinymoe.config import MixtralConfig
from tinymoe.data import Batches, held_out_windows
from tinymoe.errors import InputError
from tinymoe.model import Mixtral
from tinymoe.reference.loss import IGNORED
from tinymoe.reference.optimizer import AdamW

Array = np.ndarray
Windows = list[tuple[Array, Array]]
CALIBRATION_SECONDS = 4.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What, beside the config and the data, determines a run.

    Parameters
    ----------
    steps
        Updates of the weights.
    batch_size, seq_len
        Sequences in a batch and tokens in a sequence.
    accumulate
        Batches whose gradients are averaged for one update.
    learning_rate
        Its peak, reached after ``warmup`` steps; it falls along a cosine to a tenth of it.
    weight_decay, beta1, beta2
        Of AdamW.
    clip
        The gradient's norm is scaled down to this; 0 leaves it.
    eval_every, save_every
        In steps.
    seed
        Of the weights and of the order of the text.
    """

    steps: int = 1500
    batch_size: int = 16
    seq_len: int = 128
    accumulate: int = 1
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    eval_every: int = 100
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        least = dict(steps=1, batch_size=1, seq_len=1, accumulate=1, warmup=0, eval_every=1, save_every=1, seed=0)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = (int,) if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise InputError(f"{field.name} is {value!r}; give {'an integer' if kind == (int,) else 'a number'}")
            if not least.get(field.name, 0) <= value < math.inf:
                raise InputError(f"{field.name} is {value}; give at least {least.get(field.name, 0)}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name} is {getattr(self, name)}; give less than 1")

    @classmethod
    def from_manifest(cls, values: Any) -> "Options":
        """Read the options of a manifest."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise InputError(f"the manifest's options must be {', '.join(sorted(names))}: it is damaged")
        return cls(**values)


class Gradients(NamedTuple):
    """What one batch gives."""

    grads: dict[str, Array]
    tokens: int  # that it has
    line: dict[str, float]  # for the metrics: train_loss, and whatever else


class Task(NamedTuple):
    """What a run learns, and how it is measured."""

    batches: Any  # batches[number] depends on the number alone
    gradients: Callable[[Mixtral, Any], Gradients]  # of a model on a batch
    evaluate: Callable[[Mixtral], dict[str, float]]  # for the metrics: val_loss on held-out text, and whatever else


def learning_rate(step: int, options: Options) -> float:
    """Return the rate of update ``step`` (from 0): linear warm-up, then a cosine down to a tenth of the peak."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def clip_gradients(grads: Mapping[str, Array], clip: float) -> float:
    """Scale the gradients in place so that their joint norm is at most ``clip`` (0: leave them); return the norm."""
    norm = math.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads.values()))
    if clip and norm > clip:
        for grad in grads.values():
            grad *= clip / norm
    return norm


def evaluate(model: Mixtral, windows: Iterable[tuple[Array, Array]]) -> tuple[float, int]:
    """Return the mean loss in nats per predicted token over batches (inputs, targets), and the number of tokens."""
    total, tokens = 0.0, 0
    for inputs, targets in windows:
        count = int(np.count_nonzero(targets != IGNORED))
        total += model.loss(inputs, targets) * count
        tokens += count
    return total / tokens, tokens


def perplexity(loss: float) -> float:
    """Return exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, count: int, documents: Iterable[bytes], tokens: Iterable[Array]) -> float:
    """Return the bits that a mean loss over ``count`` tokens comes to for each byte of the documents.

    Where tokens are bytes that is loss / ln 2: a document's first token is not predicted, and its share of the bytes,
    taken as even, is left out.
    """
    predicted = sum(len(text) * (1 - 1 / max(len(ids), 1)) for text, ids in zip(documents, tokens))
    return loss * count / math.log(2) / predicted


def sample_windows(documents: Mapping[str, list[Array]], seq_len: int, most: int = 256) -> Windows:
    """Return about ``most`` held-out windows, spread evenly over all the text, to follow the loss while training."""
    every = [
        window
        for texts in documents.values()
        for inputs, targets in held_out_windows(texts, seq_len)
        for window in zip(inputs, targets)
    ]
    chosen = every[:: math.ceil(len(every) / most)]
    batches = [chosen[i : i + 32] for i in range(0, len(chosen), 32)]
    return [(np.stack([x for x, _ in batch]), np.stack([y for _, y in batch])) for batch in batches]


def steps_within(
    seconds: float,
    config: MixtralConfig,
    tokens: Array,
    options: Options,
    backend: str = "reference",
    dtype: str = "float32",
) -> int:
    """Return how many steps fit into a time, from the median of a few seconds of trial steps on another model."""
    model = Mixtral.init(config, options.seed, backend, dtype)
    optimizer = model.ops.AdamW(model.params)
    batches = Batches(tokens, options.batch_size, options.seq_len, options.seed)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - begin < min(CALIBRATION_SECONDS, seconds / 4):
        start = time.perf_counter()
        optimizer.step(_gradients(model, batches, len(times), options)[0])
        times.append(time.perf_counter() - start)
    spent = time.perf_counter() - begin
    return max(1, int((seconds - spent) / statistics.median(times[1:])))


def train(
    run: runs.Run,
    tokens: Array,
    held_out: Mapping[str, list[Array]],
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> tuple[Mixtral, int]:
    """Pre-train a run on text, from where it stands to its last step, or until Ctrl-C: see `learn`.

    Parameters
    ----------
    run
        From `runs.create` or `runs.open_run`.
    tokens
        The training text, (n,).
    held_out
        Domain → documents, to evaluate on.
    report
        Called with each line of the metrics.

    Returns
    -------
    model, steps
        What `learn` returns.

    Raises
    ------
    InputError
        The training diverged, the text is too short, or the directory cannot be written.
    """
    options = Options.from_manifest(run.manifest["options"])
    backend, dtype, workers = (run.manifest[key] for key in ("backend", "dtype", "num_workers"))
    model = Mixtral.init(run.config, options.seed, backend, dtype, workers)
    batches = Batches(tokens, options.batch_size, options.seq_len, options.seed)
    windows = sample_windows(held_out, options.seq_len)
    return learn(run, model, Task(batches, of_text, lambda model: {"val_loss": evaluate(model, windows)[0]}), report)


def learn(
    run: runs.Run,
    model: Mixtral,
    task: Task,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> tuple[Mixtral, int]:
    """Train a run from where it stands to its last step, or until Ctrl-C, and save it.

    The same run gives the same bits however often it is stopped: a batch depends on the seed and the step alone, and
    the state on disk is whole.

    Parameters
    ----------
    run
        From `runs.create` or `runs.open_run`.
    model
        With the weights of the first step; if the run has a saved state, it is brought to that.
    task
        What to learn.
    report
        Called with each line of the metrics.

    Returns
    -------
    model
        As it stands.
    steps
        Taken in all; fewer than the options' when Ctrl-C stopped it.

    Raises
    ------
    InputError
        The training diverged, or the directory cannot be written.
    """
    options = Options.from_manifest(run.manifest["options"])
    betas = options.beta1, options.beta2
    optimizer = model.ops.AdamW(model.params, betas=betas, weight_decay=options.weight_decay)
    runs.restore(run, model, optimizer)
    metrics = runs.Metrics(run, optimizer.steps)
    saved = optimizer.steps
    try:
        with _Stop() as stop:
            while optimizer.steps < options.steps and not stop.asked:
                line = take_step(model, optimizer, task, options)
                last = optimizer.steps == options.steps
                if last or optimizer.steps % options.eval_every == 0:
                    line |= task.evaluate(model)
                metrics.write(line)
                report(line)
                if last or stop.asked or optimizer.steps % options.save_every == 0:
                    metrics.flush()
                    runs.save(run, model, optimizer)
                    saved = optimizer.steps
    except FloatingPointError as error:
        raise InputError(
            f"training diverged at step {optimizer.steps + 1}: {error}; lower --learning-rate (now "
            f"{options.learning_rate}) or --clip (now {options.clip}); "
            + (f"step {saved} is saved in {run.directory}" if saved else "nothing was saved yet")
        ) from None
    finally:
        metrics.close()
    return model, optimizer.steps


def take_step(model: Mixtral, optimizer: AdamW, task: Task, options: Options) -> dict[str, Any]:
    """Take one step and return its line of the metrics."""
    start = time.perf_counter()
    grads, line = _gradients(model, task.batches, optimizer.steps, options, task.gradients)
    norm = clip_gradients(grads, options.clip)
    if not math.isfinite(norm):
        raise FloatingPointError(_first_not_finite(model, grads))
    rate = optimizer.learning_rate = learning_rate(optimizer.steps, options)
    optimizer.step(grads)
    if model.config.bias_update_rate:
        _move_biases(model, optimizer, np.array(line["expert_load"]))
    speed = round(line.pop("tokens") / (time.perf_counter() - start))
    return {
        "step": optimizer.steps,
        **line,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens_per_second": speed,
    }


def _move_biases(model: Mixtral, optimizer: AdamW, load: Array) -> None:
    """Move the router's biases against the load of a step, and their masters where the weights have some."""
    names = {layer: f"layers.{layer}.moe.bias" for layer in model.config.moe_layers}
    masters = getattr(optimizer, "master", {})
    before = {layer: model.host(masters.get(name, model.params[name])) for layer, name in names.items()}
    for layer, bias in moved_biases(before, load, model.config).items():
        for kept in (model.params, masters):
            if names[layer] in kept:
                kept[names[layer]][...] = model.place(bias, kept[names[layer]].dtype)


def of_text(model: Mixtral, batch: tuple[Array, Array]) -> Gradients:
    """Return the gradients of the cross-entropy of every token of a batch."""
    _, grads = model.loss_and_grads(*batch)
    assert model.losses is not None
    return Gradients(grads, batch[0].size, {"train_loss": model.losses.cross_entropy})


def _gradients(
    model: Mixtral,
    batches: Any,
    step: int,
    options: Options,
    of_batch: Callable[[Mixtral, Any], Gradients] = of_text,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the gradients of one step, averaged over its batches, and its tokens, losses and load for the metrics.

    Those of a bfloat16 model come as float32, so that their sum, their norm and the clipping do not round again.
    """
    total: dict[str, Array] = {}
    losses: dict[str, float] = {}
    aux, tokens = 0.0, 0
    load, dropped = np.zeros((model.config.n_layers, model.config.num_experts)), np.zeros(model.config.n_layers)
    for batch in range(step * options.accumulate, (step + 1) * options.accumulate):
        grads, of_tokens, line = of_batch(model, batches[batch])
        if model.dtype.name == "bfloat16":
            grads = {name: grad.astype(np.float32) for name, grad in grads.items()}
        assert model.losses is not None
        tokens += of_tokens
        losses = {name: losses.get(name, 0.0) + value / options.accumulate for name, value in line.items()}
        aux += float(model.losses.switch.sum()) / max(1, len(model.config.moe_layers)) / options.accumulate
        load += model.losses.load / options.accumulate
        dropped += model.losses.dropped / options.accumulate
        if not total:
            total = grads
        else:
            for name, grad in grads.items():
                total[name] += grad
    if options.accumulate > 1:
        for grad in total.values():
            grad /= options.accumulate
    if not math.isfinite(losses["train_loss"]):
        raise FloatingPointError(_first_not_finite(model, {}, batches[batch][0]))
    line = {**losses, "tokens": tokens, "aux_loss": aux, "expert_load": np.round(load, 5).tolist()}
    if model.config.capacity_factor is not None:
        line["dropped"] = np.round(dropped, 5).tolist()
    return total, line


def _first_not_finite(model: Mixtral, grads: Mapping[str, Array], tokens: Array | None = None) -> str:
    """Say where the numbers broke: the first layer forward, or the first gradient backward."""
    for name, p in model.params.items():
        if not np.isfinite(model.host(p)).all():
            return f"the weights {name} are not finite"
    if tokens is not None:
        layer = model.first_layer_not_finite(tokens)
        return f"the loss is not finite, from layer {layer} on" if layer is not None else "the logits are not finite"
    broken = [name for name, grad in grads.items() if not np.isfinite(model.host(grad)).all()]
    return f"the gradient of {broken[-1]} is not finite" if broken else "the gradient's norm overflows"


class _Stop:
    """Turns Ctrl-C, and a request to terminate, into a question between steps; a second one interrupts at once."""

    asked = False

    def __enter__(self) -> "_Stop":
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread, where no signal arrives
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
