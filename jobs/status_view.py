"""``jobs.status`` for people: a page for one run, a table for many, a line for a log.

In: ``RunView``s. Out: what rich prints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.lease import LeaseState
from pipeline.live import Start
from pipeline.progress import Rate, duration
from pipeline.records import Status
from pipeline.redact import redacted_text
from pipeline.status import RunView, State

_STYLES = {
    State.COMPLETE: "green",
    State.STARTING: "cyan",
    State.RUNNING: "cyan",
    State.DRAINING: "yellow",
    State.INTERRUPTED: "yellow",
    State.EMPTY: "dim",
    State.GONE: "dim",
}
"""Others are red."""
_MOST_RUNS = 50
"""Rows of a table; ``--json`` has all."""
_MOST_STARTS = 5
_MOST_CODES = 8
_REMEDIES = {
    State.DEAD: "its driver gives no sign of life; the same command resumes",
    State.INTERRUPTED: "the same command resumes",
    State.EMPTY: "a start was cut short before it had planned anything; the same command starts",
}


def page(views: Sequence[RunView], *, one: bool) -> RenderableType:
    """What is shown of a run, or of a folder of runs."""
    return _page(views[0]) if one else Group(_table(views), _summary(views))


def one_line(views: Sequence[RunView]) -> str:
    """The same for a log."""
    if len(views) != 1:
        return _summary(views).plain
    view = views[0]
    words = [f"{view.state}", f"rows {view.rows_done}/{view.rows_total}"]
    if view.progress is not None and view.state.live:
        words.append(f"{view.progress.lately.tokens_per_s:.0f} tok/s")
    words.append(f"errored {view.rows.get(Status.ERRORED, 0)}")
    if view.eta_s is not None:
        words.append(f"ETA {duration(view.eta_s)}")
    return "  ".join(words)


def _page(view: RunView) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    state = Text.assemble((view.state.value, _style(view.state)))
    remedy = _REMEDIES.get(view.state)
    grid.add_row("run", escape(redacted_text(view.uri)))
    grid.add_row("status", Text.assemble(state, f": {remedy}" if remedy else ""))
    for name, text in _lines(view):
        grid.add_row(name, escape(redacted_text(text)))
    return grid


def _lines(view: RunView) -> Iterator[tuple[str, str]]:
    if view.error:
        yield "why", view.error
    if view.model:
        yield "job", f"{view.name}, {view.model} by {view.profile}"
    if view.parts is not None:
        yield from _rows(view)
        yield from _tokens(view)
    yield from _pace(view)
    if view.progress_age_s is not None and view.rows_left:
        yield "told", f"by its driver {_ago(view.progress_age_s)}: all but the rows in parts"
    if view.lease is not None:
        yield "lease", _lease(view)
    for number, start in enumerate(view.starts[-_MOST_STARTS:]):
        yield "" if number else "starts", _start(start, view)


def _rows(view: RunView) -> Iterator[tuple[str, str]]:
    assert view.parts is not None
    share = view.rows_done / view.rows_total if view.rows_total else 1.0
    yield (
        "rows",
        f"{view.rows_done:,} of {view.rows_total:,} done ({share:.1%}), {view.rows_left:,} left",
    )
    opened = f", {view.rows_open:,} in open shards" if view.rows_open else ""
    there, shards = view.parts
    yield "", f"{view.rows_committed:,} in {there:,} of {shards:,} parts{opened}"
    states = ", ".join(f"{count:,} {state}" for state, count in view.rows.items() if count)
    if states:
        yield "", f"{states}; error rate {view.error_rate:.2%}"
    if view.errors:
        yield "errors", _codes(view)
    if view.progress is not None and view.progress.parts_not_counted:
        yield "", f"(without {view.progress.parts_not_counted:,} parts of earlier starts)"


def _codes(view: RunView) -> str:
    common = Counter(view.errors).most_common()
    more = len(common) - _MOST_CODES
    told = ", ".join(f"{count:,} {code}" for code, count in common[:_MOST_CODES])
    return told + (f" and {more} more codes" if more > 0 else "")


def _tokens(view: RunView) -> Iterator[tuple[str, str]]:
    if not view.tokens:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in view.tokens.items())
    yield "tokens", kinds
    left = view.tokens_left
    if left is not None and view.rows_left:
        yield "", f"about {left['prompt']:,} prompt and {left['completion']:,} completion left"


def _pace(view: RunView) -> Iterator[tuple[str, str]]:
    progress = view.progress
    if progress is None or not view.state.live:
        return
    lately, overall = progress.lately, progress.overall
    yield "rate", f"{_rate(lately)} in the last minute"
    yield "", f"{_rate(overall)} since the first row of this start"
    if view.eta_s is not None:
        at = datetime.now(UTC) + timedelta(seconds=view.eta_s)
        yield "ETA", f"{duration(view.eta_s)} (about {at:%Y-%m-%d %H:%M} UTC)"
    replicas = progress.replicas
    restarts = replicas.engine_restarts + replicas.replica_restarts
    last = f"; last error: {replicas.last_error}" if replicas.last_error else ""
    running = f"{replicas.running} of {replicas.wanted} running"
    yield "replicas", f"{running}, {restarts} restarts of engines and processes{last}"
    if replicas.lacking:
        yield "", replicas.lacking


def _rate(rate: Rate) -> str:
    return f"{rate.rows_per_s:,.1f} rows/s, {rate.tokens_per_s:,.0f} completion tokens/s"


def _lease(view: RunView) -> str:
    assert view.lease is not None
    record, age = view.lease.record, _ago(view.lease.age_s)
    if record.state is LeaseState.RELEASED:
        return f"released {age} by host {record.host}, pid {record.pid}"
    return f"renewed {age} by host {record.host}, pid {record.pid}"


def _start(start: Start, view: RunView) -> str:
    is_last = start.number == view.starts_count
    if start.status is not None:
        how = f"{start.status} (exit {start.exit_code}) after {duration(start.seconds)}"
    elif is_last and view.state.live:
        how = f"for {duration(start.seconds)} now"
    else:
        how = f"no more seen of it after {duration(start.seconds)}"
    made = f"{start.generated_rows:,} rows"
    where = f"host {start.host}, version {start.version}"
    return f"{start.number}: {_time(start.began_at)}, {how}, {made}; {where}"


def _table(views: Sequence[RunView]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in ("rows", "errored", "completion tokens", "starts", "took"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("began (UTC)", no_wrap=True)
    for view in views[:_MOST_RUNS]:
        done, whole = f"{view.rows_done:,}", f"{view.rows_total:,}"
        table.add_row(
            escape(redacted_text(storage.name(view.uri))),
            Text(view.state.value, style=_style(view.state)),
            whole if done == whole else f"{done} of {whole}",
            f"{view.error_rate:.2%}",
            f"{view.tokens.get('completion', 0):,}",
            f"{view.starts_count or ''}",
            duration(view.seconds) if view.seconds else "",
            _time(view.began_at),
        )
    return table


def _summary(views: Sequence[RunView]) -> Text:
    states = Counter(view.state for view in views)
    told = ", ".join(f"{count} {state}" for state, count in states.most_common())
    rows = sum(view.rows_done for view in views)
    errored = sum(view.rows.get(Status.ERRORED, 0) for view in views)
    tokens = sum(view.tokens.get("completion", 0) for view in views)
    hidden = len(views) - _MOST_RUNS
    more = f"; {hidden} older ones are not shown (--json has all)" if hidden > 0 else ""
    noun = "run" if len(views) == 1 else "runs"
    return Text(
        f"{len(views)} {noun}: {told}; {rows:,} rows, {errored:,} errored, {tokens:,} completion "
        f"tokens{more}"
    )


def _style(state: State) -> str:
    return _STYLES.get(state, "red")


def _ago(seconds: float) -> str:
    """An age by two clocks may be below 0."""
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s ago"
    return f"{duration(seconds)} ago"


def _time(text: str) -> str:
    """A time of an object, short."""
    return text[:16].replace("T", " ")
