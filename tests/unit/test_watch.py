"""When a run is stopped: the first reason counts, and a few early errors are none."""

from datetime import UTC, datetime, timedelta

import pytest

from pipeline.budget import Budget
from pipeline.errors import ErrorCode
from pipeline.progress import RowTally, Tally
from pipeline.records import Completion
from pipeline.roster import Snapshot
from pipeline.watch import Reason, Watch, is_surely_above

NOW = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)


def watch(
    deadline: datetime | None = None,
    lost: str | None = None,
    seen: list[Snapshot] | None = None,
    signal_name: str | None = None,
) -> Watch:
    return Watch(
        max_error_rate=0.01,
        min_rows=500,
        deadline=deadline,
        lease_lost=lambda: lost,
        drain_s=30,
        interrupted=lambda: (signal_name, 99.0) if signal_name else None,
        show=(seen if seen is not None else []).append,
        clock=lambda: NOW,
    )


def snapshot(rows: int = 0, failed: int = 0) -> Snapshot:
    return Snapshot(tally=Tally(rows, failed, 0))


def test_a_healthy_run_goes_on_and_every_snapshot_is_shown() -> None:
    seen: list[Snapshot] = []
    watched = watch(deadline=NOW + timedelta(seconds=1), seen=seen)
    assert not watched(snapshot(10_000, 90))
    assert watched.stop is None
    assert seen == [snapshot(10_000, 90)]


def test_a_signal_stops_it_and_says_which() -> None:
    watched = watch(signal_name="SIGTERM")
    assert watched(snapshot())
    assert watched.stop is not None
    assert watched.stop.reason is Reason.SIGNAL
    assert "SIGTERM" in watched.stop.message
    assert watched(snapshot()) == Budget(99.0)  # counted from the signal, not from this look


def test_the_deadline_stops_it() -> None:
    watched = watch(deadline=NOW)
    assert watched(snapshot())
    assert watched.stop is not None
    assert watched.stop.reason is Reason.DEADLINE


def test_a_deadline_in_the_past_is_known_before_anything_starts() -> None:
    assert watch(deadline=NOW - timedelta(hours=1)).is_late()
    assert not watch(deadline=NOW + timedelta(hours=1)).is_late()


def test_a_lost_lease_comes_before_everything_else_and_the_first_reason_stays() -> None:
    watched = watch(deadline=NOW, lost="taken over by host-b", signal_name="SIGTERM")
    assert watched(snapshot())
    assert watched.stop is not None
    assert (watched.stop.reason, watched.stop.message) == (
        Reason.LEASE_LOST,
        "taken over by host-b",
    )
    first = watched.stop
    assert watched(snapshot(1000, 1000))
    assert watched.stop is first


def test_errors_beyond_doubt_stop_it_and_the_message_has_the_numbers() -> None:
    watched = watch()
    assert not watched(snapshot(499, 499))
    assert watched(snapshot(500, 100))
    assert watched.stop is not None
    assert watched.stop.reason is Reason.ERROR_RATE
    assert "100 of the first 500 rows" in watched.stop.message


@pytest.mark.parametrize(
    ("failed", "ended", "above"),
    [
        (0, 1000, False),
        (8, 600, False),  # 1.3 %, but so few that 1 % is as likely
        (10, 1000, False),
        (1200, 100_000, True),  # 1.2 %, and that is no accident
        (30, 600, True),
        (500, 499, False),
    ],
)
def test_a_rate_is_above_only_beyond_doubt(failed: int, ended: int, above: bool) -> None:
    assert is_surely_above(failed, ended, 0.01, min_rows=500) is above


def test_few_rows_of_which_all_samples_fail_stop_no_run() -> None:
    """Half a percent of the rows are 4 % of that many records, if each has eight."""
    rows, tally = RowTally(dict.fromkeys(range(2000), 8)), Tally()
    for row in range(2000):
        code = ErrorCode.LENGTH if row % 200 == 0 else None
        tally += rows.count(
            [Completion(row, "a", i, "", "stop", 1, 1, 0, 0, 0, 0.1, code=code) for i in range(8)]
        )
    assert (tally.rows, tally.failed, tally.errors) == (2000, 10, {"length": 80})
    assert not is_surely_above(tally.failed, tally.rows, 0.01, min_rows=500)


def test_a_limit_of_one_is_never_exceeded() -> None:
    assert not is_surely_above(10_000, 10_000, 1.0, min_rows=500)


def test_a_limit_of_zero_stops_no_run_without_an_error() -> None:
    """1,717 rows are among those whose interval begins, by rounding, above 0."""
    stopped = [n for n in range(500, 5_000) if is_surely_above(0, n, 0.0, min_rows=500)]
    assert stopped == []
    assert is_surely_above(1, 500, 0.0, min_rows=500)
