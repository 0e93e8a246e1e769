"""How tokens spread over a layer's experts, as geometry: counts -> shapes of a few shades.

Drawn as one SVG row per layer, one unit wide per expert. Cells of the same shade are one path, so
that a row of 128 experts takes one to two kB of page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHADES_PER_MEAN = 4
FULL = 3
"""Times the layer's mean from which on a cell has the darkest shade."""


@dataclass(frozen=True, slots=True)
class Shade:
    """All cells of a row with about the same load."""

    opacity: float
    path: str
    """Of an SVG path, a square of 1 x 1 for each cell."""


def heat_row(counts: Sequence[int]) -> list[Shade]:
    """One layer's experts, the lightest shade first; unused experts are left out."""
    mean = sum(counts) / len(counts)
    cells: dict[int, list[int]] = {}
    for expert, count in enumerate(counts):
        if count:
            level = min(FULL * _SHADES_PER_MEAN, round(_SHADES_PER_MEAN * count / mean))
            cells.setdefault(max(1, level), []).append(expert)
    return [
        Shade(
            round(level / (FULL * _SHADES_PER_MEAN), 3),
            "".join(f"M{expert} 0h1v1h-1z" for expert in cells[level]),
        )
        for level in sorted(cells)
    ]
