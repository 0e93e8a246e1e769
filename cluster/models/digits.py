"""Real handwritten digits as small images.

In: scikit-learn's `load_digits`, 1,797 scans of 8 x 8 pixels with 17 grey levels. Out: RGB
images one tile high: a single digit, or a row of digits one tile each.

One fixed split: `TRAIN` is what mini-Maverick learns from, `HELD_OUT` is what measurements and
the sample input use, so that the model has never seen a digit it is asked about. The functions
are pure; the same indices give the same pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from cluster.models.mini_maverick import TILE_PX

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TRAIN_SIZE: Final = 1400
SPLIT_SEED: Final = 4
"""Of the permutation that decides the split; another seed is another model."""
INK_LEVELS: Final = 16
"""scikit-learn's grey levels run from 0 (paper) to 16 (ink)."""
MARGIN_PX: Final = 4
"""Paper on each side of a digit."""


class Split(Enum):
    """Which part of the digits: to learn from, or never seen in training."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Digit:
    """One handwritten digit: its position in scikit-learn's set, its 8 x 8 ink and its value."""

    index: int
    ink: "npt.NDArray[np.float64]"
    value: int


@cache
def digits(split: Split) -> tuple[Digit, ...]:
    """The digits of one part, 1,400 to train on or 397 held out, in a fixed random order."""
    import numpy as np
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    # The legacy generator is the one whose stream NumPy promises never to change.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(data.target))
    chosen = order[:TRAIN_SIZE] if split is Split.TRAIN else order[TRAIN_SIZE:]
    return tuple(Digit(int(i), data.images[i], int(data.target[i])) for i in chosen)


def render(digit: Digit) -> Image.Image:
    """Dark ink on white paper, one tile of 56 x 56 pixels, RGB."""
    import numpy as np

    paper = np.round(255 - digit.ink * (255 / INK_LEVELS)).astype(np.uint8)
    side = TILE_PX - 2 * MARGIN_PX
    scan = Image.fromarray(paper).resize((side, side), Image.Resampling.BICUBIC)
    tile = Image.new("L", (TILE_PX, TILE_PX), 255)
    tile.paste(scan, (MARGIN_PX, MARGIN_PX))
    return tile.convert("RGB")


def row(tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles side by side: 56 pixels high, 56 k wide, which Llama 4 cuts into k tiles again."""
    strip = Image.new("RGB", (TILE_PX * len(tiles), TILE_PX), (255, 255, 255))
    for i, tile in enumerate(tiles):
        strip.paste(tile, (i * TILE_PX, 0))
    return strip
