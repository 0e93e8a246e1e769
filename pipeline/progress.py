"""Progress for people: a live bar on a terminal, one plain line per interval in a log.

In: counts as replicas report them. Out: lines or a bar on stderr with rows, tok/s, failed, ETA.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)

_LINE_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Tally:
    """Outcomes known so far in this process's lifetime: committed or not."""

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    """Completion tokens."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.rows + other.rows, self.failed + other.failed, self.tokens + other.tokens)

    def __sub__(self, other: Tally) -> Tally:
        return Tally(self.rows - other.rows, self.failed - other.failed, self.tokens - other.tokens)


class ProgressDisplay:
    """Shows ``Tally`` updates; a context manager."""

    def __init__(self, *, total: int, done: int) -> None:
        """``total`` rows in the run, ``done`` of them before this start."""
        self._total = total
        self._done = done
        self._started: float | None = None
        self._idle_until = time.monotonic()
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

    def update(self, tally: Tally, restarts: int = 0) -> None:
        """Show ``tally``; plain lines come at most every 10 s, and start with the first row.

        ``restarts`` counts engines and replicas that were started again.
        """
        now = time.monotonic()
        if tally.rows and self._started is None:
            self._started = self._idle_until
        if not tally.rows:
            self._idle_until = now
        detail = self._detail(tally, now) + (f"  restarts {restarts}" if restarts else "")
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done + tally.rows, detail=detail)
        elif now >= self._next_line:
            self._next_line = now + _LINE_INTERVAL_S
            log.info("rows %d/%d  %s", self._done + tally.rows, self._total, detail)

    def _detail(self, tally: Tally, now: float) -> str:
        if self._started is None or not tally.rows:
            return "starting engines"
        elapsed = max(now - self._started, 1e-3)
        left = self._total - self._done - tally.rows
        eta = left * elapsed / tally.rows
        return f"{tally.tokens / elapsed:.0f} tok/s  failed {tally.failed}  ETA {_clock(eta)}"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
