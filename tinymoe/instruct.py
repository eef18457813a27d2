"""Instruction tuning: supervised fine-tuning on answers alone (SFT), then direct preference optimisation (DPO)."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from tinymoe import atomic, runs, training, workers
from tinymoe.errors import InputError
from tinymoe.examples import Batch, Example, Examples, Shuffled, end_token, padded, pairs, read_examples
from tinymoe.generation import generate
from tinymoe.model import Mixtral
from tinymoe.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer

Array = np.ndarray
DEFAULTS: dict[str, dict[str, Any]] = {  # of training.Options, where they differ from pre-training's
    "sft": dict(steps=1000, batch_size=32, learning_rate=1e-3, weight_decay=0.0),
    "dpo": dict(steps=100, batch_size=32, learning_rate=1e-5, weight_decay=0.0),
}
REFERENCE = "reference.safetensors"  # of a DPO run: the log-probabilities of the model that it started from


class DpoSaved(NamedTuple):
    """What the backward of `dpo_loss` needs."""

    margins: Array  # (B,)
    beta: float


def dpo_loss(log_probs: Array, references: Array, beta: float) -> tuple[float, DpoSaved]:
    """Return the mean over pairs of −log σ(m), m = β[(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))].

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; m is the margin of the implicit reward β log(π / π_ref).

    Parameters
    ----------
    log_probs
        (2, B), of the chosen answers y_w and of the rejected ones y_l, under the model.
    references
        (2, B), the same under the reference model.
    beta
        How strongly the model is held to the reference model.
    """
    chosen, rejected = log_probs - references
    margins = beta * (chosen - rejected)
    return float(np.logaddexp(0, -margins).mean()), DpoSaved(margins, beta)


def dpo_loss_backward(dloss: float, saved: DpoSaved) -> Array:
    """Return dlog_probs (2, B) = ∓ β σ(−m) · dloss / B: the less a pair is told apart, the more it pulls."""
    margins, beta = saved
    drejected = np.exp(-np.logaddexp(0, margins)) * (beta * dloss / len(margins))  # σ(−m) without overflow
    return np.stack([-drejected, drejected])


def create(
    directory: Path,
    objective: str,
    init: str,
    path: str,
    options: training.Options,
    beta: float = 0.1,
    num_workers: int | None = None,
    command: str = "",
    backend: str = "reference",
    dtype: str = "float32",
) -> tuple[runs.Run, Examples]:
    """Make a new run that fine-tunes a model, and read its examples; nothing is written unless all of it fits.

    Parameters
    ----------
    directory
        For the run; see `runs.create`, also for the parameters that are not named here.
    objective
        ``sft`` or ``dpo``.
    init
        The run or model directory to start from; for DPO the reference model, too.
    path
        The examples, see `tinymoe.examples`.
    options
        Of the training; a batch is so many lines, and an example at most ``seq_len`` tokens.
    beta
        Of `dpo_loss`.

    Raises
    ------
    InputError
        The directory holds a run or cannot be written, the model cannot be read, or a line cannot be used.
    """
    runs.refuse_existing(directory)
    model = Mixtral.from_pretrained(init, backend=backend, dtype=dtype)
    if options.seq_len > model.config.context_len:
        raise InputError(f"--seq-len {options.seq_len} exceeds the context of {model.config.context_len}: give less")
    tokenizer = load_tokenizer(init, model.config.vocab_size)
    examples = read_examples(path, objective, tokenizer, options.seq_len)
    task: dict[str, Any] = {
        "name": objective,
        "init": init,
        "init_sha256": fingerprint(model),
        "end_token": end_token(tokenizer),
    }
    if objective == "dpo":
        task["beta"] = beta
    copy_tokenizer(init, directory)
    cores = num_workers or workers.usable_cores()
    values = dataclasses.asdict(options)
    run = runs.create(directory, model.config, values, examples.manifest, cores, command, backend, dtype, task)
    return run, examples


def examples_of(run: runs.Run) -> Examples:
    """Read the examples of a run anew.

    Raises
    ------
    InputError
        The file is gone or has changed.
    """
    data, tokenizer = run.manifest["data"], load_tokenizer(run.directory, run.config.vocab_size)
    path, seq_len = data["paths"][0], run.manifest["options"]["seq_len"]
    examples = read_examples(path, run.manifest["objective"]["name"], tokenizer, seq_len)
    if examples.manifest["sha256"] != data["sha256"]:
        raise InputError(f"{path} has changed since {run.directory} was made: it cannot be resumed; start a new run")
    return examples


def train(
    run: runs.Run, examples: Examples, report: Callable[[dict[str, Any]], None] = lambda line: None
) -> tuple[Mixtral, int]:
    """Fine-tune a run from where it stands to its last step, or until Ctrl-C; see `tinymoe.training.learn`.

    Its first step starts from the model that the manifest names, which is not needed any more once a state is saved:
    the reference log-probabilities of DPO are kept in the run's `REFERENCE`.

    Raises
    ------
    InputError
        The training diverged, that model has changed, or the directory cannot be read or written.
    """
    objective, options = run.manifest["objective"], training.Options.from_manifest(run.manifest["options"])
    backend, dtype, num_workers = (run.manifest[key] for key in ("backend", "dtype", "num_workers"))
    if fresh := runs.steps_done(run) == 0:
        model = Mixtral.from_pretrained(objective["init"], backend, dtype, num_workers=num_workers)
        if fingerprint(model) != objective["init_sha256"]:
            raise InputError(f"{objective['init']} has changed since the run was made from it: start a new run")
    else:
        model = Mixtral.init(run.config, options.seed, backend, dtype, num_workers)
    if examples.objective == "sft":
        task = sft_task(examples, options)
    else:
        if fresh:
            _save_references(run, model, examples)
        task = dpo_task(examples, _saved_references(run, examples), objective["beta"], options)
    return training.learn(run, model, task, report)


def sft_task(examples: Examples, options: training.Options) -> training.Task:
    """Return the task to predict the answers."""
    sequences = [(e.prompt, e.answers[0]) for e in examples.train]
    held_out = [padded(some)[:2] for some in _in_parts([(e.prompt, e.answers[0]) for e in examples.held_out])]

    def gradients(model: Mixtral, batch: Batch) -> training.Gradients:
        _, grads = model.loss_and_grads(batch.inputs, batch.targets, lengths=batch.lengths)
        assert model.losses is not None
        return training.Gradients(grads, int(batch.lengths.sum()), {"train_loss": model.losses.cross_entropy})

    batches = Shuffled(
        *(len(sequences), options.batch_size, options.seed), lambda chosen: padded([sequences[i] for i in chosen])
    )
    return training.Task(batches, gradients, lambda model: {"val_loss": training.evaluate(model, held_out)[0]})


def dpo_task(
    examples: Examples, references: tuple[Array, Array], beta: float, options: training.Options
) -> training.Task:
    """Return the task to prefer the chosen answers; references, (2, n) each, are those of train and held-out."""
    of_train, of_held_out = references

    def gradients(model: Mixtral, batch: Batch) -> training.Gradients:
        log_probs, backward = model.log_probs_and_backward(batch.inputs, batch.targets, batch.lengths)
        assert batch.references is not None
        loss, saved = dpo_loss(log_probs.reshape(2, -1), batch.references, beta)
        grads = backward(dpo_loss_backward(1.0, saved).ravel())
        line = {"train_loss": loss, **_told_apart(saved.margins)}
        return training.Gradients(grads, int(batch.lengths.sum()), line)

    def evaluate(model: Mixtral) -> dict[str, float]:
        loss, saved = dpo_loss(log_probs(model, examples.held_out), of_held_out, beta)
        return {"val_loss": loss, **{f"val_{name}": value for name, value in _told_apart(saved.margins).items()}}

    batches = Shuffled(
        *(len(examples.train), options.batch_size, options.seed),
        lambda chosen: pairs([examples.train[i] for i in chosen], of_train[:, chosen]),
    )
    return training.Task(batches, gradients, evaluate)


def log_probs(model: Mixtral, examples: Sequence[Example]) -> Array:
    """Return the log-probabilities of the answers of DPO's examples, (2, n): chosen, rejected."""
    parts = [model.log_probs(*pairs(some, np.empty(0))[:2]).reshape(2, -1) for some in _in_parts(examples)]
    return np.concatenate(parts, axis=1)


def preferred(log_probs: Array) -> float:
    """Return the share of pairs, log-probabilities (2, n), whose chosen answer is the more probable; ties are half."""
    return float((0.5 + 0.5 * np.sign(log_probs[0] - log_probs[1])).mean())


def _told_apart(margins: Array) -> dict[str, float]:
    """Return the share of positive margins, where one of 0 is half right, and their mean."""
    return {"preference_accuracy": preferred(np.stack([margins, 0 * margins])), "margin": float(margins.mean())}


def fingerprint(model: Mixtral) -> str:
    """Return the SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, p in model.params.items():
        digest.update(name.encode() + np.ascontiguousarray(model.host(p)).tobytes())
    return digest.hexdigest()


def _save_references(run: runs.Run, model: Mixtral, examples: Examples) -> None:
    arrays = {"train": log_probs(model, examples.train), "held_out": log_probs(model, examples.held_out)}
    try:
        atomic.write_tensors(run.directory / REFERENCE, arrays, {"data": examples.manifest["sha256"]})
    except OSError as error:
        raise InputError(f"cannot write to {run.directory}: {error.strerror or error}") from None


def _saved_references(run: runs.Run, examples: Examples) -> tuple[Array, Array]:
    path = run.directory / REFERENCE
    try:
        with safe_open(path, "np") as file:
            train, held_out = file.get_tensor("train"), file.get_tensor("held_out")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be resumed from: {str(error).splitlines()[0]}") from None
    if (train.shape, held_out.shape) != ((2, len(examples.train)), (2, len(examples.held_out))):
        raise InputError(f"{path} does not belong to the run's examples: it cannot be resumed")
    return train, held_out


# What it came to.


def answers(model: Mixtral, prompts: Sequence[Array], longest: int, end: int) -> list[Array]:
    """Return what a model answers to each prompt, greedily, of at most so many tokens, the end included."""
    found: list[Array] = [np.empty(0)] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for length, of_length in by_length.items():
        room = min(longest, model.config.context_len - length)
        for some in _in_parts(of_length):
            for i, text in zip(some, generate(model, [prompts[i] for i in some], room, eos_token=end)):
                found[i] = text[length:]
    return found


def exact_match(model: Mixtral, prompts: Sequence[Array], accepted: Sequence[Sequence[Array]], end: int) -> float:
    """Return the share of prompts to which a model greedily answers, end included, one of the accepted answers."""
    longest = max(len(answer) for of_prompt in accepted for answer in of_prompt)
    found = answers(model, prompts, longest, end)
    right = [any(np.array_equal(text, answer) for answer in of) for text, of in zip(found, accepted)]
    return sum(right) / len(right)


def summary(run: runs.Run, model: Mixtral, examples: Examples, tokenizer: Tokenizer) -> list[str]:
    """Return what a run came to on its held-out examples, in lines to print; answers are written for 200 of them."""
    options = training.Options.from_manifest(run.manifest["options"])
    prompts = [e.prompt for e in examples.held_out[:200]]
    accepted = [e.answers[:1] for e in examples.held_out[:200]]
    end = run.manifest["objective"]["end_token"]
    if examples.objective == "sft":
        measured = sft_task(examples, options).evaluate(model)
        lines = [f"loss of the {len(examples.held_out)} held-out answers  {measured['val_loss']:.4f} nats per token"]
    else:
        references = _saved_references(run, examples)
        measured = dpo_task(examples, references, run.manifest["objective"]["beta"], options).evaluate(model)
        raw, before = preferred(log_probs(model, examples.held_out)), preferred(references[1])
        lines = [
            f"of the {len(examples.held_out)} held-out pairs",
            f"  the chosen answer gained on the rejected one in {measured['val_preference_accuracy']:7.1%}",
            f"  the chosen answer is more probable in {raw:21.1%}, before {before:.1%}",
            f"  mean margin of the implicit reward {measured['val_margin']:24.3f}",
        ]
    lines.append(f"greedy answers that match {exact_match(model, prompts, accepted, end):.1%} of {len(prompts)}")
    shown = answers(model, prompts[:3], max(len(answer) for of in accepted for answer in of), end)
    return lines + [f"  {tokenizer.decode(p)!r} -> {tokenizer.decode(text)!r}" for p, text in zip(prompts, shown)]


def _in_parts(items: Sequence[Any], size: int = 64) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
