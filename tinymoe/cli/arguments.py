"""The arguments of the `tinymoe` command; nothing else is imported here, so that --help is fast."""

import argparse
from typing import Any, NoReturn

from tinymoe import __version__
from tinymoe.errors import InputError

_BACKENDS = ("reference", "cuda")
_DTYPES = ("float32", "bfloat16")
OPTIONS = {  # of training.Options: help, in the order shown; the defaults stand there
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
BALANCING = {  # of MixtralConfig: help; the defaults are the config's
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


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; it leaves the name of the command that was given in ``command``."""
    parser = _Parser(prog="tinymoe", description="Mixtral of Experts from scratch: train, write, evaluate, plan.")
    parser.add_argument("--version", action="version", version=f"tinymoe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")

    train = add("train", "train a model on the standard library or on your text")
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
    for name, (kind, text) in (OPTIONS | BALANCING).items():
        how: dict[str, Any] = dict(action="store_true", default=None) if kind is bool else dict(type=kind)
        train.add_argument(f"--{name.replace('_', '-')}", help=text, **how)

    generate = add("generate", "let a model write on from a prompt")
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

    evaluate = add("eval", "measure a model's loss on text")
    analyze = add("analyze", "show which expert gets which token: statistics, figures, an HTML explorer")
    analyze.add_argument("--out", metavar="DIR", help="folder to write to (analysis, in RUN)")
    analyze.add_argument("--tokens", type=int, default=50_000, help="the most to read of each text (50000)")
    for command in (evaluate, analyze):
        command.add_argument("model", metavar="RUN", help="run or model directory")
        command.add_argument("files", nargs="*", metavar="FILE", help="text files or folders (a run's held-out text)")
        command.add_argument("--seq-len", type=int, help="tokens in a window (as trained, or at most 1024)")
        command.add_argument("--mmap", action="store_true", help="leave the weights on disk: for models beyond memory")
        command.add_argument("--backend", choices=_BACKENDS, default="reference", help="reference (NumPy) or cuda")
        command.add_argument("--dtype", choices=_DTYPES, default="float32", help="to compute in; bfloat16 only on cuda")

    plan = add("plan", "count parameters, bytes and FLOPs, and say what fits where")
    plan.add_argument("config", metavar="CONFIG", help="preset, config.json or model directory")
    plan.add_argument("--batch", type=int, default=1, help="sequences decoded together (1)")
    plan.add_argument("--context", type=int, help="tokens in a sequence (the model's context length)")
    plan.add_argument("--dtype", default="bf16", help="of weights and cache: bf16, fp16 or fp32 (bf16)")
    plan.add_argument("--device", help="one device only: h200, h100, a100-80gb, a100-40gb or here (all)")
    plan.add_argument("--json", action="store_true", help="print JSON")

    bench = add("bench", "measure the model or its expert block beside peers, or the kernels beside their floors")
    bench.add_argument("what", choices=["model", "kernels", "moe"], help="what to measure")
    bench.add_argument("--size", nargs="+", help="sizes to measure: tiny, small, medium; of the kernels, toy … (all)")
    bench.add_argument("--tokens", nargs="+", type=_count, help="of moe: tokens in a batch (1 to 16384)")
    bench.add_argument("--only", nargs="+", metavar="COMPONENT", help="of the kernels: these components (all)")
    bench.add_argument("--rounds", type=_count, default=7, help="rounds of each measurement (7)")
    bench.add_argument("--out", metavar="FILE", help="also write the record as JSON")

    experiment = add("experiment", "try a claim about mixtures of experts at a size that runs here")
    experiment.add_argument("name", help="balance, dense, throughput, passkey or instruct")
    experiment.add_argument("--seed", type=_seed, default=0, help="of weights, texts and batches (0)")
    experiment.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows only that it works")
    experiment.add_argument("--out", metavar="DIR", help="folder for its figure and its numbers (runs/experiments)")

    doctor = add("doctor", "say what is here, what it enables, and what fixes each gap")
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


def check_dtype(dtype: str, backend: str) -> None:
    """Raise InputError unless the backend computes in the dtype."""
    if dtype == "bfloat16" and backend != "cuda":
        raise InputError(f"--dtype bfloat16 needs --backend cuda: the {backend} backend computes in float32")
