"""The `tinymoe` command: arguments in, one clear line and exit status 2 for what cannot be used."""

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tinymoe import __version__
from tinymoe.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinymoe.data import Corpus, Document
    from tinymoe.examples import Examples
    from tinymoe.model import Mixtral
    from tinymoe.runs import Run
    from tinymoe.tokenizer import Tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for input that cannot be used, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
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
    from tinymoe.examples import Examples
    from tinymoe.progress import TrainingProgress
    from tinymoe.tokenizer import load_tokenizer

    if options.resume:
        run, data = _resumed(options)
    elif options.objective in ("sft", "dpo"):
        run, data = _started_from(options)
    elif options.init is not None or options.beta is not None:
        raise InputError("--init and --beta go with --objective sft or dpo: pre-training starts from random weights")
    else:
        run, data = _started(options)
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


def _started(options: argparse.Namespace) -> "tuple[Run, Corpus]":
    from tinymoe import runs, training, workers
    from tinymoe.config import load_config
    from tinymoe.data import Batches
    from tinymoe.tokenizer import copy_tokenizer, load_tokenizer

    name, backend, dtype = options.config or "small", options.backend or "reference", options.dtype or "float32"
    _check_dtype(dtype, backend)
    given, changes = (
        {name: value for name, value in vars(options).items() if name in names and value is not None}
        for names in (_OPTIONS, _BALANCING)
    )
    config = dataclasses.replace(load_config(name), **changes)
    wanted = training.Options(**given)
    if wanted.seq_len > config.context_len:
        raise InputError(f"--seq-len {wanted.seq_len} exceeds the context of {config.context_len}: give less")
    directory = Path(options.out or Path("runs") / Path(name).stem)
    runs.refuse_existing(directory)
    tokenizer = load_tokenizer(options.tokenizer or directory, config.vocab_size)
    corpus = _corpus(options.data)
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


def _started_from(options: argparse.Namespace) -> "tuple[Run, Examples]":
    """Make a run that fine-tunes the model of --init."""
    from tinymoe import instruct, training

    name, backend, dtype = options.objective, options.backend or "reference", options.dtype or "float32"
    _check_dtype(dtype, backend)
    for other in ("config", "tokenizer", "minutes", *_BALANCING):
        if getattr(options, other) is not None:
            raise InputError(f"--{other.replace('_', '-')} goes with pre-training: --init has the model, leave it out")
    if options.init is None:
        raise InputError(f"--objective {name} needs --init RUN: the run or model directory to start from")
    if options.data is None or len(options.data) != 1:
        raise InputError(f"--objective {name} needs --data FILE.jsonl: one file of examples")
    if options.beta is not None and name != "dpo":
        raise InputError("--beta goes with --objective dpo: leave it out")
    given = {name: value for name, value in vars(options).items() if name in _OPTIONS and value is not None}
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


def _resumed(options: argparse.Namespace) -> "tuple[Run, Corpus | Examples]":
    from tinymoe import instruct, runs

    others = ("config", "data", "out", "minutes", "workers", "tokenizer", "backend", "dtype")
    names = (*_OPTIONS, *_BALANCING, *others, "objective", "init", "beta")
    fixed = [name for name in names if getattr(options, name) is not None]
    if fixed:
        raise InputError(f"--{fixed[0].replace('_', '-')} cannot go with --resume: the run's manifest fixes it")
    run = runs.open_run(Path(options.resume))
    if run.manifest["objective"]:
        return run, instruct.examples_of(run)
    corpus = _corpus(run.manifest["data"].get("paths"))
    if corpus.manifest()["domains"] != run.manifest["data"].get("domains"):
        raise InputError(
            f"the text that {run.directory} was trained on has changed (another Python, or other files): "
            "it cannot be resumed; start a new run"
        )
    return run, corpus


def _check_dtype(dtype: str, backend: str) -> None:
    if dtype == "bfloat16" and backend != "cuda":
        raise InputError(f"--dtype bfloat16 needs --backend cuda: the {backend} backend computes in float32")


def _corpus(paths: list[str] | None) -> "Corpus":
    from tinymoe import corpora

    return corpora.from_paths(paths) if paths else corpora.standard_library()


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

    _check_dtype(options.dtype, options.backend)
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
    from tinymoe.corpora import read_documents
    from tinymoe.model import Mixtral
    from tinymoe.tokenizer import load_tokenizer

    _check_dtype(options.dtype, options.backend)
    directory = Path(options.model)
    run = runs.open_run(directory) if (directory / runs.MANIFEST).is_file() else None
    model = Mixtral.from_pretrained(directory, backend=options.backend, dtype=options.dtype, mmap=options.mmap)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    texts: dict[str, Sequence[Document]]
    if options.files:
        texts = {path: read_documents(path) for path in options.files}
    elif run and not run.manifest["objective"]:
        texts = dict(_corpus(run.manifest["data"].get("paths")).held_out)
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
    if options.what == "kernels":
        from tinymoe.bench import kernels

        kernels.command(sizes=options.size, only=options.only, rounds=options.rounds, out=options.out)
        return
    if options.only is not None:
        raise InputError("--only goes with bench kernels: give bench model its --size")
    from tinymoe.bench import model

    model.command(sizes=options.size, rounds=options.rounds, out=options.out)


def _experiment(options: argparse.Namespace) -> None:
    from tinymoe import experiments

    experiments.command(options.name, options.seed, options.quick, options.out)


# Arguments.

_BACKENDS = ("reference", "cuda")
_DTYPES = ("float32", "bfloat16")
_OPTIONS = {  # of training.Options: help, in the order shown; the defaults stand there
    "steps": (int, "updates of the weights (1500)"),
    "batch_size": (int, "sequences in a batch (16)"),
    "seq_len": (int, "tokens in a sequence (128)"),
    "accumulate": (int, "batches averaged for one update (1)"),
    "learning_rate": (float, "peak rate of AdamW (3e-3)"),
    "warmup": (int, "steps of linear warm-up (100, or a tenth of the steps)"),
    "weight_decay": (float, "decoupled decay, not of norms (0.1)"),
    "beta1": (float, "of AdamW (0.9)"),
    "beta2": (float, "of AdamW (0.95)"),
    "clip": (float, "largest norm of the gradient, 0 for none (1.0)"),
    "eval_every": (int, "steps between evaluations (100)"),
    "save_every": (int, "steps between saves (100)"),
    "seed": (int, "of weights and batches (0)"),
}
_BALANCING = {  # of MixtralConfig: help; the defaults are the config's
    "aux_loss_coef": (float, "weight of the Switch balance loss"),
    "z_loss_coef": (float, "weight of the router z-loss"),
    "capacity_factor": (float, "an expert takes at most this times its fair share of a batch, the rest is dropped"),
    "router_jitter": (float, "multiply the router's input by uniform noise up to so far from 1"),
    "noisy_top_k": (bool, "add normal noise of a learnt scale to the router's logits"),
    "bias_update_rate": (float, "move a bias of the selection so far at each step, against the load"),
    "expert_choice": (bool, "let experts choose tokens; not causal: to compare, not to write"),
    "moe_every": (int, "experts in every so many layers only (1)"),
}


_OBJECTIVE = (
    "pretrain on text (the default); sft: fine-tune on the answers of --data FILE.jsonl, one object a line of prompt "
    "and answer; dpo: prefer by one of prompt, chosen and rejected"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tinymoe: error: {' '.join(message.split())}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tinymoe", description="Mixtral of Experts from scratch: train, write, evaluate, plan.")
    parser.add_argument("--version", action="version", version=f"tinymoe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(run=run)
        return command

    train = add("train", _train, "train a model on the standard library or on your text")
    train.add_argument("--config", help="preset or config.json (small)")
    train.add_argument("--data", nargs="+", metavar="PATH", help="text files or folders (the standard library)")
    train.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json or tokenizer.model (bytes)")
    train.add_argument("--out", metavar="RUN", help="new folder for the run (runs/ and the config's name)")
    train.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    train.add_argument("--minutes", type=_positive, help="as many steps as fit; measured first, then fixed")
    train.add_argument("--workers", type=_count, help="threads that share a batch (one per core)")
    train.add_argument("--backend", choices=_BACKENDS, help="reference (NumPy) or cuda")
    train.add_argument("--dtype", choices=_DTYPES, help="of the weights: float32 or, on cuda, bfloat16 (float32)")
    train.add_argument("--objective", choices=("pretrain", "sft", "dpo"), help=_OBJECTIVE)
    train.add_argument("--init", metavar="RUN", help="sft, dpo: the run or model directory to start from")
    train.add_argument("--beta", type=_positive, help="dpo: how strongly the model is held to that of --init (0.1)")
    for name, (kind, text) in (_OPTIONS | _BALANCING).items():
        how: dict[str, Any] = dict(action="store_true", default=None) if kind is bool else dict(type=kind)
        train.add_argument(f"--{name.replace('_', '-')}", help=text, **how)

    generate = add("generate", _generate, "let a model write on from a prompt")
    generate.add_argument("model", metavar="RUN", help="run or model directory")
    generate.add_argument("prompt", nargs="+", help="one text, or several that are continued together")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="how many tokens to add at most (200)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most probable token (0)")
    generate.add_argument("--top-k", type=int, help="sample from the K most probable tokens")
    generate.add_argument("--top-p", type=float, help="sample from the fewest tokens of this joint probability")
    generate.add_argument("--seed", type=_seed, help="of the sampling (new each time)")
    generate.add_argument("--show-routing", action="store_true", help="colour tokens by their first-choice expert")
    generate.add_argument("--layer", type=int, help="whose routing to show (the middle one)")
    generate.add_argument("--mmap", action="store_true", help="leave the weights on disk: for models beyond memory")
    generate.add_argument("--backend", choices=_BACKENDS, default="reference", help="reference (NumPy) or cuda")
    generate.add_argument("--dtype", choices=_DTYPES, default="float32", help="to compute in; bfloat16 only on cuda")

    evaluate = add("eval", _eval, "measure a model's loss on text")
    analyze = add("analyze", _analyze, "show which expert gets which token: statistics, figures, an HTML explorer")
    analyze.add_argument("--out", metavar="DIR", help="folder to write to (analysis, in RUN)")
    analyze.add_argument("--tokens", type=int, default=50_000, help="the most to read of each text (50000)")
    for command in (evaluate, analyze):
        command.add_argument("model", metavar="RUN", help="run or model directory")
        command.add_argument("files", nargs="*", metavar="FILE", help="text files or folders (a run's held-out text)")
        command.add_argument("--seq-len", type=int, help="tokens in a window (as trained, or at most 1024)")
        command.add_argument("--mmap", action="store_true", help="leave the weights on disk: for models beyond memory")
        command.add_argument("--backend", choices=_BACKENDS, default="reference", help="reference (NumPy) or cuda")
        command.add_argument("--dtype", choices=_DTYPES, default="float32", help="to compute in; bfloat16 only on cuda")

    plan = add("plan", _plan, "count parameters, bytes and FLOPs, and say what fits where")
    plan.add_argument("config", metavar="CONFIG", help="preset, config.json or model directory")
    plan.add_argument("--batch", type=int, default=1, help="sequences decoded together (1)")
    plan.add_argument("--context", type=int, help="tokens in a sequence (the model's context length)")
    plan.add_argument("--dtype", default="bf16", help="of weights and cache: bf16, fp16 or fp32 (bf16)")
    plan.add_argument("--device", help="one device only: h200, h100, a100-80gb, a100-40gb or here (all)")
    plan.add_argument("--json", action="store_true", help="print JSON")

    bench = add("bench", _bench, "measure the model beside its peers, or the kernels beside their floors")
    bench.add_argument("what", choices=["model", "kernels"], help="what to measure")
    bench.add_argument("--size", nargs="+", help="sizes to measure: tiny, small, medium; of the kernels, toy … (all)")
    bench.add_argument("--only", nargs="+", metavar="COMPONENT", help="of the kernels: these components (all)")
    bench.add_argument("--rounds", type=_count, default=7, help="rounds of each measurement (7)")
    bench.add_argument("--out", metavar="FILE", help="also write the record as JSON")

    experiment = add("experiment", _experiment, "try a claim about mixtures of experts at a size that runs here")
    experiment.add_argument("name", help="balance, dense, throughput, passkey or instruct")
    experiment.add_argument("--seed", type=_seed, default=0, help="of weights, texts and batches (0)")
    experiment.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows only that it works")
    experiment.add_argument("--out", metavar="DIR", help="folder for its figure and its numbers (runs/experiments)")

    doctor = add("doctor", _doctor, "say what is here, what it enables, and what fixes each gap")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--kernels", action="store_true", help="compile every kernel for GPUs, show its registers")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 1024")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value
