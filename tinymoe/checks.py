"""What a model takes: backends and their dtypes, parameters, tokens and targets; all else is refused by name."""

from collections.abc import Mapping

import numpy as np

from tinymoe.config import MixtralConfig
from tinymoe.errors import InputError
from tinymoe.reference.loss import IGNORED

Array = np.ndarray
Params = Mapping[str, Array]
DTYPES = {  # of each backend
    "reference": ("float32", "float64"),
    "cuda": ("float32", "bfloat16"),
}


def check_backend(backend: str) -> None:
    """Raise InputError unless there is such a backend."""
    if backend not in DTYPES:
        raise InputError(f"no backend {backend!r}; there is {', '.join(DTYPES)}")


def checked_dtype(dtype: str, backend: str) -> np.dtype:
    """Return a name as a dtype, or raise InputError unless the backend computes in it."""
    name = getattr(dtype, "__name__", str(dtype))  # np.float32 is "float32", too
    if name not in DTYPES[backend]:
        raise InputError(f"dtype {name!r} is not one to compute in on {backend}; give {' or '.join(DTYPES[backend])}")
    return _dtype(name)


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def check_params(config: MixtralConfig, params: Params, backend: str = "reference") -> None:
    """Raise InputError unless the parameters are exactly those of the config, in one dtype that the backend takes."""
    names = set()
    for name, shape in config.parameter_shapes():
        if name not in params:
            raise InputError(f"parameter {name} is missing")
        if (found := shape_of(params, name)) != shape:
            raise InputError(f"parameter {name} has shape {found}; the config asks for {shape}")
        names.add(name)
    if isinstance(params, dict):
        dtype, dtypes = params["norm"].dtype, DTYPES[backend]
        for name, p in params.items():
            if p.dtype.name not in dtypes or p.dtype != dtype:
                raise InputError(f"parameter {name} has dtype {p.dtype}; all must be {' or all '.join(dtypes)}")
    if extra := sorted(params.keys() - names):
        raise InputError(f"parameter {extra[0]} does not belong to this config")


def shape_of(params: Params, name: str) -> tuple[int, ...]:
    """Return a parameter's shape without reading it from disk."""
    shapes = getattr(params, "shapes", None)
    return shapes[name] if shapes is not None else params[name].shape


def check_tokens(tokens: Array, vocab_size: int) -> None:
    """Raise InputError if a token lies outside the vocabulary."""
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InputError(f"token {wrong} is outside the vocabulary of {vocab_size}")


def checked_tokens(tokens: Array, vocab_size: int) -> Array:
    """Return tokens (B, T) as an array, or raise InputError unless they are integers of the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise InputError(f"tokens must be integers of shape (B, T); got {tokens.dtype} of shape {tokens.shape}")
    check_tokens(tokens, vocab_size)
    return tokens


def checked_pair(tokens: Array, targets: Array, vocab_size: int) -> tuple[Array, Array]:
    """Return tokens and targets (B, T), the targets as int64; raise InputError unless both fit and a target counts."""
    tokens, targets = checked_tokens(tokens, vocab_size), np.asarray(targets)
    if targets.shape != tokens.shape or targets.dtype.kind not in "iu":
        raise InputError(
            f"targets must be integers of the tokens' shape {tokens.shape}; got {targets.dtype} of {targets.shape}"
        )
    targets = targets.astype(np.int64, copy=False)
    counted = targets[targets != IGNORED]
    if counted.size == 0:
        raise InputError(f"every target is {IGNORED}, ignored: there is nothing to learn from")
    check_tokens(counted, vocab_size)
    return tokens, targets
