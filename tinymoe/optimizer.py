"""AdamW for a model's parameters, by the backend that they need."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymoe import cuda, reference


def AdamW(
    params: Mapping[str, Any],
    learning_rate: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    workers: int | None = None,
) -> "reference.AdamW | cuda.AdamW":
    """Return an optimizer over a dict of parameters, which its ``step(grads)`` updates in place.

    Parameters that are bfloat16, or lie on a GPU, get that of `tinymoe.cuda`, which keeps a float32 master of each
    bfloat16 one; NumPy's float32 and float64 that of `tinymoe.reference`, also where the emulator computes with them.

    Parameters
    ----------
    params
        Name → array, as in `Mixtral.params`.
    learning_rate, betas, eps, weight_decay
        η, (β₁, β₂), ε, λ; see `tinymoe.reference.AdamW`.
    workers
        Threads that share the work of the reference; None: one per usable core.

    Raises
    ------
    ValueError, InputError
        A parameter cannot be updated in place, or is of a dtype that the backend has not.
    """
    on_device = any(p.dtype.name == "bfloat16" or hasattr(p, "__cuda_array_interface__") for p in params.values())
    backend = importlib.import_module("tinymoe.cuda" if on_device else "tinymoe.reference")
    return backend.AdamW(params, learning_rate, betas, eps, weight_decay, workers)
