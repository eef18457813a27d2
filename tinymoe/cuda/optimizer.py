"""AdamW on the device; see `tinymoe.reference.optimizer`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymoe.cuda import device

THREADS, BLOCKS = 256, 4096  # of a block; of the grid at most: more elements are more rounds of its threads
KERNELS = device.Kernels("optimizer.cu", "adamw_update<{T}>")


def adamw(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update p, m and v in place: float32, all of one size; g may be bfloat16."""
    _update(p, g, m, v, None, step, learning_rate, betas, eps, weight_decay)


def _update(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    rounded: Any,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update p, m and v, and write p to ``rounded``, a bfloat16 array or None."""
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    rate = learning_rate * correction / (1 - beta1**step)
    KERNELS.launch(
        *(f"adamw_update<{device.ctype(g)}>", min(-(-p.size // THREADS), BLOCKS), THREADS),
        *(p, g, m, v, rounded, p.size),
        *(1 - beta1, 1 - beta2, rate, eps * correction, 1 - learning_rate * weight_decay),
    )


class AdamW:
    """AdamW over a dict of parameters, float32 or bfloat16, which it updates in place.

    Parameters
    ----------
    params
        Name → array of the device; the arrays are kept and changed by `step`.
    learning_rate
        η; may be set anew before any step.
    betas, eps, weight_decay
        (β₁, β₂), ε, λ. Norm weights, the one-dimensional arrays, do not decay.
    workers
        Nothing: the reference's threads.

    Attributes
    ----------
    m, v
        Name → float32 array, the running means of g and g².
    master
        Name → float32 array, of the bfloat16 parameters only: what is updated, and the parameter is its rounding. Who
        sets such a parameter otherwise sets this, too.
    steps
        How many steps were taken.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        workers: int | None = None,
    ):
        for name, p in params.items():
            device.ctype(p)  # refuses any but float32 and bfloat16
            if not (p.flags.c_contiguous and getattr(p.flags, "writeable", True)):  # CuPy's always are
                raise ValueError(f"{name} must be a contiguous, writeable array: it is updated in place")
        self.params = params
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.master = {name: device.array(p, np.float32) for name, p in params.items() if p.dtype == device.BFLOAT16}
        self.m = {name: device.zeros(p.shape, np.float32) for name, p in params.items()}
        self.v = {name: device.zeros(p.shape, np.float32) for name, p in params.items()}
        self.steps = 0

    def step(self, grads: Mapping[str, Any]) -> None:
        """Update every parameter by its gradient, float32 or bfloat16.

        Raises
        ------
        ValueError
            The names or shapes of ``grads`` are not those of the parameters.
        tinymoe.errors.InputError
            A gradient is neither float32 nor bfloat16.
        """
        if grads.keys() != self.params.keys():
            raise ValueError(f"grads and params differ in {sorted(grads.keys() ^ self.params.keys())}")
        for name, p in self.params.items():
            if grads[name].shape != p.shape:
                raise ValueError(f"the gradient of {name} has shape {grads[name].shape}, the parameter {p.shape}")
            device.ctype(grads[name])
        self.steps += 1
        for name, p in self.params.items():
            decay = self.weight_decay if p.ndim > 1 else 0.0
            updated, rounded = (self.master[name], p) if name in self.master else (p, None)
            _update(
                *(updated, device.array(grads[name]), self.m[name], self.v[name], rounded),
                *(self.steps, self.learning_rate, self.betas, self.eps, decay),
            )
