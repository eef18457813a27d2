"""Softmax, shared by the router, the balance losses and attention's decode form."""

import numpy as np

Array = np.ndarray


def softmax(logits: Array) -> Array:
    """Return exp(logits) / Σ exp(logits) over the last axis, shifted by the maximum so that exp cannot overflow."""
    probs = logits - logits.max(axis=-1, keepdims=True)
    np.exp(probs, out=probs)
    probs /= probs.sum(axis=-1, keepdims=True)
    return probs
