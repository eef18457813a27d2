"""The pictures of an analysis: figures 7, 8 and 10 of the paper for this model, expert pairs, and confidence."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from tinymoe.analysis.colours import colours

Numbers = Mapping[str, Any]
DOMAIN_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Tol's bright scheme
MOST_DOMAINS = 12  # in a figure
COLUMNS, LINES = 64, 9  # of coloured text in each panel


def few(layers: Sequence[int]) -> dict[int, int]:
    """Return index → layer for the first, the middle and the last one; of 32 the paper's 0, 15 and 31."""
    return {index: layers[index] for index in sorted({0, (len(layers) - 1) // 2, len(layers) - 1})}


def share_figure(numbers: Numbers) -> Figure:
    """Return the share of each expert among first choices, by domain and layer, with intervals (figure 7)."""
    E, domains = numbers["num_experts"], _drawn(numbers)
    layers = few(numbers["layers"])
    figure, axes = _panels(len(layers), width=min(24, max(8, 0.5 * E + 3)), height=2.4)
    width = 0.8 / len(domains)
    for axis, (index, layer) in zip(axes, layers.items()):
        for number, domain in enumerate(domains.values()):
            first = domain["layers"][index]["first"]
            share, low, high = (100 * np.array(first[key]) for key in ("share", "low", "high"))
            x = np.arange(E) + (number - (len(domains) - 1) / 2) * width
            axis.bar(x, share, 0.92 * width, color=_domain_colour(number))
            axis.errorbar(x, share, [share - low, high - share], fmt="none", ecolor="0.25", elinewidth=0.8)
        axis.axhline(100 / E, color="0.2", linewidth=0.9, linestyle=(0, (4, 3)))
        axis.set(ylabel="first choices, %", xlim=(-0.6, E - 0.4), ylim=(0, None))
        axis.set_title(f"layer {layer}", loc="left", fontsize=10)
        axis.set_xticks(range(0, E, math.ceil(E / 32)))
    axes[-1].set_xlabel("expert")
    _legend(figure, domains, [(Line2D([], [], color="0.2", linestyle=(0, (4, 3))), "even load")])
    return figure


def repetition_figure(numbers: Numbers) -> Figure:
    """Return how often neighbours repeat an expert, layer by layer, beside chance (figure 10)."""
    E, k, domains = numbers["num_experts"], numbers["top_k"], _drawn(numbers)
    kinds = [("first", "first choice")] + [("chosen", _any_choice(k))] * (k > 1)
    figure = _figure(4.6 * len(kinds), 3.6)
    x = numbers["layers"]
    for axis, (kind, title) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        for number, domain in enumerate(domains.values()):
            found = [layer[f"repeat_{kind}"] for layer in domain["layers"]]
            share, low, high, by_load = (
                100 * np.array([math.nan if layer[key] is None else layer[key] for layer in found])
                for key in ("share", "low", "high", "by_load")
            )
            colour = _domain_colour(number)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(x, share, "o-", color=colour, markersize=4, linewidth=1.4)
            axis.plot(x, by_load, ":", color=colour, linewidth=1.2, marker="_" if len(x) == 1 else None)
        axis.axhline(100 * numbers["chance"][kind], color="0.2", linewidth=0.9, linestyle=(0, (4, 3)))
        axis.set(xlabel="layer", ylabel="neighbours that repeat, %", ylim=(0, None))
        axis.set_title(f"{title} (chance {100 * numbers['chance'][kind]:.1f} %)", loc="left", fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
    more = [
        (Line2D([], [], color="0.4", linestyle=":"), "chance at this load"),
        (Line2D([], [], color="0.2", linestyle=(0, (4, 3))), f"chance, {k} of {E}"),
    ]
    _legend(figure, domains, more)
    return figure


def pair_figure(numbers: Numbers) -> Figure:
    """Return how many more or fewer pairs of first and second choice there are than if they did not depend."""
    E, domains, layers = numbers["num_experts"], _drawn(numbers), few(numbers["layers"])
    figure = _figure(2.9 * len(layers) + 0.8, 2.7 * len(domains) + 0.4)
    axes = figure.subplots(len(domains), len(layers), squeeze=False)
    for row, (name, domain) in zip(axes, domains.items()):
        for axis, (index, layer) in zip(row, layers.items()):
            of_layer = domain["layers"][index]
            counts, expected = np.array(of_layer["pairs"]), np.array(of_layer["expected_pairs"])
            lift = np.log2((counts + 1) / (expected + 1))  # one more of each: a rare pair says little
            np.fill_diagonal(lift, math.nan)
            image = axis.imshow(lift, cmap="RdBu_r", vmin=-3, vmax=3)
            axis.set_facecolor("0.9")
            axis.set_title(f"{label(name, 24)}, layer {layer}", fontsize=9, parse_math=False)
            axis.set_xticks(range(0, E, math.ceil(E / 8)))
            axis.set_yticks(range(0, E, math.ceil(E / 8)))
    figure.supxlabel("second choice", fontsize=10)
    figure.supylabel("first choice", fontsize=10)
    bar = figure.colorbar(image, ax=axes, shrink=min(1, 1.6 / len(domains)), ticks=range(-3, 4))
    bar.ax.set_yticklabels(["⅛ ×", "¼ ×", "½ ×", "as expected", "2 ×", "4 ×", "8 ×"])
    return figure


def confidence_figure(numbers: Numbers) -> Figure:
    """Return the router's entropy and margins, layer by layer."""
    E, k, domains = numbers["num_experts"], numbers["top_k"], _drawn(numbers)
    panels = [("entropy", "entropy of the router, nats")]
    panels += [("margin_first", "first minus second probability")] * (E > 1)
    panels += [("margin_chosen", f"last chosen minus next (choices {k} and {k + 1})")] * (1 < k < E)
    figure = _figure(3.9 * len(panels), 3.4)
    x = numbers["layers"]
    for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for number, domain in enumerate(domains.values()):
            values = [layer[key] for layer in domain["layers"]]
            axis.plot(x, values, "o-", color=_domain_colour(number), markersize=4, linewidth=1.4)
        axis.set(xlabel="layer", ylim=(0, None))
        axis.set_title(title, loc="left", fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if key == "entropy":
            axis.axhline(math.log(E), color="0.2", linewidth=0.9, linestyle=(0, (4, 3)))
            axis.set_ylim(0, 1.08 * math.log(E) or 1)
    _legend(figure, domains, [(Line2D([], [], color="0.2", linestyle=(0, (4, 3))), "ln E, undecided")])
    return figure


def text_figure(numbers: Numbers, texts: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """Return text coloured by first-choice expert at the first, middle and last layer (figure 8).

    Parameters
    ----------
    numbers
        For E and the layers.
    texts
        Domain → the pieces of its tokens, and their experts (L, N, k).
    """
    layers, palette = few(numbers["layers"]), colours(numbers["num_experts"])
    texts = dict(list(texts.items())[:MOST_DOMAINS])
    figure = _figure(5.3 * len(layers), 1.85 * len(texts) + 0.5)
    axes = figure.subplots(len(texts), len(layers), squeeze=False)
    for row, (name, (pieces, experts)) in zip(axes, texts.items()):
        for axis, (index, layer) in zip(row, layers.items()):
            _coloured(axis, pieces, experts[index, :, 0], palette)
            axis.set_title(f"{label(name, 30)}, layer {layer}", loc="left", fontsize=9, parse_math=False)
    handles = [Patch(facecolor=colour, label=str(expert)) for expert, colour in enumerate(palette)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(16, len(handles)), frameon=False, fontsize=9)
    return figure


def _coloured(axis: Axes, pieces: Sequence[str], experts: np.ndarray, palette: Sequence[str]) -> None:
    line = column = 0
    for piece, expert in zip(pieces, experts):
        for character in piece:
            if column == COLUMNS:
                line, column = line + 1, 0
                if character == "\n":
                    continue
            if line == LINES:
                break
            axis.add_patch(Rectangle((column, line), 1, 1, facecolor=palette[expert], linewidth=0))
            shown = {"\n": "↵", "\t": "⇥"}.get(character, label(character))
            grey = "0.45" if character in "\n\t" else "black"
            style: dict[str, Any] = dict(family="DejaVu Sans Mono", fontsize=7, ha="center", va="center")
            text = axis.text(column + 0.5, line + 0.53, shown, color=grey, parse_math=False, **style)
            text.set_in_layout(False)  # thousands of them would be measured
            line, column = (line + 1, 0) if character == "\n" else (line, column + 1)
    axis.set(xlim=(0, COLUMNS), ylim=(LINES, 0), xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_color("0.8")


def label(text: str, most: int = 40) -> str:
    """Return a text that a figure can show: characters that its font lacks as □, and the end of a long one."""
    known = _font_characters()
    text = "".join(character if ord(character) in known else "□" for character in text)
    return text if len(text) <= most else "…" + text[1 - most :]


@cache
def _font_characters() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()) - frozenset(range(32))


def _any_choice(k: int) -> str:
    return "first or second choice" if k == 2 else f"any of {k} choices"


def _drawn(numbers: Numbers) -> dict[str, Any]:
    return dict(list(numbers["domains"].items())[:MOST_DOMAINS])


def _domain_colour(number: int) -> str:
    return DOMAIN_COLOURS[number % len(DOMAIN_COLOURS)]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = _figure(width, height * count + 0.6)
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _legend(figure: Figure, domains: Mapping[str, Any], more: list[tuple[Any, str]]) -> None:
    handles = [Patch(facecolor=_domain_colour(number)) for number in range(len(domains))]
    # a label that starts with an underscore would be left out
    names = [" " + label(name, 30) for name in domains] + [" " + text for _, text in more]
    handles += [handle for handle, _ in more]
    fit = int(figure.get_figwidth() / (0.6 + 0.09 * max(map(len, names))))
    columns = max(1, min(fit, len(names)))
    legend = figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
