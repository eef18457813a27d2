"""A colour for each expert, with black text readable on it, told apart also by colour-blind readers where possible."""

import colorsys

# Paul Tol's light scheme, made for cells with text in them: https://personal.sron.nl/~pault/ (technical note 3.2).
# In an order that keeps the two greens and the two blues apart; olive, close to both greens, comes last.
LIGHT = ("#77aadd", "#ee8866", "#44bb99", "#eedd88", "#ffaabb", "#bbcc33", "#99ddff", "#dddddd", "#aaaa00")
LEAST_CONTRAST = 7  # of black text, as WCAG asks for at its highest level


def colours(num_experts: int) -> list[str]:
    """Return a colour ``#rrggbb`` for each expert: of the scheme for up to 9, else hues in three lightnesses.

    Nobody tells dozens of colours apart: wherever they are used, the expert's number stands beside them.
    """
    if num_experts <= len(LIGHT):
        return list(LIGHT[:num_experts])
    spread = []
    for expert in range(num_experts):
        lightness = (0.62, 0.76, 0.88)[expert % 3]
        colour = _colour(expert / num_experts, lightness)
        while contrast_with_black(colour) < LEAST_CONTRAST:  # blue is dark where yellow is light
            lightness += 0.02
            colour = _colour(expert / num_experts, lightness)
        spread.append(colour)
    return spread


def contrast_with_black(colour: str) -> float:
    """Return the contrast ratio of a colour ``#rrggbb`` to black, 1 to 21, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return (sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear)) + 0.05) / 0.05


def _colour(hue: float, lightness: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
