"""Draw README's picture, docs/readme.svg: a text coloured by each byte's first-choice expert, in two layers.

Run as ``python docs/readme_picture.py``, with the model of lessons/checkpoint: figure 8 of the paper, small.
"""

from html import escape
from pathlib import Path

import numpy as np

from tinymoe import Mixtral
from tinymoe.analysis.colours import colours

ROOT = Path(__file__).parent.parent
TEXT = '''def mean(values):
    """Return the mean."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
'''
WIDTH, HEIGHT, MARGIN = 9, 19, 16  # of a character, and around a panel


def panel(experts: np.ndarray, title: str, left: int) -> list[str]:
    """Return the SVG of the text, each byte on the colour of its expert."""
    palette, parts = colours(8), [f'<text x="{left}" y="{MARGIN + 2}" class="title">{title}</text>']
    row = column = 0
    for character, expert in zip(TEXT, experts):
        if character == "\n":
            row, column = row + 1, 0
            continue
        x, y = left + WIDTH * column, MARGIN + 12 + HEIGHT * row
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="{palette[expert]}"/>')
        parts.append(f'<text x="{x + 0.9}" y="{y + 14}">{escape(character)}</text>' if character != " " else "")
        column += 1
    return parts


def main() -> None:
    """Write the picture."""
    model = Mixtral.from_pretrained(ROOT / "lessons" / "checkpoint")
    layers = model.routing(np.frombuffer(TEXT.encode(), np.uint8)[None].astype(int))
    lines = TEXT.splitlines()
    width = WIDTH * max(map(len, lines)) + 2 * MARGIN
    height = 2 * MARGIN + 12 + HEIGHT * len(lines) + 22
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height}" font-size="14" '
        'font-family="ui-monospace, Menlo, Consolas, monospace">',
        "<style>.title{font:13px sans-serif;fill:#333}</style>",
        f'<rect width="{2 * width}" height="{height}" fill="#fff" rx="6"/>',
    ]
    for number, layer in enumerate((0, len(layers) - 1)):
        title = f"{'first' if number == 0 else 'last'} layer"
        parts += panel(layers[layer][1][:, 0], title, MARGIN + number * width)
    y = height - 24
    parts.append(f'<text x="{MARGIN}" y="{y + 11}" class="title">the expert of first choice:</text>')
    for expert, colour in enumerate(colours(8)):
        x = MARGIN + 180 + 45 * expert
        parts.append(f'<rect x="{x}" y="{y}" width="13" height="13" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 11}" class="title">{expert}</text>')
    (ROOT / "docs" / "readme.svg").write_text("\n".join(part for part in [*parts, "</svg>"] if part) + "\n")


if __name__ == "__main__":
    main()
