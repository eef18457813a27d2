"""Instruction tuning: from plain text to answers, and from there to a preference between two forms of an answer.

A small model reads synthetic text; is fine-tuned on instructions such as ``reverse: bado``, half of whose answers end
in a full stop; then DPO prefers the full stop. An answer matches in either form, so the preference has no part in what
is right: exact match is to stay, while the full stop takes over. The instructions that measure it are held out. DPO at
ten times the learning rate shows what its own figures hide: it tells the pairs apart no worse, and answers no more.
"""

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinymoe import examples, instruct, runs, training, workers
from tinymoe.config import MixtralConfig
from tinymoe.corpora import synthetic
from tinymoe.data import Corpus
from tinymoe.model import Mixtral
from tinymoe.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "first": lambda word: word[0],
    "length": lambda word: str(len(word)),
}
STAGES = ("base", "sft", "dpo", "dpo, 10 x rate")
RATES = (3e-3, 2e-3, 1e-5, 1e-4)
ACCURATE, FEWER = 0.95, 0.02  # what it is to reach: preferred pairs at least, and exact match lost at most


PIECE = 72  # bytes of the text among the instructions


class Size(NamedTuple):
    """How much of everything."""

    dim: int
    n_layers: int
    words: int
    text_bytes: int  # of each of four domains
    steps: tuple[int, int, int, int]  # of each stage
    batch_size: int


FULL = Size(64, 2, 1000, 65536, (1000, 2000, 100, 100), 32)
QUICK = Size(16, 1, 12, 2048, (4, 4, 4, 4), 4)


def run(seed: int, quick: bool) -> dict[str, Any]:
    """Train base, SFT and DPO one after the other and measure each on the same held-out text and instructions."""
    size = QUICK if quick else FULL
    corpus, tokenizer = synthetic(seed, size.text_bytes), ByteTokenizer()
    text = training.sample_windows(corpus.held_out_tokens(tokenizer), 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examples(folder, seed, size.words, corpus)
        options = {
            stage: training.Options(
                steps=steps,
                batch_size=size.batch_size,
                seq_len=64 if stage == "base" else 128,
                learning_rate=rate,
                weight_decay=0.1 if stage == "base" else 0.0,
                warmup=steps // 10,
                eval_every=max(1, steps // 20),
                save_every=steps,
                seed=seed,
            )
            for stage, steps, rate in zip(STAGES, size.steps, RATES)
        }
        config = MixtralConfig(
            dim=size.dim,
            n_layers=size.n_layers,
            hidden_dim=2 * size.dim,
            n_heads=4,
            n_kv_heads=2,
            context_len=128,
            vocab_size=256,
            num_experts=4,
            aux_loss_coef=0.01,
        )
        base = runs.create(
            *(folder / "base", config, vars(options["base"]), corpus.manifest(), workers.usable_cores(), "experiment")
        )
        model, _ = training.train(base, corpus.train_tokens(tokenizer), corpus.held_out_tokens(tokenizer))
        pairs = examples.read_examples(folder / "dpo.jsonl", "dpo", tokenizer, 128).held_out
        stages = {"base": measure(model, text, pairs, None)}
        curves, reference = {}, None
        for stage, objective, init in zip(STAGES[1:], ("sft", "dpo", "dpo"), ("base", "sft", "sft")):
            data = str(folder / f"{objective}.jsonl")
            made = instruct.create(folder / stage, objective, str(folder / init), data, options[stage])
            model, _ = instruct.train(*made)
            stages[stage] = measure(model, text, pairs, reference)
            if stage == "sft":
                reference = instruct.log_probs(model, pairs)
            else:
                curves[stage] = _curve(runs.read_metrics(folder / stage / runs.METRICS))
            if not quick:
                print(f"{stage}: {stages[stage]}", flush=True)
    lost = stages["sft"]["exact_match"] - stages["dpo"]["exact_match"]
    return {
        "parameters": config.count_parameters(),
        "held_out": len(pairs),
        "size": size._asdict(),
        "options": {stage: vars(of_stage) for stage, of_stage in options.items()},
        "stages": stages,
        "curves": curves,
        "reached": {
            "preference accuracy of 95 %": stages["dpo"]["implicit_accuracy"] >= ACCURATE,
            "exact match at most 2 points down": lost <= FEWER,
        },
    }


def _curve(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {
        key: [line[key] for line in lines if key in line and "val_loss" in line]
        for key in ("step", "val_preference_accuracy", "val_margin")
    }


def write_examples(folder: Path, seed: int, words: int, corpus: Corpus) -> None:
    """Write sft.jsonl and dpo.jsonl: every task on so many words, the former in one of the two forms of its answer.

    sft.jsonl also has two pieces of the corpus for each word, their beginnings as prompts: without them, fine-tuning
    undoes what the base model knows of its text.
    """
    rng = random.Random(f"{seed} instructions")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    chosen: set[str] = set()
    while len(chosen) < words:
        chosen.add("".join(syllables[int(rng.random() * len(syllables))] for _ in range(2 + len(chosen) % 2)))
    text = b"".join(document.text for documents in corpus.train.values() for document in documents).decode()
    with open(folder / "sft.jsonl", "w") as sft, open(folder / "dpo.jsonl", "w") as dpo:
        for word in sorted(chosen):
            for task, answer_to in TASKS.items():
                prompt, plain = f"{task}: {word}\n", answer_to(word)
                answer = plain + "." * (rng.random() < 0.5)
                sft.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
                dpo.write(json.dumps({"prompt": prompt, "chosen": plain + ".", "rejected": plain}) + "\n")
            for _ in range(2):
                start = int(rng.random() * (len(text) - PIECE))
                piece = {"prompt": text[start : start + 8], "answer": text[start + 8 : start + PIECE]}
                sft.write(json.dumps(piece) + "\n")


def measure(
    model: Mixtral, text: training.Windows, pairs: Sequence[examples.Example], reference: np.ndarray | None
) -> dict[str, Any]:
    """Return what a model is worth: on plain text, at the instructions, and at the preference.

    Parameters
    ----------
    model
        After any stage.
    text
        Held-out windows.
    pairs
        Held-out instructions, each with the preferred form of its answer and the other one.
    reference
        (2, n), what `instruct.log_probs` gave for the model before DPO; None: there is no such model yet.
    """
    prompts, accepted = [pair.prompt for pair in pairs], [pair.answers for pair in pairs]
    end = examples.end_token(ByteTokenizer())
    found = instruct.answers(model, prompts, max(len(answer) for of in accepted for answer in of), end)
    right = np.array([[np.array_equal(answer, form) for form in of] for answer, of in zip(found, accepted)])  # (n, 2)
    tasks = np.array([bytes(prompt.astype(np.uint8)).split(b":")[0].decode() for prompt in prompts])
    log_probs = instruct.log_probs(model, pairs)
    margins = np.zeros(len(pairs))
    if reference is not None:
        margins = instruct.dpo_loss(log_probs, reference, 0.1)[1].margins
    return {
        "text_loss": training.evaluate(model, text)[0],
        "exact_match": float(right.any(axis=1).mean()),
        "exact_match_of": {
            task: float(right[tasks == task].any(axis=1).mean()) for task in sorted(set(tasks.tolist()))
        },
        "preferred_form": float(right[:, 0].mean()),
        "chosen_more_probable": instruct.preferred(log_probs),
        "implicit_accuracy": instruct.preferred(np.stack([margins, np.zeros_like(margins)])),
        "margin": float(margins.mean()),
        "chosen_log_prob": float(log_probs[0].mean()),
    }


def plot(numbers: dict[str, Any]) -> "Figure":
    """Draw the stages side by side, and DPO's held-out pairs over its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    stages, places = numbers["stages"], np.arange(len(STAGES))
    names = [stage.replace(", ", "\n") for stage in STAGES]
    shown = {"exact_match": "exact match, either form", "preferred_form": "exact match, with full stop"}
    shown |= {"chosen_more_probable": "full stop more probable", "implicit_accuracy": "pair told apart against SFT"}
    for i, (key, label) in enumerate(shown.items()):
        left.bar(places + 0.2 * (i - 1.5), [stages[stage][key] for stage in STAGES], 0.2, label=label)
    left.set(xticks=places, xticklabels=names, ylim=(0, 1.45), title=f"{numbers['held_out']} held-out instructions")
    left.legend(fontsize=8, loc="upper left", ncols=2)
    middle.bar(places, [stages[stage]["text_loss"] for stage in STAGES], 0.5, color="tab:gray")
    middle.set(xticks=places, xticklabels=names, ylabel="nats per byte", title="loss on the base model's text")
    margin = right.twinx()
    for (stage, curve), line in zip(numbers["curves"].items(), ("-", ":")):
        right.plot(curve["step"], curve["val_preference_accuracy"], line, color="tab:blue", label=stage)
        margin.plot(curve["step"], curve["val_margin"], line, color="tab:orange")
    right.set(xlabel="step of DPO", title="held-out pairs", ylim=(0, 1.05))
    right.set_ylabel("preference accuracy", color="tab:blue")
    right.legend(fontsize=8, loc="lower right")
    margin.set_ylabel("margin of the implicit reward", color="tab:orange")
    return figure
