"""How runs stand, from object storage alone: no Ray, no engine, no config.

In: the URI of a run folder, or of a folder of runs. Out: ``RunView``s. Rows done are counted by the
parts that are there, so they are exact even if the driver is dead; what is said beyond that (rows
by state, tokens, rates) is the driver's own word, from ``_progress.json`` or ``report.json``.

Whether a driver lives is decided by its lease (``lease.observe``), never by a time that a machine
wrote into an object.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pipeline import storage
from pipeline.commit import committed_shards, read_stats
from pipeline.errors import RunMismatchError, StorageError
from pipeline.index import IndexEntry, read_index
from pipeline.lease import LeaseState, LeaseView, observe
from pipeline.live import Phase, Progress, read_progress
from pipeline.plan import Plan
from pipeline.report import RunStatus, judge, total
from pipeline.run import read_manifest, read_plan
from pipeline.status import RunView, State

log = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_S = 20.0
"""What one question to the store may take: somebody is waiting for the answer."""
_RUNS_AT_A_TIME = 8
_PHASES = {
    Phase.STARTING: State.STARTING,
    Phase.RUNNING: State.RUNNING,
    Phase.DRAINING: State.DRAINING,
}
_ENDINGS = {
    RunStatus.FAILED: State.FAILED,
    RunStatus.INVALID: State.FAILED,
    RunStatus.OVER_ERROR_RATE: State.OVER_ERROR_RATE,
}
"""Of a run that is not finished; anything else was interrupted."""


def view_run(uri: str) -> RunView | None:
    """How the run in the folder ``uri`` stands; None if the folder holds none.

    Raises:
        RunMismatchError: ``run.json`` or the plan are damaged, or another program's.
        StorageError: the store does not tell, or holds damaged or foreign parts.
    """
    questions: list[Callable[[], Any]] = [
        partial(observe, uri),
        partial(read_manifest, uri),
        partial(_told, storage.join(uri, "_progress.json")),
        partial(_report, storage.join(uri, "report.json")),
        partial(storage.exists, storage.join(uri, "_SUCCESS")),
    ]
    with ThreadPoolExecutor(len(questions)) as pool:
        lease, manifest, told, report, success = pool.map(_patiently, questions)
    if manifest is None:
        return _unplanned(uri, lease)
    plan = _patiently(partial(read_plan, uri))
    done = _patiently(partial(committed_shards, uri, plan))
    if told is not None and told.progress.run != manifest.get("id"):
        told = None  # of the run that was here before
    facts = _Facts(uri, manifest, plan, frozenset(done), lease, told, report, success)
    return _planned(facts)


def view_runs(folder: str) -> list[RunView]:
    """The runs directly in ``folder``, the newest first.

    Of a run that its index entry calls finished, nothing else is read.

    Raises:
        StorageError: the folder, or its index, cannot be listed.
    """
    names = [storage.name(uri) for uri in _patiently(partial(storage.list_folders, folder))]
    names = [name for name in names if not name.startswith(("_", "."))]
    entries = read_index(folder)

    def view(name: str) -> RunView | None:
        return _one_of_many(storage.join(folder, name), entries.get(name))

    with ThreadPoolExecutor(_RUNS_AT_A_TIME) as pool:
        found = [seen for seen in pool.map(view, names) if seen is not None]
    known = {storage.name(seen.uri) for seen in found}
    gone = [
        _of_entry(storage.join(folder, name), entry, State.GONE)
        for name, entry in entries.items()
        if name not in known
    ]
    return sorted([*found, *gone], key=lambda seen: (seen.began_at, seen.uri), reverse=True)


@dataclass(frozen=True)
class _Told:
    """The driver's last word."""

    progress: Progress
    age_s: float


@dataclass(frozen=True)
class _Facts:
    """What the folder of a planned run holds."""

    uri: str
    manifest: Mapping[str, Any]
    plan: Plan
    done: frozenset[int]
    lease: LeaseView | None
    told: _Told | None
    report: Mapping[str, Any] | None
    success: bool

    @property
    def progress(self) -> Progress | None:
        return self.told.progress if self.told else None

    @property
    def finished(self) -> bool:
        return self.success and len(self.done) == len(self.plan.shards)


def _planned(facts: _Facts) -> RunView:
    if facts.finished and facts.report is None:
        facts = _with_footers(facts)
    progress, report = facts.progress, facts.report or {}
    state = _state(facts)
    # A finished run's report is exact; of another one the driver's last word is newer.
    counted: Mapping[str, Any] = report
    if progress is not None and not facts.finished:
        counted = progress.model_dump(mode="json")
    committed = sum(shard.rows for shard in facts.plan.shards if shard.index in facts.done)
    starts = (*progress.earlier, progress.start) if progress else ()
    ended = {} if state.live else _ending(facts)
    return RunView(
        uri=facts.uri,
        state=state,
        name=facts.manifest["config"].get("name", ""),
        profile=facts.manifest["config"].get("engine", {}).get("profile", ""),
        model=facts.manifest["model"]["name"],
        rows_total=facts.plan.rows,
        rows_committed=committed,
        rows_open=_rows_open(facts, committed),
        rows={key: n for key, n in counted.get("rows", {}).items() if key != "total"},
        parts=(len(facts.done), len(facts.plan.shards)),
        tokens=counted.get("tokens", {}),
        errors=counted.get("errors", {}),
        progress=progress,
        progress_age_s=facts.told.age_s if facts.told else None,
        lease=facts.lease,
        starts=starts,
        starts_count=starts[-1].number if starts else 0,
        began_at=starts[0].began_at if starts else _taken_at(facts.lease),
        seconds=sum(start.seconds for start in starts) or report.get("seconds", 0.0),
        exit_code=ended.get("exit_code"),
        error=ended.get("error"),
    )


def _state(facts: _Facts) -> State:
    lease, progress = facts.lease, facts.progress
    if facts.finished:
        assert facts.report is not None
        over = facts.report.get("status") == RunStatus.OVER_ERROR_RATE
        return State.OVER_ERROR_RATE if over else State.COMPLETE
    of_owner = bool(progress and lease and progress.start.owner == lease.record.owner)
    has_ended = of_owner and progress is not None and progress.phase is Phase.ENDED
    if lease is not None and lease.record.state is LeaseState.HELD and not has_ended:
        if not lease.lives:
            return State.DEAD
        return _PHASES[progress.phase] if of_owner and progress else State.STARTING
    return _ENDINGS.get(_ending(facts).get("status", ""), State.INTERRUPTED)


def _ending(facts: _Facts) -> dict[str, Any]:
    """How the last start ended: ``status``, ``exit_code`` and ``error``, as far as is known."""
    missing = len(facts.plan.shards) - len(facts.done)
    if facts.success and missing:
        error = f"{missing} of its parts are gone; the same command makes their rows again"
        return {"error": error}
    last = facts.progress.start if facts.progress else None
    if last is not None and last.status is not None:
        return last.model_dump(include={"status", "exit_code", "error"})
    if last is not None and not facts.finished:  # it had no time to say
        return {}
    return dict(facts.report or {})


def _rows_open(facts: _Facts, committed: int) -> int:
    """Rows that ended in shards without a part; of a start that ended with all rows there are
    none, whatever was lost since."""
    progress = facts.progress
    if progress is None or facts.finished:
        return 0
    if progress.phase is Phase.ENDED and progress.rows_done == facts.plan.rows:
        return 0
    return max(0, min(progress.rows_done, facts.plan.rows) - committed)


def _with_footers(facts: _Facts) -> _Facts:
    """The facts of a finished run with what its lost report said, by the parts' footers."""
    log.info("%s has no report.json; reading the footers of its parts", facts.uri)
    totals = total(read_stats(facts.uri, sorted(facts.done)))
    limit = facts.manifest["config"].get("limits", {}).get("max_error_rate", 1.0)
    report = {
        "status": judge(totals.ended, totals, limit),
        "rows": totals.rows,
        "tokens": totals.tokens,
        "errors": totals.errors,
    }
    return _Facts(**{**facts.__dict__, "report": report})


def _unplanned(uri: str, lease: LeaseView | None) -> RunView | None:
    """A folder without ``run.json``: a driver may be about to write it."""
    if lease is None:
        return None
    state = State.STARTING if lease.lives else State.EMPTY
    return RunView(uri, state, lease=lease, began_at=_taken_at(lease))


def _taken_at(lease: LeaseView | None) -> str:
    return lease.record.taken_at if lease else ""


def _one_of_many(uri: str, entry: IndexEntry | None) -> RunView | None:
    """What is wrong with one run must not hide the others."""
    if entry is not None and entry.finished:
        return _of_entry(uri, entry, State(entry.state))
    try:
        return view_run(uri)
    except (RunMismatchError, StorageError) as error:
        if entry is None:
            return RunView(uri, State.UNREADABLE, error=str(error))
        return _of_entry(uri, entry, State.UNREADABLE, str(error))


def _of_entry(uri: str, entry: IndexEntry, state: State, error: str | None = None) -> RunView:
    return RunView(
        uri=uri,
        state=state,
        name=entry.name,
        profile=entry.profile,
        model=entry.model,
        rows_total=entry.rows.get("total", 0),
        rows_committed=entry.rows_done,
        rows={key: count for key, count in entry.rows.items() if key != "total"},
        tokens=entry.tokens,
        errors=entry.errors,
        starts_count=entry.starts,
        began_at=entry.began_at,
        seconds=entry.seconds,
        exit_code=entry.exit_code,
        error=error or entry.error,
    )


def _told(uri: str) -> _Told | None:
    try:
        found = storage.read_aged(uri)
    except FileNotFoundError:
        return None
    progress = read_progress(found.content)
    if progress is None:
        log.warning("%s is damaged, or of another version, and is left out", uri)
        return None
    return _Told(progress, found.age_s)


def _report(uri: str) -> Mapping[str, Any] | None:
    try:
        document = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is damaged and is left out", uri)
        return None
    return document if isinstance(document, Mapping) else None


def _patiently(question: Callable[[], T]) -> T:
    with storage.patience(_PATIENCE_S):
        return question()
