"""A kernel's parameters, read from its source: what a launch checks and converts, on every device alike."""

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

TILE_MAP = np.dtype("V128")  # of hopper.h's TileMap, which is passed by value
DTYPES = {
    "float": np.dtype("float32"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int": np.dtype("int32"),
    "unsigned": np.dtype("uint32"),
    "int64_t": np.dtype("int64"),
    "TileMap": TILE_MAP,
}


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    name: str
    dtype: np.dtype
    is_array: bool
    is_const: bool  # an array that the kernel only reads


def signature(source: str, expression: str) -> list[Parameter]:
    """Return the parameters of a kernel's instantiation.

    Parameters
    ----------
    source
        CUDA C++ that defines the kernel as ``__global__ void name(...)``, possibly below a ``template <...>``.
    expression
        ``name`` or ``name<argument, ...>``.

    Raises
    ------
    ValueError
        There is no such kernel, or a parameter's type is none of `DTYPES`.
    """
    name, _, given = expression.partition("<")
    bounds = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"  # it may stand on either side of void
    found = re.search(
        rf"(?:template\s*<([^>]*)>\s*)?__global__\s+{bounds}void\s+{bounds}{re.escape(name)}\s*\(([^)]*)\)",
        re.sub(r"//.*|/\*(?s:.*?)\*/", "", source),
    )
    if not found:
        raise ValueError(f"there is no kernel {name}")
    names = [declared.partition("=")[0].split()[-1] for declared in (found[1] or "").split(",") if declared.strip()]
    # Commas inside brackets belong to one argument.
    arguments = re.findall(r"(?:[^,<>()]|<[^<>]*>|\([^()]*\))+", given.removesuffix(">"))
    types = dict(zip(names, (argument.strip() for argument in arguments)))
    return [_parameter(text, types) for text in found[2].split(",") if text.strip()]


def _parameter(text: str, types: dict[str, str]) -> Parameter:
    found = re.fullmatch(r"\s*(const\s+)?(?:__grid_constant__\s+)?(\w+)\s*(\*)?\s*(?:__restrict__\s*)?(\w+)\s*", text)
    if not found or types.get(found[2], found[2]) not in DTYPES:
        raise ValueError(
            f"the parameter {text.strip()!r} is none that a launch can fill; types are {', '.join(DTYPES)}"
        )
    return Parameter(found[4], DTYPES[types.get(found[2], found[2])], bool(found[3]), bool(found[1]))
