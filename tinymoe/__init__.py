"""tinymoe: Mixtral of Experts (arXiv 2401.04088), each component by hand, forward and backward."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tinymoe.config import MixtralConfig as MixtralConfig
    from tinymoe.errors import InputError as InputError
    from tinymoe.generation import generate as generate
    from tinymoe.model import Mixtral as Mixtral
    from tinymoe.optimizer import AdamW as AdamW
    from tinymoe.reference.balance import hf_load_balancing_loss as hf_load_balancing_loss

# Public name -> the module that defines it, imported on first use (PEP 562) so that `import tinymoe` stays fast.
_HOME = {
    "MixtralConfig": "tinymoe.config",
    "InputError": "tinymoe.errors",
    "Mixtral": "tinymoe.model",
    "AdamW": "tinymoe.optimizer",
    "generate": "tinymoe.generation",
    "hf_load_balancing_loss": "tinymoe.reference.balance",
}
_ROOMS = {"reference", "checkpoint", "data", "examples", "tokenizer", "training", "instruct", "generation"}
_ROOMS |= {"cache", "config", "corpora"}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"tinymoe.{name}")
    raise AttributeError(f"module 'tinymoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_ROOMS])
