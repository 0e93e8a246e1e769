"""What can be said of a run from outside: the nouns of ``jobs.status``.

In: what ``observe`` found in a run folder. Out: a ``RunView``, with what follows from it: rows and
time left, error rate, JSON. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from pipeline.lease import LeaseView
from pipeline.live import Progress, Start
from pipeline.records import Status

_TOKEN_KINDS = ("prompt", "completion", "cached", "image")


class State(StrEnum):
    """How a run stands."""

    COMPLETE = "complete"
    OVER_ERROR_RATE = "over_error_rate"
    """Finished, or stopped early, above ``limits.max_error_rate``."""
    STARTING = "starting"
    """A driver has it, no replica runs yet."""
    RUNNING = "running"
    DRAINING = "draining"
    """Its driver is stopping it."""
    DEAD = "dead"
    """It has a driver that gives no sign of life: killed, or cut off. The same command resumes."""
    INTERRUPTED = "interrupted"
    """Not finished, and no driver has it. The same command resumes."""
    FAILED = "failed"
    EMPTY = "empty"
    """Nothing was planned yet: a start was cut short before that."""
    UNREADABLE = "unreadable"
    """Its objects are damaged, or cannot be read."""
    GONE = "gone"
    """Its folder is not there any more; the index remembers it."""

    @property
    def live(self) -> bool:
        """Whether a driver is at work."""
        return self in (State.STARTING, State.RUNNING, State.DRAINING)


@dataclass(frozen=True)
class RunView:
    """One run, as somebody from outside sees it."""

    uri: str
    state: State
    name: str = ""
    """The config's."""
    profile: str = ""
    model: str = ""
    rows_total: int = 0
    rows_committed: int = 0
    """Rows of the parts that are there."""
    rows_open: int = 0
    """Rows that ended, by the driver's word, in shards that have no part yet."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """By state."""
    parts: tuple[int, int] | None = None
    """Parts that are there, and shards; None if nobody counted."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    """Records by error code."""
    progress: Progress | None = None
    """The driver's last word, if it is of this run."""
    progress_age_s: float | None = None
    lease: LeaseView | None = None
    starts: tuple[Start, ...] = ()
    starts_count: int = 0
    began_at: str = ""
    seconds: float = 0.0
    """All starts together."""
    exit_code: int | None = None
    """Of the last start."""
    error: str | None = None
    """Why the last start ended, or what is wrong with the folder."""

    @property
    def rows_done(self) -> int:
        """Rows that ended."""
        return self.rows_committed + self.rows_open

    @property
    def rows_left(self) -> int:
        """Rows that have not ended."""
        return max(0, self.rows_total - self.rows_done)

    @property
    def error_rate(self) -> float:
        """Errored rows of those counted by state, 0 to 1."""
        ended = sum(self.rows.values())
        return self.rows.get(Status.ERRORED, 0) / ended if ended else 0.0

    @property
    def tokens_left(self) -> dict[str, int] | None:
        """What the rows left would take if they are like those before; None if none ended."""
        ended = sum(self.rows.values())
        if not ended:
            return None
        kinds = ("prompt", "completion")
        return {kind: round(self.tokens.get(kind, 0) / ended * self.rows_left) for kind in kinds}

    @property
    def eta_s(self) -> float | None:
        """Seconds until the rows left are done, at the rate of the last minute, else of this start;
        None unless it runs and has a rate."""
        if self.state is not State.RUNNING or self.progress is None:
            return None
        rate = self.progress.lately.rows_per_s or self.progress.overall.rows_per_s
        return self.rows_left / rate if rate else None

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        progress = self.progress
        return {
            **self.summary(),
            "name": self.name,
            "profile": self.profile,
            "model": self.model,
            "tokens_left_estimate": self.tokens_left,
            "parts": self.parts and {"committed": self.parts[0], "total": self.parts[1]},
            "rate_lately": progress and asdict(progress.lately),
            "rate_overall": progress and asdict(progress.overall),
            "replicas": progress and progress.replicas.model_dump(mode="json"),
            "progress_age_s": _rounded(self.progress_age_s),
            "parts_not_counted": progress.parts_not_counted if progress else 0,
            "lease": self.lease
            and {
                "lives": self.lease.lives,
                "age_s": _rounded(self.lease.age_s),
                **self.lease.record.model_dump(mode="json"),
            },
            "starts_known": [start.model_dump(mode="json") for start in self.starts],
        }

    def summary(self) -> dict[str, Any]:
        """What one line holds; ``rows`` and ``tokens`` as in every job's last line."""
        return {
            "run": self.uri,
            "status": self.state,
            "rows": {
                "total": self.rows_total,
                **{str(status): self.rows.get(status, 0) for status in Status},
            },
            "rows_done": self.rows_done,
            "rows_committed": self.rows_committed,
            "rows_left": self.rows_left,
            "tokens": {kind: self.tokens.get(kind, 0) for kind in _TOKEN_KINDS},
            "errors": dict(self.errors),
            "error_rate": round(self.error_rate, 6),
            "eta_s": _rounded(self.eta_s),
            "began_at": self.began_at,
            "seconds": round(self.seconds, 3),
            "starts": self.starts_count,
            "run_exit_code": self.exit_code,
            "run_error": self.error,
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
