"""The roofline of a record of `tinymoe bench moe`: what each contestant gives, under what the card gives at most."""

from typing import Any

from matplotlib.figure import Figure

from tinymoe.bench.goals import CEILING, FORWARD, OURS

MARKERS = "os^vDP*X<>"
ABOVE: Any = dict(textcoords="offset points", fontsize=9)


def roofline(record: dict[str, Any]) -> Figure:
    """Draw FLOPs per byte against TFLOP/s of the forward with uniform routing, a column of points a token count."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    cases = [case for case in record["cases"] if (case.get("pass"), case["routing"]) == (FORWARD, "uniform")]
    cases = [case for case in cases if case["contestant"] != CEILING]  # which reads one expert for all
    compute, read = (record["ceilings"][of] / 1e12 for of in ("bfloat16", "read"))
    columns = {case["tokens"]: case["flops"] / case["bytes"] for case in cases}
    left, ridge, right = min(columns.values()) / 2, compute / read, 2 * max(columns.values())
    axes.plot([left, ridge], [left * read, compute], color="black", linewidth=1)
    axes.plot([ridge, max(right, 2 * ridge)], [compute, compute], color="black", linewidth=1)
    axes.annotate(f"products {compute:.3g} TFLOP/s", (ridge, compute), (0, 5), **ABOVE)
    axes.annotate(f"reading {read:.3g} TB/s", (left, left * read), (2, 48), **ABOVE)
    names = sorted({case["contestant"] for case in cases}, key=lambda name: (name != OURS, name))
    for number, name in enumerate(names):
        x, y = zip(*((columns[c["tokens"]], c["flops"] / c["median"] / 1e12) for c in cases if c["contestant"] == name))
        size, edge = (90, "black") if name == OURS else (28, f"C{number - 1}")  # ours is a ring around what it covers
        inside = "none" if name == OURS else edge
        axes.scatter(x, y, size, facecolors=inside, edgecolors=edge, marker=MARKERS[number % len(MARKERS)], label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", xlim=(left, max(right, 2 * ridge)))
    tokens = axes.secondary_xaxis("top")
    tokens.set_xticks([*columns.values()], [f"{count:,}" for count in columns], fontsize=8)
    tokens.minorticks_off()
    tokens.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def described(record: dict[str, Any]) -> str:
    """Return what the picture shows, in words."""
    shares = [
        f"{case['floor'] / case['median']:.0%} at {case['tokens']:,} tokens"
        for case in record["cases"]
        if (case["contestant"], case.get("pass"), case["routing"]) == (OURS, FORWARD, "uniform")
    ]
    return (
        "Roofline on logarithmic axes, FLOPs per byte against TFLOP/s: the rates of reading and of large products as "
        "lines, every contestant as a point for each number of tokens. Of the roof tinymoe reaches "
        f"{', '.join(shares)}."
    )
