"""What `tinymoe train` starts from: a new run on text, one that fine-tunes a model, or a run that was stopped."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from tinymoe import corpora, instruct, runs, training, workers
from tinymoe.cli.arguments import BALANCING, OPTIONS, check_dtype
from tinymoe.config import load_config
from tinymoe.data import Batches, Corpus
from tinymoe.errors import InputError
from tinymoe.examples import Examples
from tinymoe.runs import Run
from tinymoe.tokenizer import copy_tokenizer, load_tokenizer


def run_of(options: argparse.Namespace) -> tuple[Run, Corpus | Examples]:
    """Return the run that the options of `tinymoe train` ask for, made or opened, and what it learns from.

    Raises
    ------
    InputError
        They do not go together or cannot be used; then no run is made.
    """
    if options.resume:
        return _resumed(options)
    if options.objective in ("sft", "dpo"):
        return _started_from(options)
    if options.init is not None or options.beta is not None:
        raise InputError("--init and --beta go with --objective sft or dpo: pre-training starts from random weights")
    return _started(options)


def text_of(paths: list[str] | None) -> Corpus:
    """Return the text of files and folders, or the standard library."""
    return corpora.from_paths(paths) if paths else corpora.standard_library()


def _started(options: argparse.Namespace) -> tuple[Run, Corpus]:
    name, backend, dtype = options.config or "small", options.backend or "reference", options.dtype or "float32"
    check_dtype(dtype, backend)
    given, changes = (
        {name: value for name, value in vars(options).items() if name in names and value is not None}
        for names in (OPTIONS, BALANCING)
    )
    config = dataclasses.replace(load_config(name), **changes)
    wanted = training.Options(**given)
    if wanted.seq_len > config.context_len:
        raise InputError(f"--seq-len {wanted.seq_len} exceeds the context of {config.context_len}: give less")
    directory = Path(options.out or Path("runs") / Path(name).stem)
    runs.refuse_existing(directory)
    tokenizer = load_tokenizer(options.tokenizer or directory, config.vocab_size)
    corpus = text_of(options.data)
    tokens = corpus.train_tokens(tokenizer)
    Batches(tokens, wanted.batch_size, wanted.seq_len, wanted.seed)  # refuses text that is too short,
    corpus.held_out_tokens(tokenizer)  # and this what leaves nothing to evaluate, before the folder is made
    if options.minutes is not None:
        print(f"measuring how many steps fit into {options.minutes:g} minutes", flush=True)
        steps = training.steps_within(60 * options.minutes, config, tokens, wanted, backend, dtype)
        wanted = dataclasses.replace(wanted, steps=steps)
    if options.warmup is None:
        wanted = dataclasses.replace(wanted, warmup=min(wanted.warmup, wanted.steps // 10))
    command = shlex.join(["tinymoe", *sys.argv[1:]])
    cores = options.workers or workers.usable_cores()
    if options.tokenizer:
        copy_tokenizer(options.tokenizer, directory)
    run = runs.create(directory, config, dataclasses.asdict(wanted), corpus.manifest(), cores, command, backend, dtype)
    print(
        f"training {config.count_parameters():,} parameters ({config.count_active_parameters():,} active) for "
        f"{wanted.steps:,} steps of {wanted.batch_size * wanted.accumulate} x {wanted.seq_len} tokens, in {directory}",
        flush=True,
    )
    return run, corpus


def _started_from(options: argparse.Namespace) -> tuple[Run, Examples]:
    """Make a run that fine-tunes the model of --init."""
    name, backend, dtype = options.objective, options.backend or "reference", options.dtype or "float32"
    check_dtype(dtype, backend)
    for other in ("config", "tokenizer", "minutes", *BALANCING):
        if getattr(options, other) is not None:
            raise InputError(f"--{other.replace('_', '-')} goes with pre-training: --init has the model, leave it out")
    if options.init is None:
        raise InputError(f"--objective {name} needs --init RUN: the run or model directory to start from")
    if options.data is None or len(options.data) != 1:
        raise InputError(f"--objective {name} needs --data FILE.jsonl: one file of examples")
    if options.beta is not None and name != "dpo":
        raise InputError("--beta goes with --objective dpo: leave it out")
    given = {name: value for name, value in vars(options).items() if name in OPTIONS and value is not None}
    wanted = training.Options(**(instruct.DEFAULTS[name] | given))
    if options.warmup is None:
        wanted = dataclasses.replace(wanted, warmup=min(wanted.warmup, wanted.steps // 10))
    directory = Path(options.out or Path("runs") / name)
    run, examples = instruct.create(
        *(directory, name, options.init, options.data[0], wanted),
        *(0.1 if options.beta is None else options.beta, options.workers),
        *(shlex.join(["tinymoe", *sys.argv[1:]]), backend, dtype),
    )
    print(
        f"{name} of {options.init} on {len(examples.train):,} examples, {len(examples.held_out):,} held out, for "
        f"{wanted.steps:,} steps of {wanted.batch_size * wanted.accumulate}, in {directory}",
        flush=True,
    )
    return run, examples


def _resumed(options: argparse.Namespace) -> tuple[Run, Corpus | Examples]:
    others = ("config", "data", "out", "minutes", "workers", "tokenizer", "backend", "dtype")
    names = (*OPTIONS, *BALANCING, *others, "objective", "init", "beta")
    fixed = [name for name in names if getattr(options, name) is not None]
    if fixed:
        raise InputError(f"--{fixed[0].replace('_', '-')} cannot go with --resume: the run's manifest fixes it")
    run = runs.open_run(Path(options.resume))
    if run.manifest["objective"]:
        return run, instruct.examples_of(run)
    corpus = text_of(run.manifest["data"].get("paths"))
    if corpus.manifest()["domains"] != run.manifest["data"].get("domains"):
        raise InputError(
            f"the text that {run.directory} was trained on has changed (another Python, or other files): "
            "it cannot be resumed; start a new run"
        )
    return run, corpus
