"""pace: when rows were finished, as counts per bin of wall-clock time.

In: outcomes with their times. Out: a ``Pace`` of few bins for a part's footer, and the sum of many.
A bin is a power of two seconds wide and starts at a multiple of that since 1970, so two paces add
up exactly at the width of the wider one. Only bins that hold something are kept: a shard that one
start began and another finished days later has as fine bins as any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.records import Completion, Outcome

MOST_BINS = 64
"""Of one part: enough for a run that is one long shard, and some 1 kB in its footer."""
_SUM_BINS = 8192
"""Of a sum: 2 hours by the second, 5 days by the minute."""
_Bins = dict[int, list[int]]
"""Number of the bin -> [rows, completion tokens]."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Rows and completion tokens by when they were finished; bins in order of time."""

    bin_s: int = 1
    """Width of a bin in seconds, a power of two."""
    first: int = 0
    """Number n of the first bin, which starts n * bin_s seconds after 1970."""
    offsets: tuple[int, ...] = ()
    """Each bin's number, less the first one's."""
    rows: tuple[int, ...] = ()
    """Rows by their first sample."""
    tokens: tuple[int, ...] = ()
    """Completion tokens of all samples."""

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], most_bins: int = MOST_BINS) -> Pace:
        """The pace of those outcomes whose time is known, in at most ``most_bins`` bins."""
        bins: _Bins = {}
        for outcome in outcomes:
            if outcome.finished_at is not None:
                counts = bins.setdefault(int(outcome.finished_at), [0, 0])
                counts[0] += outcome.sample_index == 0
                if isinstance(outcome, Completion):
                    counts[1] += outcome.completion_tokens
        return _pace(*_narrowed(1, bins, most_bins))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Pace:
        """From its fields, as JSON has them."""
        lists = {name: tuple(document[name]) for name in ("offsets", "rows", "tokens")}
        return cls(document["bin_s"], document["first"], **lists)

    def bins(self) -> Iterator[tuple[int, int, int]]:
        """(number, rows, tokens) of each bin."""
        for offset, rows, tokens in zip(self.offsets, self.rows, self.tokens, strict=True):
            yield self.first + offset, rows, tokens


class PaceSum:
    """The sum of many paces, in bounded memory."""

    def __init__(self) -> None:
        self._bin_s = 1
        self._bins: _Bins = {}

    def add(self, pace: Pace) -> None:
        """Add one."""
        if pace.bin_s > self._bin_s:
            self._bin_s, self._bins = pace.bin_s, _widened(self._bins, pace.bin_s // self._bin_s)
        step = self._bin_s // pace.bin_s
        for number, rows, tokens in pace.bins():
            counts = self._bins.setdefault(number // step, [0, 0])
            counts[0] += rows
            counts[1] += tokens
        if len(self._bins) > _SUM_BINS:
            self._bin_s, self._bins = _narrowed(self._bin_s, self._bins, _SUM_BINS // 2)

    def total(self, bin_s: int = 1) -> Pace:
        """The sum, in bins of ``bin_s`` seconds, or wider ones if some part has only those."""
        step = max(1, bin_s // self._bin_s)
        return _pace(self._bin_s * step, _widened(self._bins, step))


def _narrowed(bin_s: int, bins: _Bins, most: int) -> tuple[int, _Bins]:
    """As wide bins as it takes to have at most ``most``."""
    while len(bins) > most:
        bin_s, bins = 2 * bin_s, _widened(bins, 2)
    return bin_s, bins


def _widened(bins: _Bins, step: int) -> _Bins:
    wide: _Bins = {}
    for number, (rows, tokens) in bins.items():
        counts = wide.setdefault(number // step, [0, 0])
        counts[0] += rows
        counts[1] += tokens
    return wide


def _pace(bin_s: int, bins: _Bins) -> Pace:
    numbers = sorted(bins)
    first = numbers[0] if numbers else 0
    return Pace(
        bin_s,
        first,
        tuple(number - first for number in numbers),
        tuple(bins[number][0] for number in numbers),
        tuple(bins[number][1] for number in numbers),
    )
