"""The `tinymoe` command: arguments in, one clear line and exit status 2 for what cannot be used."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tinymoe.cli.arguments import check_dtype, make_parser
from tinymoe.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinymoe.data import Corpus, Document
    from tinymoe.model import Mixtral
    from tinymoe.runs import Run
    from tinymoe.tokenizer import Tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for input that cannot be used, 130 for Ctrl-C."""
    options = make_parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
        sys.stdout.flush()
        return 0
    except (InputError, FloatingPointError) as error:
        problem = str(error)
    except MemoryError as error:
        problem = f"out of memory ({error}): try a smaller model or batch, or mmap" if str(error) else "out of memory"
    except BrokenPipeError:  # `tinymoe … | head` is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ntinymoe: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print("tinymoe: error: " + " ".join(problem.split()), file=sys.stderr)
    return 2


# Commands. Each imports what it needs, so that the others, and --help, start fast.


def _train(options: argparse.Namespace) -> None:
    from tinymoe import instruct, report, runs, training
    from tinymoe.cli.starting import run_of
    from tinymoe.examples import Examples
    from tinymoe.progress import TrainingProgress
    from tinymoe.tokenizer import load_tokenizer

    run, data = run_of(options)
    tokenizer = load_tokenizer(run.directory, run.config.vocab_size)
    steps, done = run.manifest["options"]["steps"], runs.steps_done(run)
    with TrainingProgress(steps, done) as progress:
        if isinstance(data, Examples):
            model, reached = instruct.train(run, data, progress)
        else:
            tokens, held_out = data.train_tokens(tokenizer), data.held_out_tokens(tokenizer)
            model, reached = training.train(run, tokens, held_out, progress)
    lines = runs.read_metrics(run.directory / runs.METRICS)
    if lines:
        dpo = isinstance(data, Examples) and data.objective == "dpo"
        report.plot(lines, run.directory / "loss.png", "nats per pair" if dpo else "nats per token")
    if reached < steps:
        print(f"stopped after step {reached} of {steps} and saved; go on with: tinymoe train --resume {run.directory}")
        return
    if isinstance(data, Examples):
        print("\n" + "\n".join(instruct.summary(run, model, data, tokenizer)))
        print(f"\nThe run is in {run.directory}: loss.png shows it, and tinymoe generate answers a prompt.")
        return
    _report(run, model, data)
    print(f"\nThe run is in {run.directory}: loss.png shows it, and this writes on:")
    print(f"  tinymoe generate {shlex.quote(str(run.directory))} 'def ' --temperature 0.8 --show-routing")


def _report(run: "Run", model: "Mixtral", corpus: "Corpus") -> None:
    from rich.console import Console

    from tinymoe import report
    from tinymoe.tokenizer import load_tokenizer

    console = Console()
    tokenizer = load_tokenizer(run.directory, run.config.vocab_size)
    seq_len = run.manifest["options"]["seq_len"]
    console.print("\n", report.render(report.domain_losses(model, corpus, tokenizer, seq_len)), sep="")
    for text in report.samples(model, corpus, tokenizer):
        console.print("\n[dim]--- a sample ---[/dim]")
        console.print(text, markup=False, highlight=False)


def _generate(options: argparse.Namespace) -> None:
    from tinymoe import writing
    from tinymoe.model import Mixtral
    from tinymoe.tokenizer import load_tokenizer

    check_dtype(options.dtype, options.backend)
    model = Mixtral.from_pretrained(options.model, backend=options.backend, dtype=options.dtype, mmap=options.mmap)
    writing.write(
        model,
        load_tokenizer(options.model, model.config.vocab_size),
        options.prompt,
        show_routing=options.show_routing,
        layer=options.layer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )


def _eval(options: argparse.Namespace) -> None:
    from tinymoe import training
    from tinymoe.data import held_out_windows

    model, tokenizer, documents_of, seq_len = _opened(options)
    texts = {name: [document.text for document in documents] for name, documents in documents_of.items()}
    print(f"{'loss':>8} {'perplexity':>11} {'bits/byte':>10}   in windows of {seq_len} tokens")
    for name, documents in texts.items():
        tokens = [tokenizer.encode(text) for text in documents]
        if max(map(len, tokens)) < 2:
            raise InputError(f"{name} has nothing to predict: give a text of at least two tokens")
        loss, count = training.evaluate(model, held_out_windows(tokens, seq_len))
        bits = training.bits_per_byte(loss, count, documents, tokens)
        print(f"{loss:8.4f} {training.perplexity(loss):11.3f} {bits:10.4f}   {name}")


def _analyze(options: argparse.Namespace) -> None:
    from tinymoe import analysis

    model, tokenizer, texts, seq_len = _opened(options)
    directory = Path(options.model)
    folder = Path(options.out) if options.out else directory / "analysis"
    analysis.command(model, tokenizer, texts, seq_len, folder, directory.resolve().name, options.tokens)


def _opened(options: argparse.Namespace) -> "tuple[Mixtral, Tokenizer, dict[str, Sequence[Document]], int]":
    """Return the model, its tokenizer, the documents to read by name, and the tokens in a window."""
    from tinymoe import runs
    from tinymoe.cli.starting import text_of
    from tinymoe.corpora import read_documents
    from tinymoe.model import Mixtral
    from tinymoe.tokenizer import load_tokenizer

    check_dtype(options.dtype, options.backend)
    directory = Path(options.model)
    run = runs.open_run(directory) if (directory / runs.MANIFEST).is_file() else None
    model = Mixtral.from_pretrained(directory, backend=options.backend, dtype=options.dtype, mmap=options.mmap)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    texts: dict[str, Sequence[Document]]
    if options.files:
        texts = {path: read_documents(path) for path in options.files}
    elif run and not run.manifest["objective"]:
        texts = dict(text_of(run.manifest["data"].get("paths")).held_out)
    else:
        raise InputError("no text is given, and this is no run with text of its own: name at least one file or folder")
    trained = run.manifest["options"].get("seq_len") if run else None
    default = trained or min(model.config.context_len, 1024)
    seq_len = default if options.seq_len is None else options.seq_len
    if not 1 <= seq_len <= model.config.context_len:
        raise InputError(f"--seq-len is {seq_len}; give from 1 to the context of {model.config.context_len}")
    return model, tokenizer, texts, seq_len


def _plan(options: argparse.Namespace) -> None:
    from tinymoe.config import load_config
    from tinymoe.scale import plan

    plan.command(
        load_config(options.config),
        batch=options.batch,
        context=options.context,
        dtype=options.dtype,
        device=options.device,
        as_json=options.json,
    )


def _doctor(options: argparse.Namespace) -> None:
    from tinymoe import doctor

    if options.kernels:
        doctor.kernels()
    else:
        doctor.command(as_json=options.json)


def _bench(options: argparse.Namespace) -> None:
    for option, what in (("only", "kernels"), ("tokens", "moe")):
        if getattr(options, option) is not None and options.what != what:
            raise InputError(f"--{option} goes with bench {what} alone")
    if options.what == "moe":
        if options.size is not None:
            raise InputError("--size goes with bench model and bench kernels: give bench moe its --tokens")
        from tinymoe.bench import moe

        moe.command(tokens=options.tokens, rounds=options.rounds, out=options.out)
        return
    if options.what == "kernels":
        from tinymoe.bench import kernels

        kernels.command(sizes=options.size, only=options.only, rounds=options.rounds, out=options.out)
        return
    from tinymoe.bench import model

    model.command(sizes=options.size, rounds=options.rounds, out=options.out)


def _experiment(options: argparse.Namespace) -> None:
    from tinymoe import experiments

    experiments.command(options.name, options.seed, options.quick, options.out)


_COMMANDS = {
    "train": _train,
    "generate": _generate,
    "eval": _eval,
    "analyze": _analyze,
    "plan": _plan,
    "bench": _bench,
    "experiment": _experiment,
    "doctor": _doctor,
}
