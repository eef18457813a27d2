"""What the expert block is to reach on a GPU, and what a record of `tinymoe bench moe` says of it.

Every figure is a ratio of measurements of the same run, and each goal a least value of one. Times are compared round by
round, since contestants take turns.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinymoe.bench.timing import ratio

OURS, CEILING, CUBLAS = "tinymoe", "dense", "loop of products"
FORWARD, GRAPH, BOTH = "forward", "graph", "both"
OF_DENSE = ((FORWARD, 16384, 0.92), (FORWARD, 4096, 0.88), (BOTH, 16384, 0.85), (BOTH, 4096, 0.85))
OF_READING = ((1, 0.85), (16, 0.85), (256, 0.80))  # of tokens so few that weights are what takes the time
OF_UNIFORM, MANY = 0.95, 4096  # of tokens so many that FLOPs are
WAITED = "*"  # beside a peer whose time has the host's in it, since the device may have waited for it
NO_GPU = "Emulated on a CPU: these figures say nothing of a GPU, and no goal is judged by them."


class Goal(NamedTuple):
    """A ratio that is to be large enough.

    Parameters
    ----------
    name
        Of what to what.
    least
        That meets the goal.
    found
        In the record; where the goal is for several cases, the least of theirs. None: not measured.
    case
        Where the goal is for several: which of them that is.
    met
        None: not measured, or not on a GPU.
    """

    name: str
    least: float
    found: float | None
    case: str
    met: bool | None


def comparisons(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, of each number of tokens, routing and pass, our block beside everything that it is to be compared with.

    Returns
    -------
    comparisons
        Each with ``tokens``, ``routing``, ``pass``, and where it was measured, else None: ``of_dense``, our throughput
        over that of dense products, where FLOPs are the floor; ``of_read``, the time of reading the bytes that must be
        moved over ours, where they are, of the forward as a graph; ``of_uniform``, uniform routing's time for a FLOP
        over ours; ``peers``, each one's time over ours, with ``WAITED`` behind the names of those that launch so late
        that the host's time is in theirs; ``error`` and ``cublas_error``, ours against float64 and that of the loop of
        cuBLAS's products.
    """
    rows = []
    for tokens, routing in dict.fromkeys((case["tokens"], case["routing"]) for case in record["cases"]):
        here, uniform = _timed(record, tokens, routing), _timed(record, tokens, "uniform")
        for each in (FORWARD, BOTH):
            ours = here.get((OURS, each))
            if ours is None:
                continue
            times = {name: case["times"] for (name, of), case in here.items() if of == each}
            over = {name: ratio(times, name, OURS) for name in times if name != OURS}
            dense = over.pop(CEILING, None)
            over = {name + WAITED * here[name, each]["waited"]: times for name, times in over.items()}
            reading = here.get((OURS, GRAPH), ours) if each == FORWARD else ours
            least = reading["bytes"] / record["ceilings"]["read"]
            read = least >= ours["flops"] / record["ceilings"]["bfloat16"]  # or multiplied: which bounds it
            even, cublas = uniform.get((OURS, each)), here.get((CUBLAS, FORWARD))
            rows.append(
                {
                    "tokens": tokens,
                    "routing": routing,
                    "pass": each,
                    "of_dense": None if read else dense,
                    "of_read": least / reading["median"] if read else None,
                    "of_uniform": even and even["median"] / even["flops"] * ours["flops"] / ours["median"],
                    "peers": over,
                    "error": ours["error"],
                    "cublas_error": cublas and cublas["error"],
                }
            )
    return rows


def goals(record: dict[str, Any]) -> list[Goal]:
    """Return every goal with what the record says of it."""
    rows, judged = comparisons(record), record["device"] == "gpu"
    even = [row for row in rows if row["routing"] == "uniform"]

    def goal(name: str, least: float, found: list[tuple[float, str]], *, ahead: bool = False) -> Goal:
        if not found:
            return Goal(name, least, None, "", None)
        value, case = min(found)
        case = case if len(found) > 1 else ""
        return Goal(name, least, value, case, (value > least if ahead else value >= least) if judged else None)

    def of(chosen: list[dict[str, Any]], what: str) -> list[tuple[float, str]]:
        return [(row[what], _case(row)) for row in chosen if row[what] is not None]

    found = []
    for each, tokens, least in OF_DENSE:
        chosen = [row for row in even if (row["tokens"], row["pass"]) == (tokens, each)]
        passes = "forward" if each == FORWARD else "forward and backward"
        found.append(goal(f"{passes}, N = {tokens}: of dense cuBLAS's throughput", least, of(chosen, "of_dense")))
    many = [row for row in rows if row["tokens"] >= MANY and row["routing"] != "uniform"]
    found.append(goal("skewed routing: of uniform routing's throughput", OF_UNIFORM, of(many, "of_uniform")))
    for tokens, least in OF_READING:
        chosen = [row for row in even if (row["tokens"], row["pass"]) == (tokens, FORWARD)]
        found.append(goal(f"forward, N = {tokens}: of the rate of reading", least, of(chosen, "of_read")))
    peers = [(time, f"{name}, {_case(row)}") for row in rows for name, time in row["peers"].items()]
    found.append(goal("every peer's time: of ours, which is to be less", 1.0, peers, ahead=True))
    # To as many digits as so few sampled tokens give.
    errors = [(round(row["cublas_error"] / row["error"], 2), _case(row)) for row in rows if row["cublas_error"]]
    found.append(goal("the error of cuBLAS's products: of ours", 1.0, errors))
    return found


def told(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that a terminal shows of the goals."""
    yield "goals" if record["device"] == "gpu" else NO_GPU
    for name, least, found, case, met in goals(record):
        yield f"  {verdict(found, met):<13}{_figure(found):>6}, at least {least:.2f}: {name}{case and f' ({case})'}"
    for name, reason in absent(record).items():
        yield f"  not compared: {name}: {reason}"
    if any_waited(record):
        yield f"  {WAITED} the host's time is in it"


def page(record: dict[str, Any]) -> Iterator[str]:
    """Yield the Markdown that the site shows of a record."""
    where, ceilings = record["machine"], record["ceilings"]
    yield f"{where['date']}, {where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, CuPy {where['cupy']}, "
    yield f"tinymoe {where['tinymoe']}; medians of {record['rounds']} rounds. Ceilings of the same run: large products "
    yield f"in bfloat16 {ceilings['bfloat16'] / 1e12:.4g} TFLOP/s, reading {ceilings['read'] / 1e9:.4g} GB/s."
    yield ""
    head = ["goal", "at least", "found", "", "in the case of"]
    yield from table(
        head,
        [
            [name, f"{least:.2f}", _figure(found), verdict(found, met), case]
            for name, least, found, case, met in goals(record)
        ],
    )
    yield ""
    head = ["tokens", "routing", "pass", "of dense", "of reading", "of uniform", "nearest peer, its time of ours"]
    rows = []
    for row in comparisons(record):
        shares = [_figure(row[of]) for of in ("of_dense", "of_read", "of_uniform")]
        nearest = min(row["peers"], key=row["peers"].__getitem__, default=None)
        peer = "–" if nearest is None else f"{nearest} {row['peers'][nearest]:.2f}"
        errors = [_figure(row[of], ".1e") for of in ("error", "cublas_error")]
        rows.append([str(row["tokens"]), row["routing"], row["pass"], *shares, peer, *errors])
    yield from table([*head, "error", "cuBLAS's"], rows)
    if any_waited(record):
        yield ""
        yield f"\\{WAITED} The host's time is in it: the peer launches so late that the device may have waited."
    kept = [case for case in record["cases"] if "kept" in case and case["routing"] == "uniform"]
    if kept:
        yield ""
        yield "What training keeps of the experts' rows, and the time of forward and backward over that with all of it:"
        yield ""
        whole = {case["tokens"]: case["median"] for case in kept if case["pass"] == BOTH}
        rows = []
        for case in kept:
            over = case["median"] / whole[case["tokens"]]
            rows.append([str(case["tokens"]), case["pass"], f"{case['kept'] / 1e6:,.4g}", f"{over:.3f}"])
        yield from table(["tokens", "pass", "megabytes kept", "time"], rows)
    missing = absent(record)
    if missing:
        yield ""
        yield "Not compared: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()) + "."


def newest(folder: Path) -> Path | None:
    """Return the newest record of a GPU in a folder, by the date in it and then by its name; None: there is none."""
    found = [(path, json.loads(path.read_text())) for path in folder.glob("moe-*.json")]
    dated = [(record["machine"]["date"], path) for path, record in found if record["device"] == "gpu"]
    return max(dated)[1] if dated else None


def absent(record: dict[str, Any]) -> dict[str, str]:
    """Return who could not run, and why: in its first such case."""
    reasons: dict[str, str] = {}
    for case in record["cases"]:
        if "skipped" in case:
            reasons.setdefault(case["contestant"], case["skipped"])
    return reasons


def any_waited(record: dict[str, Any]) -> bool:
    """Return whether a peer has the host's time in its own."""
    return any(name.endswith(WAITED) for row in comparisons(record) for name in row["peers"])


def verdict(found: float | None, met: bool | None) -> str:
    """Return a word on a goal."""
    if found is None:
        return "not measured"
    return "no GPU" if met is None else "met" if met else "not met"


def _timed(record: dict[str, Any], tokens: int, routing: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (case["contestant"], case["pass"]): case
        for case in record["cases"]
        if (case["tokens"], case["routing"]) == (tokens, routing) and "skipped" not in case
    }


def _case(row: dict[str, Any]) -> str:
    return f"{row['tokens']} tokens, {row['routing']}, {row['pass']}"


def _figure(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
