"""Write the drawings of these pages as SVG text: `python docs/math/drawings.py` writes docs/math/drawings/*.svg.

Every cell and number is computed by the index arithmetic that the page explains, never placed by hand. The same script
writes the same bytes.
"""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "drawings"
PAPER, INK, GREY, LINE = "#ffffff", "#1f2933", "#5f6b76", "#8b97a3"
TINTS = ["#bcd7f2", "#f7d3a8", "#c6e5bf", "#f2bfc6", "#d9c9ec", "#fbeaa0", "#b7e4e0", "#dcdcdc"]


class Drawing:
    """A picture on white paper, so that it reads the same on a light page and on a dark one."""

    def __init__(self, width: int, height: int):
        self.width, self.height, self.parts = width, height, []

    def box(self, x, y, w, h, fill="none", stroke=LINE, label="", size=12, bold=False):
        """Draw a rectangle with a label in its middle."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{stroke}"/>')
        if label != "":
            self.text(x + w / 2, y + h / 2 + size * 0.36, label, size=size, bold=bold)

    def text(self, x, y, words, size=12, at="middle", color=INK, bold=False):
        """Write words whose base line is at y."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}" fill="{color}"{weight}>'
            f"{escape(str(words))}</text>"
        )

    def line(self, x1, y1, x2, y2, color=LINE, width=1.0, arrow=False, dash=False):
        """Draw a line, with a head at its end if asked."""
        more = (' marker-end="url(#head)"' if arrow else "") + (' stroke-dasharray="4 3"' if dash else "")
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="{width:g}"{more}/>'
        )

    def dot(self, x, y, r=3.5, fill=INK):
        """Draw a point."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{fill}"/>')

    def path(self, points, color=INK, width=1.5):
        """Draw a line through points."""
        through = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{through}" fill="none" stroke="{color}" stroke-width="{width:g}"/>')

    def save(self, name):
        """Write the file."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3.5" orient="auto">'
        head = f'<defs>{head}<path d="M0,0 L7,3.5 L0,7 Z" fill="{GREY}"/></marker></defs>'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif">',
            head,
            f'<rect width="{self.width}" height="{self.height}" rx="6" fill="{PAPER}"/>',
            *self.parts,
            "</svg>",
        ]
        (FOLDER / f"{name}.svg").write_text("\n".join(lines) + "\n")


def rope_layouts():
    """Draw which elements of a head of 8 are one complex number, in the two layouts."""
    d = Drawing(560, 190)
    for top, title, partner in (
        (34, "Mistral: neighbours (2j, 2j + 1)", lambda i: i // 2),
        (122, "transformers: halves (j, j + K/2)", lambda i: i % 4),
    ):
        d.text(20, top - 10, title, at="start", bold=True)
        for i in range(8):
            d.box(20 + 65 * i, top, 60, 44, TINTS[partner(i)])
            imaginary = i % 2 if partner(1) == 0 else i // 4
            d.text(50 + 65 * i, top + 20, f"{'Im' if imaginary else 'Re'} z{partner(i)}", size=14)
            d.text(50 + 65 * i, top + 37, f"element {i}", size=10, color=GREY)
    d.save("rope_layouts")


def rope_rotation():
    """Draw the numbers of the worked example: q and k turned by the same step stay at the same angle."""
    d = Drawing(420, 330)
    x0, y0, unit = 190, 190, 50
    d.line(20, y0, 400, y0)
    d.line(x0, 20, x0, 310)
    u = complex(0.6, 0.8)
    for name, z, color in (("q", 1 + 2j, "#1f6fb2"), ("k", 3 - 1j, "#b0560f")):
        for step in range(3):
            w = z * u**step
            x, y = x0 + unit * w.real, y0 - unit * w.imag
            d.line(x0, y0, x, y, color, 2.2 - 0.6 * step)
            d.dot(x, y, 4, color)
            label = f"{name} at {step}"
            d.text(x + (8 if w.real > 0 else -8), y - 7, label, 12, "start" if w.real > 0 else "end", color)
    d.text(20, 320, "one step is u = 0.6 + 0.8i, an angle of 53.13 degrees", 11, "start", GREY)
    d.save("rope_rotation")


def attention_mask():
    """Draw the keys that each of 8 queries sees, causal and with a window of 3, and the tiles that are skipped."""
    d = Drawing(640, 300)
    for left, title, window in ((20, "causal", 8), (340, "sliding window W = 3", 3)):
        d.text(left + 130, 20, title, bold=True)
        d.text(left - 16, 32, "query t", 11, "start", GREY)
        for t in range(8):
            d.text(left + 8, 54 + 28 * t, t, 11, color=GREY)
            d.text(left + 40 + 28 * t, 285, t, 11, color=GREY)
            for s in range(8):
                seen = 0 <= t - s < window
                d.box(left + 26 + 28 * s, 36 + 28 * t, 26, 26, TINTS[0] if seen else "#f4f6f8")
        for rows in range(4):  # tiles of 2 queries by 2 keys
            for cols in range(4):
                hidden = all(
                    not 0 <= t - s < window for t in (2 * rows, 2 * rows + 1) for s in (2 * cols, 2 * cols + 1)
                )
                if hidden:
                    x, y = left + 26 + 56 * cols, 36 + 56 * rows
                    d.line(x + 4, y + 4, x + 50, y + 50, GREY)
                    d.line(x + 4, y + 50, x + 50, y + 4, GREY)
        d.text(left + 138, 272, "key s", 11, color=GREY)
    d.save("attention_mask")


def rolling_cache():
    """Draw where positions 0 to 6 live in a rolling cache of 3 slots."""
    d = Drawing(560, 150)
    d.text(20, 24, "position p lives in slot p mod 3; after position", 12, "start", bold=True)
    for newest in range(7):
        x = 30 + 74 * newest
        d.text(x + 27, 46, newest, 13, bold=True)
        for slot in range(3):
            held = [p for p in range(newest + 1) if p % 3 == slot]
            label = held[-1] if held else ""
            fill = TINTS[1] if held and held[-1] == newest else TINTS[0] if held else "#f4f6f8"
            d.box(x, 56 + 28 * slot, 54, 26, fill, label=label)
    d.save("rolling_cache")


def number_formats():
    """Draw the bits of the three formats."""
    d = Drawing(700, 200)
    for row, (name, exponent, fraction) in enumerate((("float32", 8, 23), ("bfloat16", 8, 7), ("float16", 5, 10))):
        y = 36 + 56 * row
        d.text(16, y + 20, name, 13, "start", bold=True)
        x = 100
        for kind, bits, tint in (
            ("s", 1, TINTS[3]),
            ("exponent", exponent, TINTS[2]),
            ("fraction", fraction, TINTS[0]),
        ):
            for bit in range(bits):
                d.box(x + 18 * bit, y, 18, 28, tint)
            d.text(x + 9 * bits, y - 6, f"{kind}" if kind == "s" else f"{kind} {bits}", 11, color=GREY)
            x += 18 * bits
    d.save("number_formats")


def butterfly():
    """Draw the butterfly sum over 8 lanes that hold 1 … 8."""
    d = Drawing(640, 300)
    values = list(range(1, 9))
    rows = [values]
    for bits in (4, 2, 1):
        values = [values[lane] + values[lane ^ bits] for lane in range(8)]
        rows.append(values)
    for lane in range(8):
        d.text(120 + 66 * lane, 22, f"lane {lane}", 11, color=GREY)
    for i, (row, bits) in enumerate(zip(rows, (0, 4, 2, 1))):
        y = 36 + 74 * i
        d.text(12, y + 18, "x" if not bits else f"xor {bits}", 13, "start", bold=True)
        for lane, value in enumerate(row):
            if bits:
                for source in (lane, lane ^ bits):
                    color = GREY if source == lane else "#1f6fb2"
                    d.line(120 + 66 * source, y - 48, 120 + 66 * lane, y - 1, color, arrow=True)
            d.box(97 + 66 * lane, y, 46, 26, TINTS[lane % bits] if bits else "#f4f6f8", label=value, size=14)
    d.save("butterfly")


def counting_sort():
    """Draw histogram, scan and scatter of 6 pairs in 2 blocks of 4."""
    d = Drawing(700, 330)
    experts = [2, 0, 0, 3, 2, 0]
    d.text(16, 34, "pairs", 12, "start", bold=True)
    for i, e in enumerate(experts):
        x = 100 + 58 * i + (26 if i >= 4 else 0)
        d.box(x, 16, 54, 30, TINTS[e], label=f"e {e}")
        d.text(x + 27, 60, f"pair {i}", 9, color=GREY)
    d.text(216, 78, "block 0", 11, color=GREY)
    d.text(413, 78, "block 1", 11, color=GREY)
    d.text(16, 114, "counts", 12, "start", bold=True)
    d.text(16, 130, "(E, blocks)", 10, "start", GREY)
    counts = [sum(e == of for e in block) for of in range(4) for block in (experts[:4], experts[4:])]
    starts = [sum(counts[:i]) for i in range(8)]
    for i in range(8):
        d.box(100 + 58 * i, 96, 54, 30, TINTS[i // 2], label=counts[i], size=14)
    d.text(16, 184, "starts", 12, "start", bold=True)
    d.text(16, 200, "exclusive scan", 10, "start", GREY)
    for i in range(8):
        d.box(100 + 58 * i, 166, 54, 30, TINTS[i // 2], label=starts[i], size=14)
        d.line(127 + 58 * i, 128, 127 + 58 * i, 163, arrow=True)
        d.text(127 + 58 * i, 212, f"e {i // 2}, block {i % 2}", 9, color=GREY)
    d.text(16, 284, "slots", 12, "start", bold=True)
    order = sorted(range(6), key=lambda i: experts[i])  # stable
    for slot, pair in enumerate(order):
        d.box(100 + 58 * slot, 264, 54, 30, TINTS[experts[pair]], label=f"token {pair // 2}")
        d.text(127 + 58 * slot, 308, f"slot {slot}", 9, color=GREY)
        d.text(127 + 58 * slot, 320, f"pair {pair}", 9, color=GREY)
    for e, start in enumerate(starts[::2]):
        d.text(102 + 58 * start + (22 if e == 1 else 0), 256, f"e{e}", 11, "start", bold=True)
    d.text(500, 256, "e1 owns no slot", 10, "start", GREY)
    d.save("counting_sort")


def row_tiles():
    """Draw ragged groups of rows cut into tiles of 2."""
    d = Drawing(640, 270)
    offsets, height = [0, 3, 3, 5, 6], 2
    tile = 0
    d.text(90, 22, "slots", bold=True)
    d.text(250, 22, "tiles of 2 rows", bold=True)
    d.text(470, 22, "block (tile, column tile) owns", bold=True)
    for e in range(4):
        for slot in range(offsets[e], offsets[e + 1]):
            d.box(60, 34 + 32 * slot, 60, 30, TINTS[e], label=f"slot {slot}")
            d.text(20, 54 + 32 * slot, f"e {e}", 12, "start")
        for begin in range(offsets[e], offsets[e + 1], height):
            end = min(begin + height, offsets[e + 1])
            y = 34 + 32 * begin
            d.box(190, y, 120, 32 * (end - begin) - 2, TINTS[e], label=f"tile {tile}: {begin} to {end}")
            d.line(122, y + 14, 186, y + 14, arrow=True)
            for column in range(4):
                d.box(400 + 36 * column, y, 34, 32 * (end - begin) - 2, TINTS[e], label=f"{tile},{column}", size=10)
            d.line(312, y + 14, 396, y + 14, arrow=True)
            tile += 1
    d.text(190, 250, f"tiles {tile} to 7 of the grid find no rows and return", 11, "start", GREY)
    d.save("row_tiles")


def register_tile():
    """Draw the 8 x 8 outputs of one thread of rung 3, in its block of 128 x 128."""
    d = Drawing(330, 340)
    cell = 2.2
    d.box(24, 30, 128 * cell, 128 * cell, "#f4f6f8")
    for thread, tint in ((0, "#1f6fb2"), (37, "#b0560f")):
        ty, tx = thread // 16, thread % 16
        for r in range(8):
            for c in range(8):
                d.box(24 + (tx + 16 * c) * cell, 30 + (ty + 16 * r) * cell, cell * 1.6, cell * 1.6, tint, tint)
    d.text(24, 20, "thread 0 (blue) and thread 37 (brown)", 12, "start", bold=True)
    d.text(24, 330, "columns tx + 16 c across, rows ty + 16 r down", 10, "start", GREY)
    d.save("register_tile")


def _groups(d, left, title, place):
    """Draw the 16-byte bank group of each (row, chunk) of 8 rows and 4 chunks."""
    d.text(left + 110, 22, title, bold=True)
    for row in range(8):
        d.text(left + 14, 59 + 30 * row, row, 11, color=GREY)
        for chunk in range(4):
            group = place(row, chunk) // 16 % 8
            edge = INK if chunk == 1 else LINE
            d.box(left + 30 + 44 * chunk, 40 + 30 * row, 42, 28, TINTS[group], edge, group, 13, chunk == 1)
    for chunk in range(4):
        d.text(left + 51 + 44 * chunk, 36, f"chunk {chunk}", 9, color=GREY)


def swizzle():
    """Draw the bank groups of a deep tile of rung 4, plain and swizzled."""
    d = Drawing(480, 320)
    _groups(d, 10, "as it comes", lambda row, chunk: 64 * row + 16 * chunk)
    _groups(d, 250, "chunk ^ (row / 2 % 4)", lambda row, chunk: 64 * row + 16 * (chunk ^ row // 2 % 4))
    d.text(
        20,
        306,
        "number and colour: the group of 4 banks; ldmatrix reads a column at once",
        11,
        "start",
        GREY,
    )
    d.save("swizzle")


def swizzle_128():
    """Draw where the 128-byte swizzle puts each chunk of 8 rows."""
    d = Drawing(520, 330)
    d.text(20, 22, "128-byte swizzle: which chunk lies at each place of a row", 12, "start", bold=True)
    for row in range(8):
        d.text(34, 63 + 32 * row, f"row {row}", 11, color=GREY)
        for place in range(8):
            chunk = place ^ row
            d.box(
                70 + 54 * place, 44 + 32 * row, 52, 30, TINTS[chunk], INK if chunk == 3 else LINE, chunk, 13, chunk == 3
            )
    d.text(70, 320, "places 0 … 7 across, 16 bytes each; chunk 3 is outlined", 11, "start", GREY)
    d.save("swizzle_128")


def _fragment(d, left, top, title, rows, columns, owner, size=26):
    d.text(left + columns * size / 2, top - 20, title, bold=True)
    for r in range(rows):
        d.text(left - 10, top + size * r + size * 0.65, r, 9, color=GREY)
        for c in range(columns):
            lane, register = owner(r, c)
            edge = INK if lane == 13 else LINE
            d.box(left + size * c, top + size * r, size - 2, size - 2, TINTS[lane // 4], edge, lane, 10, lane == 13)
            del register
    for c in range(columns):
        d.text(left + size * c + size / 2 - 1, top - 5, c, 9, color=GREY)


def fragments():
    """Draw which lane holds each element of A, B and the accumulators of mma.sync m16n8k16."""
    d = Drawing(960, 500)
    _fragment(d, 40, 50, "A (16 x 16): row, k", 16, 16, lambda r, k: (r % 8 * 4 + k % 8 // 2, r // 8 + k // 8 * 2))
    _fragment(d, 500, 50, "B (16 x 8): k, column", 16, 8, lambda k, c: (c * 4 + k % 8 // 2, k // 8))
    _fragment(d, 740, 50, "D (16 x 8): row, column", 16, 8, lambda r, c: (r % 8 * 4 + c // 2, r // 8))
    d.text(
        40,
        490,
        "the number is the lane, the colour g = lane / 4; lane 13 (g = 3, t = 1) is outlined",
        11,
        "start",
        GREY,
    )
    d.save("fragments")


def wgmma():
    """Draw which thread of a warpgroup holds each element of the first 16 columns of wgmma's accumulator."""
    d = Drawing(760, 560)
    d.text(
        20, 20, "rows 0-23 of 64, columns 0-15 of the accumulators: thread, and index into d", 12, "start", bold=True
    )
    for row in range(24):
        d.text(30, 57 + 21 * row, row, 9, color=GREY)
        for column in range(16):
            w, h, g = row // 16, row // 8 % 2, row % 8
            j, t, i = column // 8, column % 8 // 2, column % 2
            thread, index = 32 * w + 4 * g + t, 4 * j + 2 * h + i
            edge = INK if thread == 13 else LINE
            d.box(44 + 44 * column, 43 + 21 * row, 43, 20, TINTS[index], edge, f"{thread}:{index}", 10, thread == 13)
    for column in range(16):
        d.text(65 + 44 * column, 38, column, 9, color=GREY)
    d.save("wgmma")


def roofline():
    """Draw the roofline of an H200's datasheet, with the expert block at several batches."""
    from math import log10

    d = Drawing(640, 360)
    flops, bandwidth = 989e12, 4.8e12

    def x(intensity):
        return 70 + 125 * (log10(intensity) + 0.3)

    def y(rate):
        return 300 - 80 * (log10(rate) - 11.8)

    ridge = flops / bandwidth
    d.line(70, 300, 610, 300)
    d.line(70, 300, 70, 30)
    d.path([(x(0.6), y(0.6 * bandwidth)), (x(ridge), y(flops)), (x(9000), y(flops))], INK, 2)
    for tick in (1, 10, 100, 1000):
        d.line(x(tick), 300, x(tick), 305)
        d.text(x(tick), 318, tick, 11, color=GREY)
    for tick in (1e12, 1e13, 1e14, 1e15):
        d.line(65, y(tick), 70, y(tick))
        d.text(62, y(tick) + 4, f"{tick / 1e12:g}", 11, "end", GREY)
    for kind, batches, color in (("decode", (1, 8, 64), "#1f6fb2"), ("prefill", (4096,), "#b0560f")):
        for batch in batches:
            rows = 2 * batch / (8 * (1 - 0.75**batch))
            px, py = x(rows), y(min(flops, rows * bandwidth))
            d.dot(px, py, 5, color)
            words = f"{kind}, {batch} token{'s' if batch > 1 else ''}: {rows:.4g}"
            d.text(px + 10, py + 18, words, 11, "start" if batch < 4096 else "middle", color)
    d.text(x(ridge), y(flops) - 10, f"ridge: {ridge:.0f} FLOP per byte", 11, "middle", GREY)
    d.text(340, 345, "FLOP per byte of expert weight = rows per touched expert (bfloat16)", 12)
    d.text(
        76,
        18,
        "TFLOP/s at most, by the published specification of an H200: nothing here is measured",
        11,
        "start",
        GREY,
    )
    d.save("roofline")


def main():
    """Write all drawings."""
    FOLDER.mkdir(exist_ok=True)
    for draw in (
        *(rope_layouts, rope_rotation, attention_mask, rolling_cache, number_formats, butterfly, counting_sort),
        *(row_tiles, register_tile, swizzle, swizzle_128, fragments, wgmma, roofline),
    ):
        draw()


if __name__ == "__main__":
    main()
