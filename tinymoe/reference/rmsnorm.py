"""RMSNorm: scale each row to a root mean square of one, then by a learned weight."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class RMSNormSaved(NamedTuple):
    """What the backward of `rmsnorm` needs."""

    x_hat: Array  # (N, D) x / rms(x)
    inverse_rms: Array  # (N, 1)
    weight: Array  # (D,)


def rmsnorm(x: Array, weight: Array, eps: float) -> tuple[Array, RMSNormSaved]:
    """Compute y = x / √(mean(x²) + eps) · weight, row by row.

    Parameters
    ----------
    x
        (N, D).
    weight
        (D,).
    eps
        Added to the mean square.

    Returns
    -------
    y
        (N, D).
    saved
        For `rmsnorm_backward`.

    Notes
    -----
    Zhang and Sennrich 2019 (arXiv 1910.07467); there is no mean to subtract and no bias.
    """
    inverse_rms = 1 / np.sqrt(np.vecdot(x, x)[:, None] / x.shape[1] + eps)  # (N, 1)
    x_hat = x * inverse_rms
    return x_hat * weight, RMSNormSaved(x_hat, inverse_rms, weight)


def rmsnorm_backward(dy: Array, saved: RMSNormSaved) -> tuple[Array, Array]:
    """Return dx (N, D) and dweight (D,).

    With x̂ = x / rms and g = dy · weight:  dx = (g − x̂ · mean(g · x̂)) / rms,  dweight = Σ_n dy · x̂.
    The subtracted term is the part of g along x̂: the norm does not see the length of x.
    """
    x_hat, inverse_rms, weight = saved
    dweight = (dy * x_hat).sum(axis=0)
    dx = dy * weight  # (N, D) the gradient of x̂, turned into that of x in place
    dx -= x_hat * (np.vecdot(dx, x_hat)[:, None] / x_hat.shape[1])
    dx *= inverse_rms
    return dx, dweight
