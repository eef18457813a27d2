"""Cross-entropy on the device; see `tinymoe.reference.loss`."""

from typing import Any, NamedTuple

import numpy as np

from tinymoe.cuda import device

THREADS = 256  # of every block
KERNELS = device.Kernels("loss.cu", "cross_entropy_rows<{T}>", "cross_entropy_mean", "cross_entropy_backward<{T}>")


class CrossEntropySaved(NamedTuple):
    """What the backward of `cross_entropy` needs; largest + log(total) is the log-sum-exp of a row."""

    logits: Any  # (N, V)
    largest: Any  # (N,) float32
    total: Any  # (N,) float32 Σ_v exp(logits − largest)
    targets: Any  # (N,) int32
    counted: Any  # (1,) int32


def cross_entropy(logits: Any, targets: Any) -> tuple[Any, CrossEntropySaved]:
    """Return the mean over counted rows of log Σ_v exp(logits[n, v]) − logits[n, targets[n]]: (N, V), (N,) → (1,).

    The loss is a float32 array of the device, where the reference returns a number: reading it is the caller's, since
    it waits for the GPU. Targets are int32, in [0, V) or −100: on the device nobody checks.
    """
    (N, V), T = logits.shape, device.ctype(logits)
    largest, total, losses = (device.empty(N, np.float32) for _ in range(3))
    KERNELS.launch(f"cross_entropy_rows<{T}>", N, THREADS, logits, targets, largest, total, losses, V)
    loss, counted = device.empty(1, np.float32), device.empty(1, np.int32)
    KERNELS.launch("cross_entropy_mean", 1, THREADS, losses, targets, loss, counted, N)
    return loss, CrossEntropySaved(logits, largest, total, targets, counted)


def cross_entropy_backward(dloss: float, saved: CrossEntropySaved) -> Any:
    """Return dlogits (N, V) = (softmax(logits) − one_hot(target)) · dloss / count; zero where the row is ignored."""
    logits, largest, total, targets, counted = saved
    (N, V), T = logits.shape, device.ctype(logits)
    dlogits = device.empty((N, V), logits.dtype)
    KERNELS.launch(
        *(f"cross_entropy_backward<{T}>", N, THREADS),
        *(logits, largest, total, targets, counted, dlogits, dloss, V),
    )
    return dlogits
