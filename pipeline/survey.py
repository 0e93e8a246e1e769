"""Which rows of an input to look at, and what they say of the whole, with its uncertainty.

In: the shards of a plan, then ``ShardCounts`` of the picked ones. Out: totals for the whole input.
Of a sample, shards are picked evenly by rows (a large one more than once), and rows evenly within:
each row is as likely as another, the same rows every time. Totals are Hansen & Hurwitz's estimator
(1943): rows of the input times the mean over picks of each pick's mean per row; the spread of those
means gives the standard error. Memory does not grow with the input, beyond its list of shards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.count import Example, ShardCounts
from pipeline.lengths import Z95, Kind, OutputModel, Range
from pipeline.plan import Shard

_ROWS_A_PICK = 64
"""Rows looked at in a picked shard. A shard is read whole for them, which is cheap; preparing rows
and fetching their images is not."""
_LEAST_PICKS = 32
"""Below that many means per row, their spread tells little."""
_RULE_OF_THREE = 3.0
"""No case among n rows: with 95 % confidence at most 3/n of all are such (Hanley, 1983)."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A shard to look into."""

    shard: Shard
    rows: int
    """How many of its rows."""
    picks: int = 1
    """How often it was picked."""


def pick_all(shards: Sequence[Shard]) -> list[Pick]:
    """Every row."""
    return [Pick(shard, shard.rows) for shard in shards if shard.rows]


def pick_evenly(shards: Sequence[Shard], rows: int) -> list[Pick]:
    """About ``rows`` rows, spread over the whole input; the same ones every time.

    Args:
        shards: those of the plan, in its order.
        rows: how many rows to look at, at least 1; if that is all there are, every row.
    """
    ends = np.cumsum([shard.rows for shard in shards])
    total = int(ends[-1]) if len(ends) else 0
    if rows >= total:
        return pick_all(shards)
    in_a_pick = min(_ROWS_A_PICK, max(1, total // len(shards)))
    count = min(rows, max(_LEAST_PICKS, -(-rows // in_a_pick)))
    places = ((np.arange(count) + 0.5) * total / count).astype(np.int64)
    chosen = Counter(np.searchsorted(ends, places, side="right").tolist())
    each = -(-rows // count)
    return [
        Pick(shards[number], min(shards[number].rows, each * picks), picks)
        for number, picks in chosen.items()
    ]


@dataclass(slots=True)
class _Sum:
    """A quantity over the whole input."""

    total: float = 0.0
    """Picks' values scaled up."""
    mean_squares: float = 0.0
    """Sum over picks of (mean per row) squared."""


class Survey:
    """Adds up what picked shards hold, in any order."""

    def __init__(self, picks: Sequence[Pick], rows: int, output: OutputModel) -> None:
        """``rows`` is the whole input's; ``output`` says how long completions will be."""
        self._picks = {pick.shard.index: pick for pick in picks}
        self._count = sum(pick.picks for pick in picks)
        self._looked_at = sum(pick.rows for pick in picks)
        self._output = output
        self._sums: dict[str, _Sum] = {}
        self._cells: dict[tuple[Kind, int], float] = {}
        self.rows = rows
        self.seen_rows = 0
        self.seen_bad = 0
        self.errors: dict[str, float] = {}
        self.examples: dict[str, Example] = {}

    @property
    def exact(self) -> bool:
        """Whether every row is looked at."""
        return self._looked_at == self.rows

    def add(self, counts: ShardCounts) -> None:
        """Take in one picked shard; each comes once."""
        pick = self._picks[counts.shard]
        scale = self._scale(pick, counts)
        self.seen_rows += counts.rows
        self.seen_bad += counts.bad
        for cell, samples in counts.cells.items():
            self._cells[cell] = self._cells.get(cell, 0.0) + samples * scale
        for code, rows in counts.errors.items():
            self.errors[code] = self.errors.get(code, 0.0) + rows * scale
        self.examples = {**counts.examples, **self.examples}
        expected = sum(n * self._output.mean(*cell) for cell, n in counts.cells.items())
        values = {**counts.tokens, "bad": counts.bad, "completion": expected}
        values |= {"samples": counts.samples, "images": counts.images}
        for name, value in values.items():
            found = self._sums.setdefault(name, _Sum())
            found.total += value * scale
            found.mean_squares += pick.picks * (value / counts.rows) ** 2

    def total(self, name: str) -> Range:
        """A quantity's total over the whole input: a key of ``ShardCounts.tokens``, samples,
        images or bad (rows)."""
        value = self._sums[name].total if name in self._sums else 0.0
        spread = Z95 * self._error(name)
        high = value + spread
        if name == "bad":
            if value == 0 and not self.exact:
                high = self.rows * min(1.0, _RULE_OF_THREE / self.seen_rows)
            high = min(high, float(self.rows))
        return Range(value, max(0.0, value - spread), high)

    def completion(self) -> Range:
        """Expected completion tokens of the whole input."""
        return self._output.total(self._cells, self.total("most").value, self._error("completion"))

    def _scale(self, pick: Pick, counts: ShardCounts) -> float:
        """Rows of the input that each row of a shard stands for."""
        if self.exact:
            return 1.0
        return self.rows / self._count * pick.picks / counts.rows

    def _error(self, name: str) -> float:
        """Standard error of a total."""
        found = self._sums.get(name)
        if self.exact or found is None or self._count < 2 or not self.rows:
            return 0.0
        mean = found.total / self.rows
        variance = max(0.0, found.mean_squares - self._count * mean**2) / (self._count - 1)
        unseen = 1 - self.seen_rows / self.rows
        return self.rows * math.sqrt(variance / self._count * unseen)
