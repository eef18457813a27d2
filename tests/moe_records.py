"""Records of `tinymoe bench moe` from a card that there is not: for tests of what is made of records."""

import itertools
import json

from tinymoe.bench import moe
from tinymoe.bench.goals import BOTH, CEILING, CUBLAS, FORWARD, GRAPH, OURS

READ, COMPUTE = 4e12, 8e14  # of no card


def case(tokens, routing, contestant, each, share, error=2e-3):
    """Return a case that takes so much of the floor; its rounds have an outlier, and their median is that share."""
    flops, moved = 7e8 * tokens, 2.8e9 + 1e4 * tokens
    floor = max(flops / COMPUTE, moved / READ)
    times = [floor / share, 3 * floor / share, floor / share]
    figures = {"flops": flops, "bytes": moved, "floor": floor, "median": floor / share, "times": times}
    more = {"waited": False, "error": None if contestant == CEILING else error}
    if contestant == OURS and each in moe.KEPT:
        more["kept"] = 10**6 * (each == BOTH)
    return {"tokens": tokens, "routing": routing, "contestant": contestant, "pass": each} | figures | more


def synthetic():
    """Return a record of a card that there is not."""
    cases = [
        case(tokens, routing, contestant, each, share)
        for tokens, routing in itertools.product(moe.TOKENS, moe.ROUTINGS)
        for contestant, each, share in (
            (OURS, FORWARD, 0.90),
            (OURS, GRAPH, 0.91),
            (OURS, BOTH, 0.90),
            (OURS, "both, 0 kept", 0.72),
            (CEILING, FORWARD, 0.95),
            (CEILING, BOTH, 0.95),
            (CUBLAS, FORWARD, 0.60),
            ("torch grouped_mm", FORWARD, 0.70),
            ("torch grouped_mm", BOTH, 0.70),
        )
    ]
    cases.append({"tokens": 1, "routing": "uniform", "contestant": "jax", "skipped": "no such module"})
    machine = {"date": "2000-01-01", "gpu": "Toy", "driver": "1", "cuda": "13.0", "cupy": "14.2", "tinymoe": "0"}
    ceilings = {"bfloat16": COMPUTE, "read": READ, "bytes": READ, "float32": 1e13}
    return {"machine": machine, "device": "gpu", "rounds": 3, "ceilings": ceilings, "cases": cases}


def written(path, date, device="gpu"):
    """Write a record of a date and return where it is."""
    record = synthetic() | {"device": device}
    record["machine"]["date"] = date
    path.write_text(json.dumps(record))
    return path
