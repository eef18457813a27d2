"""`tinymoe bench kernels`: every component and every rung beside its floor, the least time that the device allows.

A floor is the larger of a pass's FLOPs over the rate of a large matrix product and its bytes over the rate of a large
copy, both measured in the same run. A round runs each set of random inputs once, after an array larger than any cache
was read, so that all inputs come from memory.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinymoe.atomic import replacing
from tinymoe.bench.components import COMPONENTS, SIZES, Component, Draw, Passes
from tinymoe.bench.timing import machine
from tinymoe.cuda import device
from tinymoe.cuda.linear import matmul
from tinymoe.errors import InputError

SETS = 3  # of random inputs
LONGEST = 10.0  # seconds after which a measurement begins no further round
AHEAD = 8  # readings of as many bytes, milliseconds in which the host queues what a round launches
COPIED, SQUARE = 2**30, 8192  # bytes, and width of the matrices, that find the ceilings
COPIED_EMULATED, SQUARE_EMULATED = 2**25, 512
HEADER = f"{'microseconds:':<47}{'median':>11} {'spread':>8}{'floor':>11}{'of floor':>10}{'TFLOP/s':>10}{'GB/s':>10}"
GPU = "the ceilings' products are cuBLAS's, in float32 in CuPy's default mode, without TF32"
EMULATED = "emulated: the kernels and the ceilings are this CPU's, and no figure says anything of a GPU"
CLOSE = {"float32": 1e-4, "bfloat16": 1e-2}  # largest difference over largest value: other orders of sums, and rounding


def command(sizes: list[str] | None, only: list[str] | None, rounds: int, out: str | None) -> None:
    """Measure, print each figure beside its floor, and write the record if asked.

    Parameters
    ----------
    sizes
        Of `SIZES`; None: all but the toy on a GPU, the toy alone under the emulator.
    only
        Of `COMPONENTS`, by the whole name or one of its words; None: all.
    rounds
        Of each measurement.
    out
        Path of the JSON record.

    Raises
    ------
    InputError
        There is no such size or component, the size needs a GPU, or the record cannot be written.
    FloatingPointError
        A rung's results are not those of the naive one.
    """
    where = device.current()
    sizes = sizes or [size for size in SIZES if (size == "toy") == (where != "gpu")]
    chosen = _chosen(sizes, only, where)
    if out and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise InputError(f"the record cannot be written to {out}: give a file in a folder that is there")
    ceilings, ahead = find_ceilings(rounds)
    cases: list[dict[str, Any]] = []
    record = {
        "machine": machine(),
        "device": where,
        "note": GPU if where == "gpu" else EMULATED,
        "rounds": rounds,
        "ceilings": ceilings,
        "sizes": {size: SIZES[size]._asdict() for size in sizes},
        "cases": cases,
    }
    print(describe(record))
    for size in sizes:
        print(f"\n{size}: {', '.join(f'{letter} {n}' for letter, n in SIZES[size]._asdict().items())}")
        print(HEADER)
        for name, component in chosen.items():
            for dtype in component.dtypes:
                for case in measure(name, component, size, dtype, rounds, ceilings, ahead):
                    print(line(case), flush=True)
                    cases.append(case)
    if any(case.get("waited") for case in cases):
        print("\n* the device waited for the host's launches, which are in the time")
    if out:
        with replacing(Path(out)) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")


def find_ceilings(rounds: int) -> tuple[dict[str, float], Callable[[], None]]:
    """Measure what the device gives at most.

    Returns
    -------
    ceilings
        ``bytes``, read and written per second by a large copy, and FLOPs per second of a large product, by dtype. On a
        GPU the product is cuBLAS's; in float32 in CuPy's default mode, without TF32.
    ahead
        What goes ahead of a measurement: it reads what was copied, and leaves the caches nothing to write back.
    """
    here = device.current() == "gpu"
    copied, square = (COPIED, SQUARE) if here else (COPIED_EMULATED, SQUARE_EMULATED)
    source, target = (Draw("float32", 0)(copied // 4) for _ in range(2))

    def copy() -> None:
        target[...] = source

    def ahead() -> None:
        for _ in range(AHEAD):
            source.sum()

    def product(dtype: str) -> Callable[[], Any]:
        draw = Draw(dtype, 0)
        a, b = draw(square, square), draw(square, square)
        return lambda: matmul(a, b)

    ceilings = {"bytes": 2 * copied / statistics.median(_times([copy], rounds, ahead)[0])}
    for dtype in CLOSE:
        ceilings[dtype] = 2 * square**3 / statistics.median(_times([product(dtype)], rounds, ahead)[0])
    return ceilings, ahead


def measure(
    name: str,
    component: Component,
    size: str,
    dtype: str,
    rounds: int,
    ceilings: dict[str, float],
    ahead: Callable[[], None],
) -> list[dict[str, Any]]:
    """Return a case for each pass of a component, or a single one that says why it was skipped.

    Raises
    ------
    FloatingPointError
        The results are not those of the component that it should equal.
    """
    shape, case = SIZES[size], {"component": name, "size": size, "dtype": dtype}
    reason = component.cannot(shape, dtype)
    if reason:
        return [case | {"skipped": reason}]
    cases: list[dict[str, Any]] = []
    try:
        sets = [component.make(shape, Draw(dtype, seed)) for seed in range(SETS)]
        if component.equals:
            _compare(case, sets[0], COMPONENTS[component.equals].make(shape, Draw(dtype, 0)))
        work = component.work(shape, device.BFLOAT16.itemsize if dtype == "bfloat16" else 4)
        for each, (flops, moved) in zip(sets[0], work, strict=True):
            times, waited = _times([passes[each] for passes in sets], rounds, ahead)
            floor = max(flops / ceilings.get(dtype, ceilings["float32"]), moved / ceilings["bytes"])
            figures = {"flops": flops, "bytes": moved, "floor": floor, "median": statistics.median(times)}
            cases.append(case | {"pass": each} | figures | {"times": times, "waited": waited})
    except MemoryError:
        cases.append(case | {"skipped": "the device has not enough memory"})
    except InputError as refusal:  # of a launcher
        cases.append(case | {"skipped": str(refusal)})
    sets = []
    device.free()
    return cases


def line(case: dict[str, Any]) -> str:
    """Return a case as a line of the table."""
    what = f"  {case['component']:<27}{case.get('pass', ''):<9}{case['dtype']:<9}"
    if "skipped" in case:
        return f"{what}skipped: {case['skipped']}"
    median, floor, times = case["median"], case["floor"], case["times"]
    return (
        f"{what}{1e6 * median:>11.1f}{'*' if case['waited'] else ' '}{(max(times) - min(times)) / median:>8.0%}"
        f"{1e6 * floor:>11.3g}{floor / median:>10.2%}"
        f"{case['flops'] / median / 1e12:>10.3g}{case['bytes'] / median / 1e9:>10.3g}"
    )


def describe(record: dict[str, Any]) -> str:
    """Return what stands above the table: where it was measured, and the ceilings."""
    where, ceilings = record["machine"], record["ceilings"]
    if record["device"] == "gpu":
        place = f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, CuPy {where['cupy']}"
    else:
        place = f"{record['device']} on {where['cpu']}, {where['cores']} cores, NumPy {where['numpy']}"
    return (
        f"{place}; {where['date']}\n{record['note']}\n"
        f"ceilings: copy {ceilings['bytes'] / 1e9:.4g} GB/s; products of large matrices in bfloat16 "
        f"{ceilings['bfloat16'] / 1e12:.3g} TFLOP/s, in float32 {ceilings['float32'] / 1e12:.3g} TFLOP/s"
    )


def _chosen(sizes: list[str], only: list[str] | None, where: str) -> dict[str, Component]:
    """Return the components to measure, after refusing what there is not or cannot be."""
    for size in sizes:
        if size not in SIZES:
            raise InputError(f"no size {size!r}; there is {', '.join(SIZES)}")
        if size != "toy" and where != "gpu":
            raise InputError(f"size {size} needs a GPU: {where} on this CPU the kernels take hours for it; give toy")
    names = {name: {name, *name.split()} for name in COMPONENTS}
    for name in only or []:
        if not any(name in known for known in names.values()):
            raise InputError(f"no component {name!r}; there is {', '.join(COMPONENTS)}")
    return {name: COMPONENTS[name] for name, known in names.items() if only is None or known & {*only}}


def _times(runs: list[Callable[[], Any]], rounds: int, ahead: Callable[[], None]) -> tuple[list[float], bool]:
    """Return the seconds of a run in each round, and whether the device may have waited for the host in one."""

    def each() -> None:
        for run in runs:
            run()

    each()  # compiles, and fills CuPy's pool of memory
    times: list[float] = []
    late, began = False, time.perf_counter()
    while len(times) < rounds and (not times or time.perf_counter() - began < LONGEST):
        seconds, waited = device.seconds(each, ahead)
        times.append(seconds / len(runs))
        late |= waited
    return times, late


def _compare(case: dict[str, Any], passes: Passes, expected: Passes) -> None:
    for name, run in passes.items():
        found, wanted = (array.astype(np.float32) for array in (run(), expected[name]()))
        error = float(abs(found - wanted).max()) / float(abs(wanted).max())
        if not error <= CLOSE[case["dtype"]]:
            raise FloatingPointError(
                f"{case['component']}, {name} of {case['size']} in {case['dtype']}, is wrong: its largest error is "
                f"{error:.1e} of the largest value of {COMPONENTS[case['component']].equals}"
            )
