"""Draws griffin.svg, the picture of how GRIFFIN works: `python docs/images/griffin.py`."""

from __future__ import annotations

import random
from pathlib import Path

TOKENS, NEURONS = 8, 12
STRONG = {1: 0.95, 2: 0.6, 5: 0.8, 6: 0.55, 8: 0.9, 11: 0.7}
"""Neurons of the drawing that take part in most tokens: half of all."""
INK, SOFT, LIGHT, KEPT, DROPPED = "#1f2937", "#6b7280", "#e5e7eb", "#0f766e", "#cbd5e1"


def main() -> None:
    """Write the file next to this one."""
    chance = random.Random(4)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1060 370" font-family="Helvetica, Arial, sans-serif">',
        '<rect width="1060" height="370" rx="14" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{SOFT}"/></marker></defs>',
    ]
    columns = [[_strength(neuron, chance) for _ in range(TOKENS)] for neuron in range(NEURONS)]
    sums = [sum(value * value for value in column) for column in columns]
    parts += _prefill(columns)
    parts += _select(sums)
    parts += _prune()
    parts += _decode()
    parts.append("</svg>")
    Path(__file__).with_name("griffin.svg").write_text("\n".join(parts) + "\n")


def _strength(neuron: int, chance: random.Random) -> float:
    usual = STRONG.get(neuron, 0.12)
    return min(1.0, max(0.03, usual + chance.uniform(-0.18, 0.18)))


def _head(x: int, number: int, name: str, *lines: str) -> list[str]:
    parts = [
        f'<circle cx="{x + 11}" cy="35" r="11" fill="{KEPT}"/>',
        _text(x + 11, 39.5, str(number), 13, "#ffffff", anchor="middle", weight="bold"),
        _text(x + 30, 40, name, 17, weight="bold"),
    ]
    return parts + [_text(x, 318 + 18 * row, line, 13, SOFT) for row, line in enumerate(lines)]


def _text(
    x: float, y: float, text: str, size: float, fill: str = INK, anchor: str = "start", weight: str = "normal"
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'


def _arrow(x: float, to: float, y: float = 175) -> str:
    return f'<path d="M{x} {y}H{to}" stroke="{SOFT}" stroke-width="2" fill="none" marker-end="url(#tip)"/>'


def _prefill(columns: list[list[float]]) -> list[str]:
    x, y, cell = 52, 90, 19
    parts = _head(30, 1, "prefill", "The full model reads the prompt, exactly.", "z/||z|| of every token and neuron.")
    parts.append(_text(x + NEURONS * cell / 2, y - 10, "neurons", 12, SOFT, anchor="middle"))
    parts.append(
        f'<text transform="translate({x - 10} {y + TOKENS * cell / 2}) rotate(-90)" font-size="12" fill="{SOFT}" '
        'text-anchor="middle">tokens of the prompt</text>'
    )
    for neuron, column in enumerate(columns):
        for token, value in enumerate(column):
            parts.append(
                f'<rect x="{x + neuron * cell}" y="{y + token * cell}" width="{cell - 1.5}" height="{cell - 1.5}" '
                f'rx="2" fill="{KEPT}" fill-opacity="{value:.2f}"/>'
            )
    parts.append(_text(x + NEURONS * cell / 2, y + TOKENS * cell + 20, "some neurons are strong in most tokens", 12, SOFT, anchor="middle"))
    return [*parts, _arrow(x + NEURONS * cell + 14, 330)]


def _select(sums: list[float]) -> list[str]:
    x, base, step = 345, 242, 16.5
    parts = _head(335, 2, "select", "Squares summed over the tokens;", "the best half of the neurons is kept.")
    parts.append(_text(x + NEURONS * step / 2, 80, "s² of each neuron", 12, SOFT, anchor="middle"))
    for neuron, value in enumerate(sums):
        height = 150 * value / max(sums)
        parts.append(
            f'<rect x="{x + neuron * step:.1f}" y="{base - height:.1f}" width="{step - 4}" height="{height:.1f}" rx="2" '
            f'fill="{KEPT if neuron in STRONG else DROPPED}"/>'
        )
    parts.append(f'<path d="M{x - 4} {base}H{x + NEURONS * step}" stroke="{SOFT}" stroke-width="1"/>')
    return [*parts, _arrow(x + NEURONS * step + 12, 590)]


def _prune() -> list[str]:
    x, y, width, row = 606, 90, 62, 12.6
    parts = _head(600, 3, "prune", "Their rows, gathered once", "into smaller matrices.")
    parts.append(_text(x + width / 2, y - 10, "F rows", 12, SOFT, anchor="middle"))
    small_x, small_y = x + 122, y + NEURONS * row / 4
    for neuron in range(NEURONS):
        kept = neuron in STRONG
        parts.append(
            f'<rect x="{x}" y="{y + neuron * row:.1f}" width="{width}" height="{row - 2}" rx="2" fill="{KEPT if kept else DROPPED}"/>'
        )
    for place, neuron in enumerate(STRONG):
        parts.append(
            f'<path d="M{x + width + 3} {y + neuron * row + 5:.1f}L{small_x - 4} {small_y + place * row + 5:.1f}" '
            f'stroke="{SOFT}" stroke-width="1" stroke-opacity="0.7"/>'
        )
        parts.append(
            f'<rect x="{small_x}" y="{small_y + place * row:.1f}" width="{width}" height="{row - 2}" rx="2" fill="{KEPT}"/>'
        )
    parts.append(_text(small_x + width / 2, small_y - 10, "k rows", 12, SOFT, anchor="middle"))
    parts.append(_text(x + 92, y + NEURONS * row + 20, "gate, up and down alike", 12, SOFT, anchor="middle"))
    return [*parts, _arrow(small_x + width + 12, 838)]


def _decode() -> list[str]:
    x, y = 850, 120
    parts = _head(846, 4, "decode", "One compiled loop writes", "the answer, token by token.")
    parts.append(f'<rect x="{x}" y="{y}" width="170" height="110" rx="10" fill="#f0fdfa" stroke="{KEPT}" stroke-width="1.5"/>')
    parts.append(_text(x + 85, y + 26, "pruned model", 14, weight="bold", anchor="middle"))
    for place, (name, width, fill) in enumerate((("attention", 128, LIGHT), ("feed-forward", 66, KEPT))):
        top = y + 40 + 32 * place
        parts.append(f'<rect x="{x + 85 - width / 2}" y="{top}" width="{width}" height="24" rx="4" fill="{fill}"/>')
        size = 12 if place == 0 else 10.5
        parts.append(_text(x + 85, top + 16, name, size, INK if place == 0 else "#ffffff", anchor="middle"))
    parts.append(
        f'<path d="M{x + 140} {y + 116}v26q0 10 -10 10h-90q-10 0 -10 -10v-24" stroke="{SOFT}" stroke-width="2" fill="none" '
        'marker-end="url(#tip)"/>'
    )
    parts.append(_text(x + 85, y + 144, "next token", 12, SOFT, anchor="middle"))
    parts.append(_text(x + 85, y - 10, "as large as before, but for the k rows", 11, SOFT, anchor="middle"))
    return parts


if __name__ == "__main__":
    main()
