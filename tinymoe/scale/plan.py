"""The plan of a model: what it takes at a batch, a context and a dtype, where that fits, and how fast it can decode."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tinymoe.config import MixtralConfig
from tinymoe.errors import InputError
from tinymoe.scale import footprint
from tinymoe.scale.devices import DEVICES, HERE, Device, find_device


@dataclass(frozen=True)
class Placement:
    """A model on one kind of device.

    Parameters
    ----------
    device
        Its name and what bounds it.
    fits
        One device holds the weights and the KV cache; activations are not counted here or below.
    free_bytes
        What they leave of its memory; negative if they do not fit.
    devices_needed
        How many hold them, evenly divided.
    largest_batch
        How many sequences of this context fit beside the weights in one device; 0: none.
    bandwidth_bound, compute_bound
        Tokens per second, all sequences together, if all devices needed only read, or only multiplied.
    tokens_per_second
        The smaller one: a ceiling, since no time goes into what the devices tell each other.
    bound_by
        Which one it is, ``"bandwidth"`` or ``"compute"``.
    """

    device: Device
    fits: bool
    free_bytes: int
    devices_needed: int
    largest_batch: int
    bandwidth_bound: float
    compute_bound: float
    tokens_per_second: float
    bound_by: str


@dataclass(frozen=True)
class Plan:
    """What a model takes and where it fits; a figure is the function of its name in ``tinymoe.scale.footprint``."""

    config: MixtralConfig
    batch: int
    context: int
    dtype: str
    parameters: footprint.Parameters
    weight_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    decode_flops: int
    prefill_flops: float
    training_flops: float
    experts_touched: float
    decode_bytes: float
    decode_intensity: float
    placements: list[Placement]


def place(config: MixtralConfig, batch: int, context: int, dtype: str, device: Device) -> Placement:
    """Return where a model stands on a device.

    With n the devices needed, decoding yields at most n · bandwidth · B / (bytes a step reads) tokens per second, and
    at most n · FLOP/s / (FLOP of a token).
    """
    weights = footprint.weight_bytes(config, dtype)
    sequence = footprint.kv_cache_bytes(config, 1, context, dtype)
    needed = -(-(weights + batch * sequence) // device.memory_bytes)
    bounds = {
        "bandwidth": needed * device.bandwidth * batch / footprint.decode_bytes(config, batch, context, dtype),
        "compute": needed * device.flops_at(dtype) / footprint.decode_flops(config, context),
    }
    bound_by = min(bounds, key=bounds.__getitem__)
    return Placement(
        device=device,
        fits=needed == 1,
        free_bytes=device.memory_bytes - weights - batch * sequence,
        devices_needed=needed,
        largest_batch=max(0, (device.memory_bytes - weights) // sequence),
        bandwidth_bound=bounds["bandwidth"],
        compute_bound=bounds["compute"],
        tokens_per_second=bounds[bound_by],
        bound_by=bound_by,
    )


def make_plan(
    config: MixtralConfig,
    *,
    batch: int = 1,
    context: int | None = None,
    dtype: str = "bf16",
    devices: Iterable[Device] = DEVICES.values(),
) -> Plan:
    """Return the plan of a model, by default for one sequence as long as it takes.

    Raises
    ------
    InputError
        Batch or context is out of range, or the dtype is none of ``footprint.DTYPES``.
    """
    context = config.context_len if context is None else context
    if not 1 <= batch < 2**31:
        raise InputError(f"batch is {batch}; give at least 1 and less than 2³¹")
    if not 1 <= context <= config.context_len:
        raise InputError(f"context is {context}; this model takes 1 to {config.context_len} tokens")
    if dtype not in footprint.DTYPES:
        raise InputError(f"dtype is {dtype!r}; give one of {', '.join(footprint.DTYPES)}")
    return Plan(
        config=config,
        batch=batch,
        context=context,
        dtype=dtype,
        parameters=footprint.count_parts(config),
        weight_bytes=footprint.weight_bytes(config, dtype),
        kv_bytes_per_token=footprint.kv_bytes_per_token(config, dtype),
        kv_cache_bytes=footprint.kv_cache_bytes(config, batch, context, dtype),
        decode_flops=footprint.decode_flops(config, context),
        prefill_flops=footprint.prefill_flops(config, context),
        training_flops=footprint.training_flops(config, context),
        experts_touched=footprint.experts_touched(config, batch),
        decode_bytes=footprint.decode_bytes(config, batch, context, dtype),
        decode_intensity=footprint.decode_intensity(config, batch, context, dtype),
        placements=[place(config, batch, context, dtype, device) for device in devices],
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as nested dicts and lists of plain values, for JSON."""
    return dataclasses.asdict(plan)


def command(
    config: MixtralConfig, *, batch: int, context: int | None, dtype: str, device: str | None, as_json: bool
) -> None:
    """Print the plan on one device, or for None on every one that is known and on this machine.

    Raises
    ------
    InputError
        As ``make_plan``, or the device is unknown.
    """
    names = [*DEVICES, HERE] if device is None else [device]
    # A generator: bad values are refused before this machine is measured.
    devices = (find_device(name) for name in names)
    plan = make_plan(config, batch=batch, context=context, dtype=dtype, devices=devices)
    if as_json:
        print(json.dumps(as_dict(plan), indent=2))
    else:
        from rich.console import Console

        from tinymoe.scale.tables import render

        Console().print(render(plan))
