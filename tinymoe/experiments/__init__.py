"""Experiments: what the paper and its sources claim, tried at a size that runs here, one command each.

An experiment is a module of its name with ``run(seed, quick)``, which returns its numbers as plain JSON, and
``plot(numbers)``, which returns a matplotlib Figure of them; quick mode takes seconds and shows only that it works.
"""

import importlib
import time
from pathlib import Path

from tinymoe.atomic import replacing, write_json
from tinymoe.bench.timing import machine
from tinymoe.errors import InputError

NAMES = ("balance", "dense", "throughput", "passkey", "instruct")


def command(name: str, seed: int = 0, quick: bool = False, out: str | None = None) -> None:
    """Run an experiment; write NAME.json with its numbers, versions and machine, and NAME.png, its figure.

    Parameters
    ----------
    name
        Of `NAMES`.
    seed
        Of all its weights, texts and batches.
    quick
        Seconds instead of minutes, with numbers that mean nothing.
    out
        Folder to write to; runs/experiments by default.

    Raises
    ------
    InputError
        There is no such experiment, or the folder cannot be written.
    """
    if name not in NAMES:
        raise InputError(f"no experiment {name!r}; there is {', '.join(NAMES)}")
    folder = Path(out or Path("runs") / "experiments")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    experiment = importlib.import_module(f"tinymoe.experiments.{name}")
    start = time.perf_counter()
    numbers = experiment.run(seed=seed, quick=quick)
    record = {
        "experiment": name,
        "command": f"tinymoe experiment {name} --seed {seed}" + " --quick" * quick,
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "numbers": numbers,
    }
    write_json(folder / f"{name}.json", record)
    with replacing(folder / f"{name}.png") as partial:
        experiment.plot(numbers).savefig(partial, format="png", dpi=110)
    print(f"{folder / name}.json has the numbers, {name}.png the figure")
