"""What a run's driver tells of it while it goes on: ``_progress.json``, and its index entry.

In: what the driver sees of its replicas, once a second. Out: one small object in the run folder,
written every ``INTERVAL_S`` and at the end of a start, by a thread of its own: a store that is away
costs the run nothing but the news. Whoever reads it has the lease to tell whether its writer lives.

The object also keeps the earlier starts of the run. Times in it are its writers', for people.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import __version__, storage
from pipeline.budget import Budget
from pipeline.errors import ExitCode, PipelineError, StorageError, UsageError
from pipeline.index import IndexEntry, index_uri
from pipeline.progress import Pace, Rate, Tally
from pipeline.records import Status
from pipeline.redact import redacted
from pipeline.report import Result, RunStatus, Totals
from pipeline.roster import Snapshot
from pipeline.run_metrics import RunMetrics

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
_PATIENCE_S = 5.0
"""What one write may take; the next interval tries again."""
_LAST_WORDS_S = 5.0
"""What the end of a start waits for its last write: after a signal, the run has to be gone soon."""
_KEPT_STARTS = 100
"""Earlier starts that are told, the last ones: a run in a crash loop must not grow its object."""


class Phase(StrEnum):
    """What a start is doing."""

    STARTING = "starting"
    """Engines are; no replica runs yet."""
    RUNNING = "running"
    DRAINING = "draining"
    """Nothing more is admitted; what is finished is being kept."""
    ENDED = "ended"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class Start(_Document):
    """One start of a run."""

    number: int
    """From 1."""
    owner: str
    """Its lease's, a UUID."""
    host: str
    pid: int
    version: str
    """Of this program."""
    began_at: str
    ended_at: str | None = None
    """Null while it goes on, and for ever if its driver was killed."""
    seconds: float = 0.0
    """How long it has gone on, or went on; if it was killed, until its last sign."""
    status: RunStatus | None = None
    exit_code: int | None = None
    error: str | None = None
    generated_rows: int = 0


class Replicas(_Document):
    """How the replicas of a start are."""

    wanted: int
    running: int = 0
    engine_restarts: int = 0
    replica_restarts: int = 0
    last_error: str | None = None
    lacking: str | None = None
    """What replicas without a place in the cluster wait for."""


class Progress(_Document):
    """What ``_progress.json`` holds."""

    schema_version: int = 1
    run: str
    """The run's id."""
    phase: Phase
    written_at: str
    rows: dict[str, int]
    """Of the whole run: total, then those that ended by state. Rows of this start are counted as
    they end, committed or not."""
    rows_done: int
    """Rows that ended. More than those by state while ``parts_not_counted`` is not 0."""
    tokens: dict[str, int]
    """Of the whole run, summed over records; as far as parts are counted."""
    errors: dict[str, int]
    """Records by error code, likewise."""
    parts_not_counted: int
    """Parts of earlier starts whose stats have not been read yet."""
    generated_rows: int
    """By this start."""
    generated_tokens: int
    """Completion tokens, by this start."""
    lately: Rate
    """Over the last minute."""
    overall: Rate
    """Since the first row of this start."""
    replicas: Replicas
    start: Start
    """This one."""
    earlier: tuple[Start, ...] = ()
    """The starts before, oldest first; the last hundred."""


@dataclass(frozen=True)
class About:
    """What does not change during a start."""

    uri: str
    id: str
    name: str
    profile: str
    model: str
    replicas: int
    rows_total: int
    rows_before: int
    """Rows of the parts that were there before this start."""
    parts_before: int
    owner: str
    """Of the lease."""
    fewest_replicas: int
    """Below ``replicas`` where the config has a range."""


class LiveRun:
    """Tells of one start; a context manager around it, inside of its lease."""

    def __init__(
        self,
        about: About,
        *,
        earlier_totals: Callable[[], Totals | None],
        lease_lost: Callable[[], str | None],
        budget: Callable[[], Budget] = Budget,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """``earlier_totals`` are those of the parts before this start, None until they are known.
        Once ``lease_lost`` says why, nothing is written any more: the run is another driver's.
        ``budget`` is asked at the end."""
        self._about = about
        self._earlier_totals = earlier_totals
        self._lease_lost = lease_lost
        self._budget = budget
        self._interval_s = interval_s
        self._began = time.monotonic()
        self._start = Start(
            number=1,
            owner=about.owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            began_at=_now(),
        )
        self._lock = threading.Lock()
        self._pace = Pace()
        self._snapshot = Snapshot()
        self._phase = Phase.STARTING
        self._result: Result | None = None
        self._earlier: tuple[Start, ...] | None = None
        self._silent = False
        self._indexed = False
        self._metrics = RunMetrics(
            planned=about.rows_total, before=about.rows_before, replicas=about.fewest_replicas
        )
        self._soon = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._end(error)
        self._over.set()
        self._soon.set()
        self._thread.join(self._budget().left(_LAST_WORDS_S))
        if self._thread.is_alive():
            log.warning("the end of this start could not be noted in %s", self._uri)

    def tell(self, snapshot: Snapshot, *, draining: bool = False) -> None:
        """What the driver just saw; cheap."""
        self._metrics.tell(snapshot, self._earlier_totals())
        with self._lock:
            self._pace.note(snapshot.tally)
            self._snapshot = snapshot
            before = self._phase
            if draining:
                self._phase = Phase.DRAINING
            elif snapshot.running and before is Phase.STARTING:
                self._phase = Phase.RUNNING
            if self._phase is not before:
                self._soon.set()

    def conclude(self, result: Result) -> Result:
        """How the start ended; returns ``result``."""
        self._metrics.conclude(result, self._earlier_totals())
        with self._lock:
            self._result = result
        return result

    @property
    def _uri(self) -> str:
        return storage.join(self._about.uri, "_progress.json")

    def _end(self, error: BaseException | None) -> None:
        result = self._result
        status, code = _judged(error) if result is None else (result.status, result.exit_code)
        told = result.error if result is not None else str(error) if error is not None else None
        self._phase = Phase.ENDED
        self._metrics.end()
        self._start = self._start.model_copy(
            update={"ended_at": _now(), "status": status, "exit_code": int(code), "error": told}
        )

    def _write_on(self) -> None:
        while True:
            last = self._over.is_set()
            with storage.patience(_PATIENCE_S):
                self._write(last=last)
            if last:
                return
            self._soon.wait(self._interval_s)
            self._soon.clear()

    def _write(self, *, last: bool) -> None:
        if self._lease_lost() is not None:
            return
        try:
            if self._earlier is None:
                self._earlier = _starts_so_far(self._uri, self._about.id)
            progress = self._progress()
            storage.put_bytes(self._uri, _to_bytes(progress))
        except StorageError as error:
            if not self._silent:
                log.warning("progress cannot be told, trying on: %s", error)
            self._silent = True
            return
        if self._silent:
            log.info("progress is told again in %s", self._uri)
        self._silent = False
        if last or not self._indexed:
            self._index(progress)

    def _index(self, progress: Progress) -> None:
        """At the start, so that an entry of before does not pass for today's, and at the end."""
        uri = index_uri(self._about.uri)
        if uri is None:  # a bucket by itself has no folder above
            return
        first_time, self._indexed = not self._indexed, True
        try:
            storage.put_bytes(uri, _to_bytes(_entry(self._about, progress)))
        except StorageError as error:
            if first_time:
                log.warning(
                    "the index of runs cannot be written; jobs.status reads this run's folder "
                    "instead: %s",
                    error,
                )

    def _progress(self) -> Progress:
        with self._lock:
            snapshot, result = self._snapshot, self._result
            phase, start = self._phase, self._start
            lately, overall = self._pace.lately(), self._pace.overall()
        assert self._earlier is not None
        tally, about = snapshot.tally, self._about
        whole = _whole(about, tally, self._earlier_totals(), result)
        generated = tally.rows - tally.known_rows
        return Progress(
            run=about.id,
            phase=phase,
            written_at=_now(),
            generated_rows=generated,
            generated_tokens=tally.tokens - tally.known_tokens,
            lately=lately,
            overall=overall,
            replicas=Replicas(
                wanted=about.replicas,
                running=snapshot.running,
                engine_restarts=snapshot.engine_restarts,
                replica_restarts=snapshot.replica_restarts,
                last_error=snapshot.last_error,
                lacking=snapshot.lacking,
            ),
            start=start.model_copy(
                update={
                    "number": (self._earlier[-1].number if self._earlier else 0) + 1,
                    "seconds": round(time.monotonic() - self._began, 3),
                    "generated_rows": generated if result is None else result.generated_rows,
                }
            ),
            earlier=self._earlier,
            **whole,
        )


def read_progress(content: bytes) -> Progress | None:
    """The object's content; None if it is none that this version reads."""
    try:
        return Progress.model_validate_json(content)
    except ValidationError:
        return None


def _whole(
    about: About, tally: Tally, earlier: Totals | None, result: Result | None
) -> dict[str, Any]:
    """The whole run's numbers: exact once every row is in a part, else what is known."""
    total = {"total": about.rows_total}
    if result is not None and result.totals.ended == about.rows_total:
        totals = result.totals
        return {
            "rows": {**total, **totals.rows},
            "rows_done": totals.ended,
            "tokens": dict(totals.tokens),
            "errors": dict(totals.errors),
            "parts_not_counted": 0,
        }
    rows = Counter({str(status): 0 for status in Status})
    rows.update({Status.SUCCEEDED: tally.rows - tally.failed, Status.ERRORED: tally.failed})
    tokens = Counter(
        prompt=tally.prompt_tokens,
        completion=tally.tokens,
        cached=tally.cached_tokens,
        image=tally.image_tokens,
    )
    errors = Counter(tally.errors)
    if earlier is not None:
        rows.update(earlier.rows)
        tokens.update(earlier.tokens)
        errors.update(earlier.errors)
    return {
        "rows": {**total, **rows},
        "rows_done": about.rows_before + tally.rows,
        "tokens": dict(tokens),
        "errors": dict(errors),
        "parts_not_counted": about.parts_before if earlier is None else 0,
    }


def _judged(error: BaseException | None) -> tuple[RunStatus, ExitCode]:
    """Status and code of a start that ended without a result; signals are no ``Exception``."""
    if isinstance(error, UsageError):
        return RunStatus.INVALID, error.exit_code
    if isinstance(error, PipelineError):
        return RunStatus.FAILED, error.exit_code
    if error is None or isinstance(error, Exception):
        return RunStatus.FAILED, ExitCode.FAILED
    return RunStatus.INTERRUPTED, ExitCode.INTERRUPTED


def _starts_so_far(uri: str, run_id: str) -> tuple[Start, ...]:
    """What the driver before has left of the same run; a damaged object is begun anew.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return ()
    found = read_progress(content)
    if found is None:
        log.warning("%s is damaged, or of another version; the starts so far are not known", uri)
        return ()
    return (*found.earlier, found.start)[-_KEPT_STARTS:] if found.run == run_id else ()


def _entry(about: About, progress: Progress) -> IndexEntry:
    starts = (*progress.earlier, progress.start)
    last = progress.start
    return IndexEntry(
        run=about.uri,
        id=about.id,
        name=about.name,
        profile=about.profile,
        model=about.model,
        state=last.status or "running",
        exit_code=last.exit_code,
        error=last.error,
        rows=progress.rows,
        rows_done=progress.rows_done,
        tokens=progress.tokens,
        errors=progress.errors,
        starts=last.number,
        began_at=starts[0].began_at,
        ended_at=last.ended_at,
        seconds=round(sum(start.seconds for start in starts), 3),
    )


def _to_bytes(document: BaseModel) -> bytes:
    return (json.dumps(redacted(document.model_dump(mode="json")), indent=2) + "\n").encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
