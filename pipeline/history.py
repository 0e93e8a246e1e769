"""history: parts' stats -> what happened when: pace, pauses, replicas, starts.

In: stats of parts, one by one, of any number of starts. Out: a run's throughput in a bounded number
of bins, and what is known of each replica and start. Times are those of the machines that took
them; between machines they are as good as their clocks.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.pace import Pace, PaceSum

if TYPE_CHECKING:
    from pipeline.commit import Attempt, PartStats

MOST_BINS = 200
"""Of the whole run's throughput."""
MOST_STRETCHES = 50
"""Of one replica, or of the run: shorter interruptions are left out beyond that."""
PAUSE_S = 60.0
"""Time without an open shard that counts as a pause; less is what a restart takes."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time without a pause, in seconds since 1970."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class PaceStretch:
    """Throughput without a pause; bin i starts ``i * bin_s`` after ``start``."""

    start: int
    """Seconds since 1970."""
    rows: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Throughput:
    """When rows were finished, over the whole run."""

    bin_s: int
    stretches: tuple[PaceStretch, ...]

    @property
    def rows(self) -> int:
        """Rows whose time is known."""
        return sum(sum(stretch.rows) for stretch in self.stretches)


class Stretches:
    """Joins stretches as they come, in any order, where less than a pause lies between."""

    def __init__(self) -> None:
        self._joined: list[Stretch] = []

    def __iter__(self) -> Iterator[Stretch]:
        """In order of time."""
        return iter(self._joined)

    def add(self, new: Stretch) -> None:
        """Add one; it may close the gap between others."""
        known = self._joined
        low = bisect_right(known, new.start - PAUSE_S, key=lambda stretch: stretch.end)
        high = bisect_left(known, new.end + PAUSE_S, key=lambda stretch: stretch.start)
        near = [new, *known[low:high]]
        start, end = min(each.start for each in near), max(each.end for each in near)
        known[low:high] = [Stretch(start, end)]


@dataclass(slots=True)
class ReplicaHistory:
    """What one replica committed."""

    name: str
    nodes: set[str] = field(default_factory=set)
    parts: int = 0
    rows: int = 0
    """Rows of its parts that it made itself."""
    tokens: int = 0
    """Completion tokens of those."""
    engine_restarts: dict[str, int] = field(default_factory=dict)
    """By process; more than one: the replica was started again."""
    cold_starts_s: dict[str, float] = field(default_factory=dict)
    """By process, seconds until its engine was up; those that recorded it."""
    _open: Stretches = field(default_factory=Stretches)

    def add(self, part: PartStats, attempt: Attempt, opened: Stretch) -> None:
        """Add a part of its own, which was open for a time."""
        self.nodes.add(attempt.node)
        self.parts += 1
        self.rows += part.generated_rows
        self.tokens += part.made_tokens
        restarts = self.engine_restarts.get(attempt.process, 0)
        self.engine_restarts[attempt.process] = max(restarts, attempt.engine_restarts)
        if attempt.cold_start_s:
            self.cold_starts_s[attempt.process] = attempt.cold_start_s
        self._open.add(opened)

    def stretches(self) -> tuple[Stretch, ...]:
        """When it had shards open that it committed, as far as that can be told apart."""
        return _few(self._open)


@dataclass(slots=True)
class StartHistory:
    """What one start of the driver committed."""

    start: float
    end: float = 0.0
    """Its last commit."""
    first_open: float = 0.0
    """When its first shard came to a replica: engines were up."""
    parts: int = 0
    rows: int = 0
    replicas: set[str] = field(default_factory=set)

    def add(self, part: PartStats, attempt: Attempt) -> None:
        """Add a part of its own."""
        self.first_open = min(self.first_open or attempt.opened, attempt.opened)
        self.end = max(self.end, part.committed_at)
        self.parts += 1
        self.rows += part.generated_rows
        self.replicas.add(attempt.replica)


class History:
    """What the parts of a run say of its course."""

    def __init__(self, parts: Iterable[PartStats] = ()) -> None:
        self._pace = PaceSum()
        self._replicas: dict[str, ReplicaHistory] = {}
        self._starts: dict[float, StartHistory] = {}
        self._open = Stretches()
        for part in parts:
            self.add(part)

    def add(self, part: PartStats) -> None:
        """Add one part."""
        self._pace.add(part.pace)
        attempt = part.attempt
        if attempt is None:
            return
        opened = Stretch(attempt.opened, max(attempt.opened, part.committed_at))
        self._open.add(opened)
        name = attempt.replica
        self._replicas.setdefault(name, ReplicaHistory(name)).add(part, attempt, opened)
        self._starts.setdefault(attempt.start, StartHistory(attempt.start)).add(part, attempt)

    def starts(self) -> list[StartHistory]:
        """Starts that committed something, in order."""
        return [self._starts[start] for start in sorted(self._starts)]

    def active_s(self) -> float:
        """Seconds that drivers were at work, all starts together, each until its last commit."""
        return sum(max(0.0, start.end - start.start) for start in self.starts())

    def replicas(self) -> list[ReplicaHistory]:
        """Replicas that committed something, by when they began."""
        return sorted(self._replicas.values(), key=lambda r: (r.stretches()[0].start, r.name))

    def throughput(self) -> Throughput:
        """Rows and tokens over time, without the pauses, in at most ``MOST_BINS`` bins."""
        opened = list(self._open)
        pace = self._pace.total()
        while sum(map(len, spans := _spans(pace, opened))) > MOST_BINS:
            pace = self._pace.total(2 * pace.bin_s)
        counts = {number: (rows, tokens) for number, rows, tokens in pace.bins()}
        stretches = [
            PaceStretch(
                start=span.start * pace.bin_s,
                rows=tuple(counts.get(number, (0, 0))[0] for number in span),
                tokens=tuple(counts.get(number, (0, 0))[1] for number in span),
            )
            for span in spans
        ]
        return Throughput(pace.bin_s, tuple(stretches))


def _spans(pace: Pace, opened: Iterable[Stretch]) -> list[range]:
    """The bins of each stretch, those without a finished row included."""
    width = pace.bin_s
    filled = [Stretch(n * width, (n + 1) * width) for n, _, _ in pace.bins()]
    spans: list[range] = []
    for stretch in _joined([*opened, *filled], max(PAUSE_S, width)):
        first, last = int(stretch.start // width), math.ceil(stretch.end / width)
        if spans and first <= spans[-1].stop:
            spans[-1] = range(spans[-1].start, max(last, spans[-1].stop))
        else:
            spans.append(range(first, max(last, first + 1)))
    return spans


def _few(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """Join them further, across longer and longer gaps, until there are few."""
    gap = PAUSE_S
    joined = list(stretches)
    while len(joined) > MOST_STRETCHES:
        gap *= 2
        joined = list(_joined(joined, gap))
    return tuple(joined)


def _joined(stretches: Iterable[Stretch], gap: float) -> Iterator[Stretch]:
    """In order, those less than ``gap`` seconds apart as one."""
    current: Stretch | None = None
    for stretch in sorted(stretches, key=lambda stretch: stretch.start):
        if current is None:
            current = stretch
        elif stretch.start - current.end < gap:
            current = Stretch(current.start, max(current.end, stretch.end))
        else:
            yield current
            current = stretch
    if current is not None:
        yield current
