"""When to stop a run that could go on: a signal, its deadline, too many errors, a lost lease.

In: what the driver sees of the replicas, once a second. Out: whether to stop, and why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from pipeline.budget import Budget
from pipeline.progress import Tally
from pipeline.roster import Snapshot

_SURE = 3.09
"""Standard deviations: one run in a thousand stops although its rate is just at the limit."""


class Reason(StrEnum):
    """Why a run was stopped."""

    SIGNAL = "signal"
    DEADLINE = "deadline"
    ERROR_RATE = "error_rate"
    LEASE_LOST = "lease_lost"


@dataclass(frozen=True, slots=True)
class Stop:
    """A decision to stop."""

    reason: Reason
    message: str
    until: float = math.inf
    """When the process has to have ended, by the monotonic clock."""


class Watch:
    """Decides once; the first reason counts."""

    def __init__(
        self,
        *,
        max_error_rate: float,
        min_rows: int,
        deadline: datetime | None,
        lease_lost: Callable[[], str | None],
        drain_s: float = math.inf,
        interrupted: Callable[[], tuple[str, float] | None] = lambda: None,
        show: Callable[[Snapshot], None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``show`` sees every snapshot; ``lease_lost`` says why the lease is gone, if it is, and
        ``interrupted`` which signal was heard, if one was, and by when that wants an end; all else
        leaves ``drain_s``."""
        self._max_error_rate = max_error_rate
        self._min_rows = min_rows
        self._deadline = deadline
        self._lease_lost = lease_lost
        self._show = show
        self._clock = clock
        self._drain_s = drain_s
        self._interrupted = interrupted
        self.stop: Stop | None = None

    def is_late(self) -> bool:
        """Whether the deadline has passed before anything was started."""
        if self.stop is None:
            self.stop = self._judge(Tally())
        return self.stop is not None

    def __call__(self, snapshot: Snapshot) -> Budget | None:
        """None, or what there is to stop the run."""
        self._show(snapshot)
        if self.stop is None:
            self.stop = self._judge(snapshot.tally)
        return None if self.stop is None else Budget(self.stop.until)

    def _judge(self, tally: Tally) -> Stop | None:
        until = time.monotonic() + self._drain_s
        lost = self._lease_lost()
        if lost is not None:
            return Stop(Reason.LEASE_LOST, lost, until)
        if (heard := self._interrupted()) is not None:
            name, by = heard
            return Stop(Reason.SIGNAL, f"stopped by {name}; the same command resumes", by)
        if self._deadline is not None and self._clock() >= self._deadline:
            message = f"limits.deadline {self._deadline.isoformat()} passed"
            return Stop(Reason.DEADLINE, message, until)
        if is_surely_above(tally.failed, tally.rows, self._max_error_rate, self._min_rows):
            return Stop(
                Reason.ERROR_RATE,
                f"{tally.failed} of the first {tally.rows} rows failed, with limits.max_error_rate "
                f"= {self._max_error_rate:g}: stopped early; find the cause (report.json counts "
                "errors by code), then the same command resumes",
                until,
            )
        return None


def is_surely_above(failed: int, ended: int, limit: float, min_rows: int) -> bool:
    """Whether the rate behind ``failed`` of ``ended`` rows is above ``limit`` beyond doubt.

    That is, whether the lower end of its Wilson score interval (E. B. Wilson, 1927) is. A few bad
    rows at the start of a good input must not end a night's run.
    """
    if ended < min_rows or failed <= limit * ended:
        return False  # the interval's end may round to above a rate that is at the limit
    rate, z2 = failed / ended, _SURE**2
    centre = rate + z2 / (2 * ended)
    spread = _SURE * math.sqrt(rate * (1 - rate) / ended + z2 / (4 * ended**2))
    return (centre - spread) / (1 + z2 / ended) > limit
