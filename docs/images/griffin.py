"""Draws griffin.svg, the picture of how GRIFFIN works: `python docs/images/griffin.py`."""

from __future__ import annotations

import random
from pathlib import Path

TOKENS, NEURONS = 8, 12
STRONG = {1: 0.95, 2: 0.6, 5: 0.8, 6: 0.55, 8: 0.9, 11: 0.7}
"""Neurons of the drawing that take part in most tokens: half of all."""
INK, SOFT, LIGHT, KEPT, DROPPED = "#1f2937", "#6b7280", "#e5e7eb", "#0f766e", "#cbd5e1"
LINE = f'stroke="{SOFT}" stroke-width="2" fill="none" marker-end="url(#tip)"'


def main() -> None:
    """Write the file next to this one."""
    chance = random.Random(4)
    columns = [[_strength(neuron, chance) for _ in range(TOKENS)] for neuron in range(NEURONS)]
    sums = [sum(value * value for value in column) for column in columns]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1060 370" font-family="Helvetica, Arial, sans-serif">',
        '<rect width="1060" height="370" rx="14" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{SOFT}"/></marker></defs>',
        *_prefill(columns),
        *_select(sums),
        *_prune(),
        *_decode(),
        "</svg>",
    ]
    Path(__file__).with_name("griffin.svg").write_text("\n".join(parts) + "\n")


def _strength(neuron: int, chance: random.Random) -> float:
    usual = STRONG.get(neuron, 0.12)
    return min(1.0, max(0.03, usual + chance.uniform(-0.18, 0.18)))


def _rect(x: float, y: float, width: float, height: float, fill: str, more: str = 'rx="2"') -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {more}/>'


def _text(x: float, y: float, text: str, size: float, fill: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" {more}>{text}</text>'


def _centred(x: float, y: float, text: str, size: float = 12, fill: str = SOFT, weight: str = "normal") -> str:
    return _text(x, y, text, size, fill, f'text-anchor="middle" font-weight="{weight}"')


def _arrow(x: float, to: float) -> str:
    return f'<path d="M{x:g} 175H{to:g}" {LINE}/>'


def _head(x: int, number: int, name: str, *lines: str) -> list[str]:
    return [
        f'<circle cx="{x + 11}" cy="35" r="11" fill="{KEPT}"/>',
        _centred(x + 11, 39.5, str(number), 13, "#ffffff", "bold"),
        _text(x + 30, 40, name, 17, more='font-weight="bold"'),
        *(_text(x, 318 + 18 * row, line, 13, SOFT) for row, line in enumerate(lines)),
    ]


def _prefill(columns: list[list[float]]) -> list[str]:
    x, y, cell = 52, 90, 19
    middle, bottom = x + NEURONS * cell / 2, y + TOKENS * cell
    turned = f'transform="translate({x - 10} {y + TOKENS * cell / 2}) rotate(-90)" text-anchor="middle"'
    return [
        *_head(30, 1, "prefill", "The full model reads the prompt, exactly.", "z/||z|| of every token and neuron."),
        _centred(middle, y - 10, "neurons"),
        _text(0, 0, "tokens of the prompt", 12, SOFT, turned),
        *(
            _rect(
                x + neuron * cell, y + token * cell, cell - 1.5, cell - 1.5, KEPT, f'rx="2" fill-opacity="{value:.2f}"'
            )
            for neuron, column in enumerate(columns)
            for token, value in enumerate(column)
        ),
        _centred(middle, bottom + 20, "some neurons are strong in most tokens"),
        _arrow(x + NEURONS * cell + 14, 330),
    ]


def _select(sums: list[float]) -> list[str]:
    x, base, step = 345, 242, 16.5
    heights = [round(150 * value / max(sums), 1) for value in sums]
    return [
        *_head(335, 2, "select", "Squares summed over the tokens;", "the best half of the neurons is kept."),
        _centred(x + NEURONS * step / 2, 80, "s² of each neuron"),
        *(
            _rect(x + neuron * step, base - height, step - 4, height, KEPT if neuron in STRONG else DROPPED)
            for neuron, height in enumerate(heights)
        ),
        f'<path d="M{x - 4} {base}H{x + NEURONS * step}" stroke="{SOFT}" stroke-width="1"/>',
        _arrow(x + NEURONS * step + 12, 590),
    ]


def _prune() -> list[str]:
    x, y, width, row = 606, 90, 62, 12.6
    small_x, small_y = x + 122, y + NEURONS * row / 4
    parts = [
        *_head(600, 3, "prune", "Their rows, gathered once", "into smaller matrices."),
        _centred(x + width / 2, y - 10, "F rows"),
        _centred(small_x + width / 2, small_y - 10, "k rows"),
        _centred(x + 92, y + NEURONS * row + 20, "gate, up and down alike"),
    ]
    for neuron in range(NEURONS):
        parts.append(_rect(x, y + neuron * row, width, row - 2, KEPT if neuron in STRONG else DROPPED))
    for place, neuron in enumerate(STRONG):
        start, end = y + neuron * row + 5, small_y + place * row + 5
        parts.append(
            f'<path d="M{x + width + 3} {start:g}L{small_x - 4} {end:g}" stroke="{SOFT}" stroke-opacity="0.7"/>'
        )
        parts.append(_rect(small_x, small_y + place * row, width, row - 2, KEPT))
    return [*parts, _arrow(small_x + width + 12, 838)]


def _decode() -> list[str]:
    x, y = 850, 120
    middle = x + 85
    return [
        *_head(846, 4, "decode", "One compiled loop writes", "the answer, token by token."),
        _centred(middle, y - 10, "as large as before, but for the k rows", 11),
        _rect(x, y, 170, 110, "#f0fdfa", f'rx="10" stroke="{KEPT}" stroke-width="1.5"'),
        _centred(middle, y + 26, "pruned model", 14, INK, "bold"),
        _rect(middle - 64, y + 40, 128, 24, LIGHT, 'rx="4"'),
        _centred(middle, y + 56, "attention", 12, INK),
        _rect(middle - 36, y + 72, 72, 24, KEPT, 'rx="4"'),
        _centred(middle, y + 88, "feed-forward", 10.5, "#ffffff"),
        f'<path d="M{x + 140} {y + 116}v26q0 10 -10 10h-90q-10 0 -10 -10v-24" {LINE}/>',
        _centred(middle, y + 144, "next token"),
    ]


if __name__ == "__main__":
    main()
