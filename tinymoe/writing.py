"""Writing to the terminal: text as it comes, characters whole, tokens coloured by their expert if asked."""

import colorsys
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tinymoe.errors import InputError
from tinymoe.generation import generate, stream
from tinymoe.model import Mixtral
from tinymoe.tokenizer import Tokenizer


def write(
    model: Mixtral,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    show_routing: bool = False,
    layer: int | None = None,
    **options: Any,
) -> None:
    """Print the prompts' continuations: a single one as it comes, several when they are done.

    Parameters
    ----------
    prompts
        At least one.
    show_routing
        Colour each token of a single prompt and of its continuation by its first-choice expert, with a legend.
    layer
        Whose routing; None: the middle one.
    options
        Of `tinymoe.generate`.

    Raises
    ------
    InputError
        A prompt is empty, or routing is asked for where there is none.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(map(len, ids)):
        raise InputError("the prompt is empty: give at least one character")
    options["eos_token"] = tokenizer.eos_token
    if show_routing:
        _write_routing(model, tokenizer, ids, layer, options)
    elif len(ids) == 1:
        decoder = tokenizer.stream()
        for token in ids[0]:
            print(decoder.feed(token), end="")
        print(end="", flush=True)
        for step in stream(model, ids, **options):
            if step.tokens[0] is not None and step.tokens[0] != tokenizer.eos_token:
                print(decoder.feed(step.tokens[0]), end="", flush=True)
        print(decoder.finish())
    else:
        for number, tokens in enumerate(generate(model, ids, **options)):
            print(f"--- {number + 1} ---\n{tokenizer.decode(tokens)}")


def expert_colour(expert: int, num_experts: int) -> Style:
    """Return the colour of an expert: hues as far apart as their number allows, readable on dark and on light."""
    red, green, blue = colorsys.hls_to_rgb(expert / num_experts, 0.5, 0.75)
    return Style(color=f"rgb({int(red * 255)},{int(green * 255)},{int(blue * 255)})")


def _write_routing(
    model: Mixtral, tokenizer: Tokenizer, ids: list[np.ndarray], layer: int | None, options: dict[str, Any]
) -> None:
    config = model.config
    if config.num_experts == 0:
        raise InputError("this model is dense: it has no routing to show")
    if len(ids) > 1:
        raise InputError("--show-routing colours a single prompt: give one")
    with_experts = config.moe_layers
    layer = with_experts[len(with_experts) // 2] if layer is None else layer
    if layer not in with_experts:
        which = f"every {config.moe_every} " * (config.moe_every > 1)
        raise InputError(
            f"--layer is {layer}; the layers with experts are {which}from {with_experts[0]} to {with_experts[-1]}"
        )
    true = os.environ.get("COLORTERM") in ("truecolor", "24bit")  # with 16 colours, experts would share some
    console = Console(force_terminal=True, color_system="truecolor" if true else "256", soft_wrap=True)
    colours = [expert_colour(expert, config.num_experts) for expert in range(config.num_experts)]
    legend = Text.assemble(*((f"█ {expert}  ", colour) for expert, colour in enumerate(colours)))
    console.print(f"first-choice expert in layer {layer}: ", legend, sep="")
    decoder = tokenizer.stream()
    fed = list(ids[0])  # a token's expert is known once the model has read it, one step after it was written
    for step in stream(model, ids, **options):
        for token, expert in zip(fed, step.experts[with_experts.index(layer)][:, 0]):
            console.print(decoder.feed(token), style=colours[expert], end="", markup=False, highlight=False)
        fed = [token for token in step.tokens if token is not None and token != tokenizer.eos_token]
    tail = "".join(decoder.feed(token) for token in fed) + decoder.finish()
    console.print(tail, markup=False, highlight=False)
