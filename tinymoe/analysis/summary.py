"""What an analysis comes to, on a terminal: repetition, load, pairs and confidence, and a few coloured lines."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tinymoe.analysis.explorer import Passage
from tinymoe.analysis.figures import few

Numbers = Mapping[str, Any]
MOST_COLUMNS = 10  # experts whose shares a table has room for
CHARACTERS = 240  # of coloured text from each domain


def show(numbers: Numbers, passages: Mapping[str, Passage]) -> None:
    """Print the summary."""
    console = Console()
    for table in (_repetition(numbers), _load(numbers), _confidence(numbers)):
        console.print("\n", table, sep="")
    if console.color_system and console.color_system != "standard":  # 16 colours would be shared by experts
        _coloured(console, numbers, passages)


def _repetition(numbers: Numbers) -> Table:
    E, k, chance = numbers["num_experts"], numbers["top_k"], numbers["chance"]
    kinds = [("first", "first choice")] + [("chosen", "first or second" if k == 2 else f"any of {k}")] * (k > 1)
    by_chance = " and ".join(f"{100 * chance[kind]:.1f}" for kind, _ in kinds)
    table = _table(f"neighbours that repeat an expert, in percent; by chance, {k} of {E}: {by_chance}", numbers)
    for _, name in kinds:
        table.add_column(name, justify="right")
        table.add_column("at this load", justify="right")
    for index, layer in few(numbers["layers"]).items():
        for domain, of in numbers["domains"].items():
            found = [of["layers"][index][f"repeat_{kind}"] for kind, _ in kinds]
            table.add_row(
                str(layer), Text(domain), *(cell for repetition in found for cell in _beside_load(repetition))
            )
        table.add_section()
    return table


def _beside_load(repetition: Mapping[str, Any]) -> tuple[Text, str]:
    share, low, high, by_load = (repetition[key] for key in ("share", "low", "high", "by_load"))
    if share is None:
        return Text("–"), f"{100 * by_load:.1f}"
    return Text.assemble((f"{100 * share:.1f}", "bold"), f" ± {50 * (high - low):.1f}"), f"{100 * by_load:.1f}"


def _load(numbers: Numbers) -> Table:
    E = numbers["num_experts"]
    even = f"share of first choices by expert, in percent; even: {100 / E:.1f}"
    table = _table(even + (", bold: outside the interval" if E <= MOST_COLUMNS else ""), numbers)
    columns = [str(expert) for expert in range(E)] if E <= MOST_COLUMNS else ["busiest", "idlest", "clearly uneven"]
    for column in columns:
        table.add_column(column, justify="right")
    for index, layer in few(numbers["layers"]).items():
        for domain, of in numbers["domains"].items():
            first = of["layers"][index]["first"]
            share = 100 * np.array(first["share"])
            uneven = (np.array(first["low"]) > 1 / E) | (np.array(first["high"]) < 1 / E)
            if E <= MOST_COLUMNS:
                cells = [Text(f"{value:.1f}", "bold" if mark else "") for value, mark in zip(share, uneven)]
            else:
                extremes = [f"{share[expert]:.1f} ({expert})" for expert in (share.argmax(), share.argmin())]
                cells = [Text(text) for text in (*extremes, f"{np.count_nonzero(uneven)} of {E}")]
            table.add_row(str(layer), Text(domain), *cells)
        table.add_section()
    return table


def _confidence(numbers: Numbers) -> Table:
    E, k = numbers["num_experts"], numbers["top_k"]
    table = _table(f"the router's entropy, nats (at most {np.log(E):.2f}), margins, and most attracted pair", numbers)
    table.add_column("entropy", justify="right")
    table.add_column("choice 1 − next", justify="right")
    if k > 1:
        table.add_column(f"{k} − next", justify="right")
        table.add_column("pair, × expected")
    for index, layer in few(numbers["layers"]).items():
        for domain, of in numbers["domains"].items():
            found = of["layers"][index]
            cells = [f"{found['entropy']:.2f}", _decimal(found["margin_first"])]
            if k > 1:
                cells += [_decimal(found["margin_chosen"]), _strongest(found)]
            table.add_row(str(layer), Text(domain), *cells)
        table.add_section()
    return table


def _strongest(found: Mapping[str, Any]) -> str:
    counts, expected = np.array(found["pairs"]), np.array(found["expected_pairs"])
    # of how many more there are, what chance would not give: by the deviation in units of its own spread
    first, second = np.unravel_index(np.argmax((counts - expected) / np.sqrt(expected + 1)), counts.shape)
    if counts[first, second] <= expected[first, second]:
        return "–"
    return f"{first}, {second}: {counts[first, second] / max(expected[first, second], 1e-9):.1f} ×"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _coloured(console: Console, numbers: Numbers, passages: Mapping[str, Passage]) -> None:
    middle = (len(numbers["layers"]) - 1) // 2
    styles = [Style(color="#000000", bgcolor=colour) for colour in numbers["colours"]]
    legend = Text.assemble(*((f" {expert} ", style) for expert, style in enumerate(styles)))
    console.print(f"\nfirst-choice expert in layer {numbers['layers'][middle]}: ", legend, sep="")
    for domain, passage in passages.items():
        text = Text()
        for piece, expert in zip(passage.pieces, passage.experts[middle, :, 0]):
            text.append(piece.expandtabs(4), styles[expert])
            if len(text) > CHARACTERS:
                break
        console.print(Text(f"{domain}:", "bold"))
        console.print(text)


def _table(title: str, numbers: Numbers) -> Table:
    """Return a table with the two columns that all have."""
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("text", no_wrap=True, max_width=max(10, min(24, max(map(len, numbers["domains"])))))
    return table
