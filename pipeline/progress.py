"""Progress: what is counted of it, how fast it goes, and a display for people.

In: counts as replicas report them. Out: a live bar on a terminal, or one plain line per interval in
a log, with rows, tok/s, failed, ETA.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.records import Completion, Outcome, Status

log = logging.getLogger(__name__)

_LINE_INTERVAL_S = 10.0
_LATELY_S = 60.0
"""What ``Pace.lately`` looks back."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Outcomes known so far in this process's lifetime: committed or not."""

    rows: int = 0
    failed: int = 0
    """Of ``rows``, those of which a sample errored."""
    tokens: int = 0
    """Completion tokens."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    known_rows: int = 0
    """Of ``rows``, those that the journals of earlier attempts had."""
    known_tokens: int = 0
    """Of ``tokens``, likewise."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """Records by error code."""

    def __add__(self, other: Tally) -> Tally:
        return self._combined(other, 1)

    def __sub__(self, other: Tally) -> Tally:
        return self._combined(other, -1)

    def _combined(self, other: Tally, sign: int) -> Tally:
        return Tally(
            self.rows + sign * other.rows,
            self.failed + sign * other.failed,
            self.tokens + sign * other.tokens,
            self.prompt_tokens + sign * other.prompt_tokens,
            self.cached_tokens + sign * other.cached_tokens,
            self.image_tokens + sign * other.image_tokens,
            self.known_rows + sign * other.known_rows,
            self.known_tokens + sign * other.known_tokens,
            _combined_counts(self.errors, other.errors, sign),
        )


class RowTally:
    """Tallies of one shard's outcomes as they come. A row counts once all its samples ended."""

    def __init__(self, samples: Mapping[int, int]) -> None:
        """``samples`` has, for each row, how many outcomes it will have."""
        self._left = dict(samples)
        self._failed: set[int] = set()

    def count(self, outcomes: Sequence[Outcome], *, known: bool = False) -> Tally:
        """The tally of some more outcomes; ``known`` if a journal had them."""
        completed = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
        ended = self._ended_rows(outcomes)
        tokens = sum(outcome.completion_tokens for outcome in completed)
        return Tally(
            rows=len(ended),
            failed=len(self._failed.intersection(ended)),
            tokens=tokens,
            prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
            cached_tokens=sum(outcome.cached_tokens for outcome in completed),
            image_tokens=sum(outcome.image_tokens for outcome in outcomes),
            known_rows=len(ended) if known else 0,
            known_tokens=tokens if known else 0,
            errors=dict(Counter(str(o.code) for o in outcomes if o.code is not None)),
        )

    def _ended_rows(self, outcomes: Sequence[Outcome]) -> list[int]:
        ended = []
        for outcome in outcomes:
            row = outcome.input_row
            self._left[row] -= 1
            if not self._left[row]:
                ended.append(row)
            if outcome.status is Status.ERRORED:
                self._failed.add(row)
        return ended


def _combined_counts(one: Mapping[str, int], other: Mapping[str, int], sign: int) -> dict[str, int]:
    both = dict(one)
    for code, count in other.items():
        both[code] = both.get(code, 0) + sign * count
    return {code: count for code, count in both.items() if count}


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast it goes."""

    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0
    """Completion tokens."""


class Pace:
    """Rates of a tally that grows: lately, and since its first row. What was known before a start
    does not count as its work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        self._idle_until = clock()
        self._seen: deque[tuple[float, int, int]] = deque()
        """(moment, rows, tokens); all of the last minute, and the one before."""

    def note(self, tally: Tally) -> None:
        """The tally as it is now."""
        now = self._clock()
        rows, tokens = tally.rows - tally.known_rows, tally.tokens - tally.known_tokens
        if not rows:
            self._idle_until = now
        elif self._began is None:
            self._began = self._idle_until
        if self._began is None:
            self._seen.clear()
        self._seen.append((now, rows, tokens))
        while len(self._seen) > 1 and self._seen[1][0] <= now - _LATELY_S:
            self._seen.popleft()

    def lately(self) -> Rate:
        """Over the last minute, or since the first row."""
        return self._since(*self._seen[0]) if self._seen else Rate()

    def overall(self) -> Rate:
        """Since the first row."""
        return Rate() if self._began is None else self._since(self._began, 0, 0)

    def _since(self, then: float, rows_then: int, tokens_then: int) -> Rate:
        if not self._seen:
            return Rate()
        now, rows, tokens = self._seen[-1]
        elapsed = max(now - then, 1e-3)
        # a replica that was lost takes what it had not journaled with it
        grown = max(0, rows - rows_then), max(0, tokens - tokens_then)
        return Rate(*(round(count / elapsed, 3) for count in grown))


class ProgressDisplay:
    """Shows ``Tally`` updates; a context manager."""

    def __init__(self, *, total: int, done: int) -> None:
        """``total`` rows in the run, ``done`` of them before this start."""
        self._total = total
        self._done = done
        self._pace = Pace()
        self._next_line = 0.0
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = (
            self._bar.add_task("rows", total=total, completed=done, detail="starting engines")
            if self._bar
            else None
        )

    def __enter__(self) -> ProgressDisplay:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(
        self, tally: Tally, *, running: int = 0, restarts: int = 0, lacking: str | None = None
    ) -> None:
        """Show ``tally``; plain lines come at most every 10 s, and start with the first call.

        ``running`` counts replicas whose engine is up, ``restarts`` engines and replicas that were
        started again; ``lacking`` tells what replicas without a place wait for.
        """
        now = time.monotonic()
        self._pace.note(tally)
        detail = self._detail(tally, running) + (f"  restarts {restarts}" if restarts else "")
        detail += f"  {lacking}" if lacking else ""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done + tally.rows, detail=detail)
        elif now >= self._next_line:
            self._next_line = now + _LINE_INTERVAL_S
            log.info("rows %d/%d  %s", self._done + tally.rows, self._total, detail)

    def _detail(self, tally: Tally, running: int) -> str:
        rate = self._pace.overall()
        if not rate.rows_per_s:
            return "no row is through yet" if running else "starting engines"
        left = self._total - self._done - tally.rows
        eta = duration(left / rate.rows_per_s)
        return f"{rate.tokens_per_s:.0f} tok/s  failed {tally.failed}  ETA {eta}"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def duration(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
