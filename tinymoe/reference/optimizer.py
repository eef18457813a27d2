"""AdamW: Adam with decoupled weight decay, in chunks that stay in the cache."""

from collections.abc import Mapping

import numpy as np

from tinymoe.workers import run, usable_cores

Array = np.ndarray
CHUNK = 131072  # elements: few enough to stay in the cache, so many that threads seldom wait for the interpreter


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update p, m and v in place; all four are one-dimensional and equally long.

    m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;
    p ← p − η λ p − η · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε).

    Parameters
    ----------
    step
        t, counted from 1.
    learning_rate, betas, eps, weight_decay
        η, (β₁, β₂), ε, λ.

    Notes
    -----
    Loshchilov and Hutter 2017 (arXiv 1711.05101), algorithm 2: the decay does not pass through m and v.
    """
    beta1, beta2 = betas
    # √(v / (1 − β₂ᵗ)) + ε = (√v + ε √(1 − β₂ᵗ)) / √(1 − β₂ᵗ): the correction of v moves into two numbers
    correction = (1 - beta2**step) ** 0.5
    rate = learning_rate * correction / (1 - beta1**step)
    scratch = np.empty(min(CHUNK, len(p)), p.dtype)
    for start in range(0, len(p), CHUNK):
        chunk = slice(start, start + CHUNK)
        pc, gc, mc, vc = p[chunk], g[chunk], m[chunk], v[chunk]
        t = scratch[: len(pc)]
        np.subtract(gc, mc, out=t)
        t *= 1 - beta1
        mc += t
        np.multiply(gc, gc, out=t)
        t -= vc
        t *= 1 - beta2
        vc += t
        np.sqrt(vc, out=t)
        t += eps * correction
        np.divide(mc, t, out=t)
        t *= rate
        if weight_decay:
            pc *= 1 - learning_rate * weight_decay
        pc -= t


class AdamW:
    """AdamW over a dict of parameters, which it updates in place.

    Parameters
    ----------
    params
        Name → array; the arrays are kept and changed by `step`.
    learning_rate
        η; may be set anew before any step.
    betas, eps, weight_decay
        (β₁, β₂), ε, λ. Norm weights, the one-dimensional arrays, do not decay.
    workers
        Threads that share the work; every element is computed alike whatever their number.

    Attributes
    ----------
    m, v
        Name → array, the running means of g and g².
    steps
        How many steps were taken.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        workers: int | None = None,
    ):
        for name, p in params.items():
            if p.dtype not in (np.float32, np.float64):
                raise ValueError(f"{name} is {p.dtype}: tinymoe.cuda.AdamW updates it, with a float32 master copy")
            if not (p.flags.c_contiguous and p.flags.writeable):
                raise ValueError(f"{name} must be a contiguous, writeable array: it is updated in place")
        self.params = params
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.workers = workers or usable_cores()
        self.m = {name: np.zeros_like(p) for name, p in params.items()}
        self.v = {name: np.zeros_like(p) for name, p in params.items()}
        self.steps = 0

    def step(self, grads: Mapping[str, Array]) -> None:
        """Update every parameter by its gradient.

        Raises
        ------
        ValueError
            The names or shapes of ``grads`` are not those of the parameters.
        """
        if grads.keys() != self.params.keys():
            raise ValueError(f"grads and params differ in {sorted(grads.keys() ^ self.params.keys())}")
        for name, p in self.params.items():
            if grads[name].shape != p.shape:
                raise ValueError(f"the gradient of {name} has shape {grads[name].shape}, the parameter {p.shape}")
        self.steps += 1
        pieces = [(name, start) for name, p in self.params.items() for start in range(0, p.size, CHUNK)]
        workers = max(1, min(self.workers, sum(p.size for p in self.params.values()) // CHUNK))
        shares = [pieces[i::workers] for i in range(workers)]
        run(lambda share: self._update(share, grads), shares, workers=workers)

    def _update(self, pieces: list[tuple[str, int]], grads: Mapping[str, Array]) -> None:
        for name, start in pieces:
            chunk = slice(start, start + CHUNK)
            p = self.params[name]
            adamw(
                *(a.reshape(-1)[chunk] for a in (p, grads[name], self.m[name], self.v[name])),
                step=self.steps,
                learning_rate=self.learning_rate,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay if p.ndim > 1 else 0.0,
            )
