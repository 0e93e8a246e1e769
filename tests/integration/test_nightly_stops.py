"""The nightly job is stopped, or stops itself: nothing finished is lost or made twice.

On one real Ray, with the echo engine. That a record was not made again shows in its latency, which
no second generation would repeat.
"""

import contextlib
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.lifecycle import LocalCluster
from tests.integration.fake_job import nightly, records, started, workers
from tests.waiting import suspend_driver

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.usefixtures("one_ray")]

ROWS = 1600
SLOWLY = {"FAKE_ENGINE_DELAY_S": "0.125"}
"""Eight requests at a time: 1,600 rows take 25 s. A shard of 100 is more than is let in at once."""
Records = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    prompts = [f"Say {number}." for number in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    document = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": "mini-maverick-tp1", "overrides": {"max_num_seqs": 8}},
        "limits": {"shard_rows": 100, "journal_s": 0.5},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "job.yaml"


def by_key(rows: list[dict[str, Any]]) -> Records:
    found = {(row["input_row"], row["sample_index"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def kept(out: Path) -> Records:
    """What an interrupted run has on disk: committed parts, and journals, perhaps of the same."""
    parts, journals = (
        by_key([row for path in out.glob(kind) for row in pq.read_table(path).to_pylist()])
        for kind in ("data/*.parquet", "_journal/*/*.parquet")
    )
    assert all(parts[key] == journals[key] for key in parts.keys() & journals.keys())
    return {**journals, **parts}


def assert_not_made_again(before: Records, after: Records) -> None:
    assert before
    assert {key: after[key]["latency_s"] for key in before} == {
        key: row["latency_s"] for key, row in before.items()
    }


def test_sigterm_keeps_what_is_finished_and_the_same_command_makes_the_rest(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(config, tmp_path / "log", **SLOWLY) as job:
        job.wait_for_files(out, "_journal/*/*.parquet")
        asked = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        code, result, log = job.end()
    assert (code, result["status"]) == (75, "interrupted"), log
    assert time.monotonic() - asked < 60
    assert "keeping what is finished" in log
    assert not (out / "_SUCCESS").exists()
    assert json.loads((out / "report.json").read_text())["exit_code"] == 75
    before = kept(out)

    code, result, log = nightly(config)
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
    after = by_key(records(out))
    assert len(after) == ROWS
    assert_not_made_again(before, after)
    assert not list(out.glob("_journal/*/*.parquet"))


def test_a_part_that_cannot_be_written_ends_the_run_once_the_others_rows_are_kept(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    blocked = out / "data" / "part-000015.parquet"
    blocked.mkdir(parents=True)
    rarely = ("--set", "limits.journal_s=300", "--set", "limits.journal_rows=100000")
    with started(config, tmp_path / "log", *rarely, **SLOWLY) as job:
        code, result, log = job.end()
    assert (code, result["status"]) == (1, "failed"), log
    assert blocked.name in result["error"]
    blocked.rmdir()
    assert list(out.glob("_journal/**/*.parquet"))  # only a drain writes any


def test_a_silent_roster_holds_neither_the_run_nor_its_end(
    config: Path, tmp_path: Path, one_ray: LocalCluster
) -> None:
    out = tmp_path / "out"
    with started(config, tmp_path / "log", **SLOWLY) as job:
        job.wait_for_files(out, "_journal/*/*.parquet")
        ((_, roster),) = workers(one_ray, "ray::Roster")
        roster.suspend()
        try:
            job.wait_for_new_files(out, "_journal/*/*.parquet", 3)
            asked = time.monotonic()
            job.process.send_signal(signal.SIGTERM)
            code, result, log = job.end()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends it with the job
                roster.resume()
    assert (code, result["status"]) == (75, "interrupted"), log
    assert time.monotonic() - asked < 90
    code, result, log = nightly(config)
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
    assert len(by_key(records(out))) == ROWS


def test_a_second_signal_ends_the_job_at_once(config: Path, tmp_path: Path) -> None:
    patient = ("--set", "limits.drain_s=300")
    with started(config, tmp_path / "log", *patient, FAKE_ENGINE_DELAY_S="200") as job:
        job.wait_for(f"rows 0/{ROWS}")
        time.sleep(3)
        job.process.send_signal(signal.SIGINT)
        job.wait_for("keeping what is finished")
        asked = time.monotonic()
        job.process.send_signal(signal.SIGINT)
        code, result, log = job.end()
    assert time.monotonic() - asked < 100  # a row takes 200 s
    assert (code, result["status"]) == (75, "interrupted"), log
    assert "at once" in result["error"]


def test_a_killed_driver_costs_no_more_than_its_last_journal_interval(
    config: Path, tmp_path: Path, one_ray: LocalCluster
) -> None:
    out = tmp_path / "out"
    with started(config, tmp_path / "log", **SLOWLY) as job:
        job.wait_for_files(out, "_journal/*/*.parquet")
        job.process.kill()
        job.process.wait()
    while workers(one_ray, "ReplicaActor"):  # they end with it
        time.sleep(0.2)
    before = kept(out)
    code, result, log = nightly(config)
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
    assert json.loads((out / "_lease.json").read_text())["taken_over_from"]
    after = by_key(records(out))
    assert len(after) == ROWS
    assert_not_made_again(before, after)


def test_a_replica_whose_process_hangs_is_replaced(
    config: Path, tmp_path: Path, one_ray: LocalCluster
) -> None:
    out = tmp_path / "out"
    with started(config, tmp_path / "log", "--set", "limits.stall_s=12", **SLOWLY) as job:
        job.wait_for_files(out, "_journal/*/*.parquet")
        ((_, hung),) = workers(one_ray, "ReplicaActor")
        hung.suspend()
        code, result, log = job.end()
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
    assert "a replica was silent" in log
    assert re.search("restarts [1-9]", log)
    assert len(by_key(records(out))) == ROWS


def test_a_driver_that_was_paused_too_long_is_relieved_and_does_no_harm(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(config, tmp_path / "log", **SLOWLY) as job:
        job.wait_for_files(out, "_journal/*/*.parquet")
        suspend_driver(job.process, out)
        with started(config, tmp_path / "log-of-the-second") as second:
            second.wait_for("shards into")  # it has the lease; the first may hold all CPUs
            job.process.send_signal(signal.SIGCONT)
            late_code, late, _ = job.end()
            code, result, log = second.end()
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
    assert result["generated_rows"] < ROWS  # the paused one's replicas kept what they had
    assert (late_code, late["status"]) == (1, "failed")
    assert "was taken over by another driver" in late["error"]
    assert len(by_key(records(out))) == ROWS
    assert json.loads((out / "report.json").read_text())["exit_code"] == 0


def test_a_running_job_ends_at_its_deadline(config: Path, tmp_path: Path) -> None:
    more = ("--set", "limits.deadline=20s", "--set", "engine.overrides={max_num_seqs: 1}")
    code, result, log = nightly(config, *more, FAKE_ENGINE_DELAY_S="1")
    assert (code, result["status"]) == (75, "complete"), log
    assert result["rows"]["succeeded"] + result["rows"]["expired"] == ROWS
    assert len(by_key(records(tmp_path / "out"))) == ROWS
    assert result["seconds"] < 200


def test_at_the_deadline_the_rest_expires_and_can_be_reopened(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(config, tmp_path / "log", **SLOWLY) as job:
        job.wait_for_files(out, "_journal/*/*.parquet")
        job.process.send_signal(signal.SIGTERM)
        job.end()
    code, result, log = nightly(config, "--set", "limits.deadline=1s")
    assert (code, result["status"]) == (75, "complete"), log
    assert result["rows"]["succeeded"] + result["rows"]["expired"] == ROWS
    assert 0 < result["rows"]["expired"] < ROWS
    assert (out / "_SUCCESS").exists()
    first = by_key(records(out))
    assert len(first) == ROWS
    expired = [row for row in first.values() if row["status"] == "expired"]
    assert {row["error_code"] for row in expired} == {"batch_expired"}
    assert all(row["seed"] for row in expired)

    code, again, _ = nightly(config)
    assert (code, again["generated_rows"], again["rows"]) == (0, 0, result["rows"])

    code, result, log = nightly(config, "--retry", "expired")
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
    assert (out / "_SUCCESS").exists()
    before = {key: row for key, row in first.items() if row["status"] == "succeeded"}
    assert_not_made_again(before, by_key(records(out)))
    assert {key: row["seed"] for key, row in by_key(records(out)).items()} == {
        key: row["seed"] for key, row in first.items()
    }


def test_a_row_that_kills_the_engine_is_one_errored_record(config: Path, tmp_path: Path) -> None:
    prompts = [f"Say {number}{'~' if number == 123 else '.'}" for number in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    code, result, log = nightly(config, FAKE_ENGINE_FAULT="poison")
    assert (code, result["rows"]["succeeded"], result["rows"]["errored"]) == (0, ROWS - 1, 1), log
    after = by_key(records(tmp_path / "out"))
    assert after[123, 0]["error_code"] == "engine_fatal"
    assert len(after) == ROWS

    code, result, log = nightly(config, "--retry", "engine_fatal")
    assert (code, result["rows"]["succeeded"], result["generated_rows"]) == (0, ROWS, 1), log
    after.pop((123, 0))
    assert_not_made_again(after, by_key(records(tmp_path / "out")))


def test_a_row_that_ends_its_replicas_process_is_one_errored_record_over_two_starts(
    config: Path, tmp_path: Path
) -> None:
    out, rows = tmp_path / "out", 200
    prompts = [f"Say {number}{'~' if number == 123 else '.'}" for number in range(rows)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    ends = {"FAKE_ENGINE_FAULT": "exit"}
    small = ("--set", "limits.shard_rows=20", "--set", "limits.max_error_rate=0.1")
    with started(config, tmp_path / "log", *small, **ends) as job:
        job.wait_for_files(out, "_journal/*/*.json")
        job.process.send_signal(signal.SIGTERM)
        assert job.end()[0] == 75
    before = kept(out)
    code, result, log = nightly(config, *small, **ends)
    assert (code, result["rows"]["succeeded"], result["rows"]["errored"]) == (0, rows - 1, 1), log
    after = by_key(records(out))
    assert after[123, 0]["error_code"] == "engine_fatal"
    assert len(after) == rows
    assert_not_made_again(before, after)
    assert log.count(" ended: ") <= 10  # of 20 rows at most five halves, and three alone
    assert not list(out.glob("_journal/**/*.*"))


def test_too_many_errors_stop_the_run_early(config: Path, tmp_path: Path) -> None:
    prompts = [None if number % 3 else f"Say {number}." for number in range(4000)]
    pq.write_table(
        pa.table({"prompt": pa.array(prompts, pa.string())}), tmp_path / "in" / "a.parquet"
    )
    limits = ("--set", "limits.error_rate_min_rows=100")
    code, result, log = nightly(config, *limits, FAKE_ENGINE_DELAY_S="0.5")
    assert (code, result["status"]) == (3, "over_error_rate"), log
    assert "stopped early" in result["error"]
    assert sum(result["rows"].values()) < 2 * result["rows"]["total"]
    assert not (tmp_path / "out" / "_SUCCESS").exists()

    code, result, log = nightly(config, "--set", "limits.max_error_rate=1")
    assert (code, result["rows"]["total"]) == (0, 4000), log
    assert len(by_key(records(tmp_path / "out"))) == 4000


def test_an_output_that_cannot_be_written_is_an_error_that_can_be_mended(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "data").write_text("in the way")
    code, result, log = nightly(config)
    assert (code, result["status"]) == (1, "failed"), log
    assert f"file://{out}/data/part-" in result["error"]
    assert "Not a directory" in result["error"]
    assert "\n" not in result["error"]
    (out / "data").unlink()
    code, result, log = nightly(config)
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
