"""``_progress.json`` and the run index: what a driver tells of a start, whatever the store does."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.commit import PartStats
from pipeline.errors import ConfigError, EngineError
from pipeline.index import index_uri, read_index
from pipeline.live import About, LiveRun
from pipeline.progress import Tally
from pipeline.report import Result, RunStatus, Totals, total
from pipeline.roster import Snapshot
from tests.waiting import wait_until

ROWS = 100
EARLIER = PartStats(
    0,
    {"succeeded": 18, "errored": 2, "expired": 0},
    20,
    {"prompt": 200, "completion": 100, "cached": 0, "image": 0},
    {"timeout": 2},
)
REST = PartStats(
    1,
    {"succeeded": 79, "errored": 1, "expired": 0},
    80,
    {"prompt": 800, "completion": 400, "cached": 8, "image": 6},
    {"length": 1},
)


def about(folder: Path, **changed: Any) -> About:
    known: dict[str, Any] = {
        "uri": f"file://{folder}/runs/night",
        "id": "run-1",
        "name": "nightly",
        "profile": "p",
        "model": "m",
        "replicas": 2,
        "rows_total": ROWS,
        "rows_before": 20,
        "parts_before": 1,
        "owner": "owner-1",
        "fewest_replicas": 2,
    }
    return About(**{**known, **changed})


def live(
    folder: Path,
    *,
    earlier: Callable[[], Totals | None] = lambda: total([EARLIER]),
    lost: Callable[[], str | None] = lambda: None,
    interval_s: float = 0.02,
    **changed: Any,
) -> LiveRun:
    return LiveRun(
        about(folder, **changed), earlier_totals=earlier, lease_lost=lost, interval_s=interval_s
    )


def result(status: RunStatus = RunStatus.COMPLETE, **changed: Any) -> Result:
    whole: dict[str, Any] = {"totals": total([EARLIER, REST]), "generated_rows": 80}
    return Result(status, "r", ROWS, seconds=1.0, **{**whole, **changed})


def progress(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "runs/night/_progress.json").read_text())
    return document


def entry(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "runs/_index/night.json").read_text())
    return document


def told(folder: Path, key: str) -> object:
    return (folder / "runs/night/_progress.json").exists() and progress(folder)[key]


def test_a_start_is_told_before_anything_runs_and_stands_in_the_index(tmp_path: Path) -> None:
    with live(tmp_path, interval_s=1000):
        wait_until((tmp_path / "runs/_index/night.json").exists)
        document = progress(tmp_path)
        assert (document["phase"], document["rows_done"]) == ("starting", 20)
        assert document["start"]["status"] is None
        assert (entry(tmp_path)["state"], entry(tmp_path)["ended_at"]) == ("running", None)


def test_what_goes_on_is_the_parts_before_and_what_replicas_report(tmp_path: Path) -> None:
    tally = Tally(30, 3, 150, 300, 5, 4, 10, 50, {"timeout": 1, "length": 2})
    with live(tmp_path) as run:
        run.tell(Snapshot(tally=tally, running=1, engine_restarts=1, last_error="token=abcdefgh"))
        wait_until(lambda: told(tmp_path, "phase") == "running")
        document = progress(tmp_path)
        run.tell(Snapshot(tally=tally, running=0), draining=True)
        wait_until(lambda: told(tmp_path, "phase") == "draining")
    assert document["rows"] == {
        "total": ROWS,
        "succeeded": 45,
        "errored": 5,
        "expired": 0,
        "cancelled": 0,
    }
    assert (document["rows_done"], document["parts_not_counted"]) == (50, 0)
    assert document["tokens"] == {"prompt": 500, "completion": 250, "cached": 5, "image": 4}
    assert document["errors"] == {"timeout": 3, "length": 2}
    assert (document["generated_rows"], document["generated_tokens"]) == (20, 100)
    assert document["replicas"] == {
        "wanted": 2,
        "running": 1,
        "engine_restarts": 1,
        "lacking": None,
        "replica_restarts": 0,
        "last_error": "token=***",
    }


def test_parts_whose_stats_are_not_read_yet_are_said_to_be_missing(tmp_path: Path) -> None:
    with live(tmp_path, earlier=lambda: None) as run:
        run.tell(Snapshot(tally=Tally(rows=30, tokens=150), running=2))
        wait_until(lambda: told(tmp_path, "phase") == "running")
        document = progress(tmp_path)
    assert (document["rows_done"], document["parts_not_counted"]) == (50, 1)
    assert document["rows"]["succeeded"] == 30


def test_the_end_has_the_exact_totals_and_the_exit_code(tmp_path: Path) -> None:
    with live(tmp_path, interval_s=1000) as run:
        run.conclude(result(RunStatus.OVER_ERROR_RATE))
    document = progress(tmp_path)
    assert (document["phase"], document["rows_done"]) == ("ended", ROWS)
    assert (document["rows"]["succeeded"], document["rows"]["errored"]) == (97, 3)
    assert document["tokens"] == {"prompt": 1000, "completion": 500, "cached": 8, "image": 6}
    assert (document["start"]["status"], document["start"]["exit_code"]) == ("over_error_rate", 3)
    assert document["start"]["generated_rows"] == 80
    last = entry(tmp_path)
    assert (last["state"], last["exit_code"], last["rows"]) == (
        *("over_error_rate", 3),
        document["rows"],
    )
    assert read_index(f"file://{tmp_path}/runs")["night"].finished


def test_a_start_that_was_stopped_keeps_the_rows_that_wait_in_journals(tmp_path: Path) -> None:
    with live(tmp_path) as run:
        run.tell(Snapshot(tally=Tally(rows=30), running=2))
        run.conclude(result(RunStatus.INTERRUPTED, totals=total([EARLIER]), error="SIGTERM"))
    document = progress(tmp_path)
    assert (document["phase"], document["rows_done"]) == ("ended", 50)
    assert (document["start"]["exit_code"], document["start"]["error"]) == (75, "SIGTERM")
    assert not read_index(f"file://{tmp_path}/runs")["night"].finished


class Signal(BaseException):
    """As ``jobs.cli.Interrupted``: no error."""


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Signal("SIGTERM"), "interrupted", 75),
        (ConfigError("wrong password=abc"), "invalid", 2),
        (EngineError("died"), "failed", 1),
        (KeyError("x"), "failed", 1),
    ],
)
def test_a_start_that_ends_by_an_error_says_which(
    tmp_path: Path, error: BaseException, status: str, code: int
) -> None:
    with pytest.raises(type(error)), live(tmp_path):
        raise error
    start = progress(tmp_path)["start"]
    assert (start["status"], start["exit_code"]) == (status, code)
    assert start["error"]
    assert "abc" not in start["error"]


def test_starts_are_kept_also_one_that_was_killed(tmp_path: Path) -> None:
    with live(tmp_path) as run:
        run.conclude(result(RunStatus.INTERRUPTED, totals=total([]), error="SIGTERM"))
    with live(tmp_path, owner="owner-2", interval_s=1000):
        wait_until(lambda: progress(tmp_path)["start"]["number"] == 2)
        killed = (tmp_path / "runs/night/_progress.json").read_bytes()
    (tmp_path / "runs/night/_progress.json").write_bytes(killed)
    with live(tmp_path, owner="owner-3") as run:
        run.conclude(result())
    document = progress(tmp_path)
    starts = [(start["number"], start["owner"], start["status"]) for start in document["earlier"]]
    assert starts == [(1, "owner-1", "interrupted"), (2, "owner-2", None)]
    assert document["start"]["number"] == entry(tmp_path)["starts"] == 3
    assert entry(tmp_path)["began_at"] == document["earlier"][0]["began_at"]


@pytest.mark.parametrize("left", [b'{"run": "run-1"}', b"\xff"])
def test_a_damaged_object_is_begun_anew(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "runs/night").mkdir(parents=True)
    (tmp_path / "runs/night/_progress.json").write_bytes(left)
    with live(tmp_path) as run:
        run.conclude(result())
    assert progress(tmp_path)["start"]["number"] == 1


def test_starts_of_another_run_in_the_same_folder_are_not_this_ones(tmp_path: Path) -> None:
    for run_id in ("run-1", "run-2"):
        with live(tmp_path, id=run_id) as run:
            run.conclude(result())
    assert (progress(tmp_path)["run"], progress(tmp_path)["earlier"]) == ("run-2", [])


def test_a_driver_that_lost_the_lease_writes_nothing_more(tmp_path: Path) -> None:
    lost: list[str] = []
    with live(tmp_path, lost=lambda: lost[0] if lost else None) as run:
        wait_until((tmp_path / "runs/_index/night.json").exists)
        lost.append("taken over")
        run.conclude(result())
    assert progress(tmp_path)["phase"] == "starting"
    assert entry(tmp_path)["state"] == "running"


def test_a_store_that_is_away_costs_the_news_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "runs").write_text("a file where a folder should be")
    with live(tmp_path) as run:
        wait_until(lambda: "progress cannot be told" in caplog.text)
        time.sleep(0.1)
        (tmp_path / "runs").unlink()
        wait_until((tmp_path / "runs/_index/night.json").exists)
        run.conclude(result())
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "is told again" in caplog.text
    assert progress(tmp_path)["phase"] == "ended"


def test_an_index_that_cannot_be_written_is_said_once_and_the_run_is_told_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/_index").write_text("no folder")
    with live(tmp_path) as run:
        run.conclude(result())
    assert caplog.text.count("the index of runs cannot be written") == 1
    assert progress(tmp_path)["phase"] == "ended"


def test_an_entry_lies_beside_the_run_folder() -> None:
    assert index_uri("s3://b/runs/night/") == "s3://b/runs/_index/night.json"
    assert index_uri("s3://b/night") == "s3://b/_index/night.json"
    assert index_uri("s3://b") is None
