"""``jobs.status``: what it makes of a run folder, live, dead or done, and of a folder of runs.

The folders are made by hand; tests/integration/test_status.py looks at those of a real job.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.status import Told, status, status_parser
from jobs.status_view import one_line
from pipeline.commit import Destination, commit_outcomes
from pipeline.errors import ErrorCode, ExitCode, InputError, RunMismatchError
from pipeline.index import IndexEntry
from pipeline.lease import LeaseRecord, LeaseState
from pipeline.live import Phase, Progress, Replicas, Start
from pipeline.observe import view_run, view_runs
from pipeline.plan import InputFile, Plan, Shard
from pipeline.progress import Rate
from pipeline.records import Completion, Failure, Outcome
from pipeline.report import RunStatus
from pipeline.run import find_run
from pipeline.status import RunView, State

FILE = InputFile("s3://b/a", 1, "v", 100, 100)
PLAN = Plan((FILE,), tuple(Shard(n, FILE.uri, 32 * n, min(32, 100 - 32 * n)) for n in range(4)))
"""Four shards, of 32, 32, 32 and 4 rows."""
JUST_NOW_S = -15.0
"""Written a moment ago: a lease of a live driver, also while a slow machine looks at it."""
LONG_AGO_S = 3600.0


@dataclass
class Folder:
    """A run folder made by hand."""

    path: Path
    owner: str = field(default="")

    @property
    def uri(self) -> str:
        return f"file://{self.path}"

    def put(self, name: str, document: object) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(json.dumps(document))

    def planned(self, done: int = 0, **config: Any) -> "Folder":
        """With ``run.json``, the plan, and the first ``done`` parts."""
        manifest = {
            "id": "run-1",
            "config": {
                "name": "nightly",
                "seed": 0,
                "sampling": {},
                "input": {"columns": {}},
                "output": {"carry": None},
                "engine": {"profile": "p"},
                **config,
            },
            "engine": {},
            "model": {"name": "m"},
            "input": {},
        }
        self.put("run.json", manifest)
        self.path.joinpath("_plan.json").write_text(PLAN.to_json())
        (self.path / "data").mkdir(exist_ok=True)
        for shard in range(done):
            (self.path / f"data/part-{shard:06d}.parquet").touch()
        return self

    def leased(self, state: LeaseState = LeaseState.HELD, age_s: float = JUST_NOW_S) -> "Folder":
        record = LeaseRecord.new().model_copy(update={"state": state})
        self.owner = record.owner
        self.put("_lease.json", {})
        (self.path / "_lease.json").write_bytes(record.to_bytes())
        os.utime(self.path / "_lease.json", (time.time() - age_s,) * 2)
        return self

    def told(self, phase: Phase, **changed: Any) -> "Folder":
        """With a ``_progress.json`` of the lease's owner."""
        start = Start(
            number=2,
            owner=self.owner,
            host="h",
            pid=1,
            version="0.1.0",
            began_at="2026-11-22T23:00:00+00:00",
            seconds=50.0,
        )
        of_start = {key: changed.pop(key) for key in [*changed] if key in Start.model_fields}
        first = start.model_copy(
            update={"number": 1, "owner": "o", "seconds": 10.0, "status": RunStatus.INTERRUPTED}
        )
        progress = Progress(
            run="run-1",
            phase=phase,
            written_at="2026-11-22T23:01:00+00:00",
            rows={"total": 100, "succeeded": 48, "errored": 2, "expired": 0, "cancelled": 0},
            rows_done=50,
            tokens={"prompt": 500, "completion": 1000, "cached": 0, "image": 0},
            errors={"timeout": 2},
            parts_not_counted=0,
            generated_rows=18,
            generated_tokens=300,
            lately=Rate(2.0, 40.0),
            overall=Rate(1.0, 20.0),
            replicas=Replicas(wanted=1, running=1),
            start=start.model_copy(update=of_start),
            earlier=(first,),
        )
        self.put("_progress.json", progress.model_copy(update=changed).model_dump(mode="json"))
        return self

    def reported(self, status: str, **changed: Any) -> "Folder":
        rows = {"total": 100, "succeeded": 97, "errored": 3, "expired": 0, "cancelled": 0}
        tokens = {"prompt": 1000, "completion": 2000, "cached": 5, "image": 6}
        told = {"rows": rows, "tokens": tokens, "errors": {"timeout": 3}, "seconds": 60.0}
        self.put("report.json", {"status": status, "exit_code": 0, **told, **changed})
        return self

    def finished(self, status: str = "complete") -> "Folder":
        self.planned(done=4).leased(LeaseState.RELEASED).reported(status)
        (self.path / "_SUCCESS").touch()
        return self

    def view(self) -> RunView:
        view = view_run(self.uri)
        assert view is not None
        return view


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "runs" / "2026-11-22")


def test_a_live_run_is_as_far_as_its_driver_says(folder: Folder) -> None:
    view = folder.planned(done=1).leased().told(Phase.RUNNING).view()
    assert view.state is State.RUNNING
    assert (view.rows_committed, view.rows_open, view.rows_done, view.rows_left) == (32, 18, 50, 50)
    assert (view.rows["succeeded"], view.errors, view.error_rate) == (48, {"timeout": 2}, 0.04)
    assert view.tokens_left == {"prompt": 500, "completion": 1000}
    assert view.eta_s == 25.0
    assert (view.starts_count, view.seconds) == (2, 60.0)
    assert one_line([view]) == "running  rows 50/100  40 tok/s  errored 2  ETA 0:25"


def test_a_minute_without_a_row_is_judged_by_the_whole_start(folder: Folder) -> None:
    view = folder.planned(done=1).leased().told(Phase.RUNNING, lately=Rate()).view()
    assert view.eta_s == 50.0
    view = folder.told(Phase.RUNNING, lately=Rate(), overall=Rate()).view()
    assert view.eta_s is None


@pytest.mark.parametrize(
    ("phase", "state"), [(Phase.STARTING, State.STARTING), (Phase.DRAINING, State.DRAINING)]
)
def test_a_driver_says_what_it_is_doing(folder: Folder, phase: Phase, state: State) -> None:
    assert folder.planned().leased().told(phase).view().state is state


def test_a_driver_that_has_said_nothing_yet_is_starting(folder: Folder) -> None:
    assert folder.leased().view().state is State.STARTING  # not even planned
    folder.planned(done=2)
    assert folder.view().state is State.STARTING
    folder.told(Phase.ENDED, status=RunStatus.INTERRUPTED)  # the driver before
    view = folder.leased().view()
    assert (view.state, view.rows_committed, view.exit_code) == (State.STARTING, 64, None)


def test_the_rows_of_a_dead_run_are_those_of_its_parts(folder: Folder) -> None:
    view = folder.planned(done=3).leased(age_s=LONG_AGO_S).told(Phase.RUNNING).view()
    assert (view.state, view.rows_committed, view.rows_done) == (State.DEAD, 96, 96)
    assert (view.eta_s, view.exit_code, view.error) == (None, None, None)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (RunStatus.INTERRUPTED, State.INTERRUPTED),
        (RunStatus.FAILED, State.FAILED),
        (RunStatus.OVER_ERROR_RATE, State.OVER_ERROR_RATE),
    ],
)
@pytest.mark.parametrize("lease", [LeaseState.RELEASED, LeaseState.HELD])
def test_a_run_that_stopped_says_why_also_if_its_lease_went_stale(
    folder: Folder, status: RunStatus, state: State, lease: LeaseState
) -> None:
    folder.planned(done=1).leased(lease, age_s=LONG_AGO_S)
    view = folder.told(Phase.ENDED, status=status, exit_code=9, error="because").view()
    assert (view.state, view.exit_code, view.error) == (state, 9, "because")
    assert (view.rows_done, view.rows_open) == (50, 18)


def test_a_run_of_a_version_without_progress_is_told_by_its_report(folder: Folder) -> None:
    folder.planned(done=1).leased(LeaseState.RELEASED)
    assert folder.view().state is State.INTERRUPTED
    view = folder.reported("failed", exit_code=1, error="because").view()
    assert (view.state, view.exit_code, view.error) == (State.FAILED, 1, "because")
    assert (view.rows_committed, view.tokens["completion"]) == (32, 2000)


@pytest.mark.parametrize("status", ["complete", "over_error_rate"])
def test_a_finished_run_is_told_by_its_report(folder: Folder, status: str) -> None:
    view = folder.finished(status).told(Phase.RUNNING).view()  # its last word was lost
    assert (view.state, view.rows_done, view.rows_left) == (State(status), 100, 0)
    assert (view.rows["errored"], view.tokens["image"]) == (3, 6)


def test_a_finished_run_without_report_is_told_by_its_parts(folder: Folder) -> None:
    folder.planned(limits={"max_error_rate": 0.05})
    to = Destination(folder.uri, "run-1", "m")
    for shard in PLAN.shards:
        numbers = range(shard.first_row, shard.first_row + shard.rows)
        outcomes: list[Outcome] = [
            Failure(row, "id", ErrorCode.TIMEOUT, "m", seed=0)
            if row < 6
            else Completion(row, "id", 0, "x", "stop", 10, 3, 2, 7, 1, 0.25)
            for row in numbers
        ]
        commit_outcomes(to, shard, outcomes, pa.table({"l": list(numbers)}))
    (folder.path / "_SUCCESS").touch()
    view = folder.view()
    assert (view.state, view.errors) == (State.OVER_ERROR_RATE, {"timeout": 6})
    assert (view.rows["succeeded"], view.tokens["completion"]) == (94, 282)


def test_a_finished_run_that_lost_a_part_is_open_again(folder: Folder) -> None:
    folder.finished().told(Phase.ENDED, status=RunStatus.COMPLETE, rows_done=100)
    (folder.path / "data/part-000001.parquet").unlink()
    view = folder.view()
    assert (view.state, view.rows_done, view.rows_left) == (State.INTERRUPTED, 68, 32)
    assert view.error == "1 of its parts are gone; the same command makes their rows again"


def test_what_the_run_before_in_the_same_folder_said_does_not_count(folder: Folder) -> None:
    view = folder.planned(done=1).leased().told(Phase.RUNNING, run="run-0").view()
    assert (view.state, view.rows_done, view.starts) == (State.STARTING, 32, ())


@pytest.mark.parametrize("name", ["_progress.json", "report.json"])
def test_a_damaged_word_of_the_driver_is_left_out(folder: Folder, name: str) -> None:
    folder.planned(done=1).leased(LeaseState.RELEASED)
    (folder.path / name).write_text("{")
    assert (folder.view().state, folder.view().rows_done) == (State.INTERRUPTED, 32)


def test_a_start_that_was_cut_short_before_its_plan_is_empty(folder: Folder) -> None:
    assert folder.leased(age_s=LONG_AGO_S).view().state is State.EMPTY


def entry(name: str, **changed: Any) -> IndexEntry:
    known: dict[str, Any] = {
        "run": f"s3://b/{name}",
        "id": "run-1",
        "name": "nightly",
        "profile": "p",
        "model": "m",
        "state": "complete",
        "exit_code": 0,
        "error": None,
        "rows_done": 100,
        "rows": {"total": 100, "succeeded": 99, "errored": 1, "expired": 0, "cancelled": 0},
        "tokens": {"prompt": 10, "completion": 20, "cached": 0, "image": 0},
        "errors": {"timeout": 1},
        "starts": 3,
        "seconds": 70.0,
        "began_at": f"{name}T01:00:00+00:00",
        "ended_at": None,
    }
    return IndexEntry(**{**known, **changed})


def indexed(folder: Path, name: str, **changed: Any) -> None:
    (folder / "_index").mkdir(parents=True, exist_ok=True)
    (folder / "_index" / f"{name}.json").write_text(entry(name, **changed).model_dump_json())


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs of every kind, and of what is none."""
    runs = tmp_path / "runs"
    indexed(runs, "2026-11-18")  # its folder is gone
    indexed(runs, "2026-11-19")
    (runs / "2026-11-19").mkdir()  # nothing of it is to be read
    indexed(runs, "2026-11-20", state="running", exit_code=None)
    Folder(runs / "2026-11-20").planned(done=1).leased(age_s=LONG_AGO_S).told(
        Phase.RUNNING, began_at="2026-11-20T01:00:00+00:00"
    )
    Folder(runs / "2026-11-22").planned(done=2).leased().told(Phase.RUNNING)
    Folder(runs / "old-version").finished()
    Folder(runs / "damaged").put("run.json", [])
    (runs / "prompts").mkdir()
    Folder(runs / "_scratch").planned()
    return runs


def test_a_folder_of_runs_is_its_index_and_what_the_index_does_not_know(runs: Path) -> None:
    views = view_runs(f"file://{runs}")
    assert {Path(view.uri).name: view.state for view in views} == {
        "2026-11-22": State.RUNNING,
        "2026-11-20": State.DEAD,
        "2026-11-19": State.COMPLETE,
        "2026-11-18": State.GONE,
        "old-version": State.COMPLETE,
        "damaged": State.UNREADABLE,
    }
    dated = [Path(view.uri).name for view in views if "2026" in Path(view.uri).name]
    assert dated == ["2026-11-22", "2026-11-20", "2026-11-19", "2026-11-18"]
    (done,) = [view for view in views if view.uri.endswith("19")]
    assert (done.rows_done, done.tokens["completion"], done.seconds) == (100, 20, 70.0)


def test_an_entry_from_before_a_retry_does_not_pass_for_the_present(runs: Path) -> None:
    """A driver writes the entry when it begins, too."""
    Folder(runs / "2026-11-19").planned(done=3).leased().told(Phase.RUNNING)
    indexed(runs, "2026-11-19", state="running", exit_code=None)
    (view,) = [view for view in view_runs(f"file://{runs}") if view.uri.endswith("19")]
    assert view.state is State.RUNNING


def test_an_entry_of_a_run_that_stopped_early_is_not_the_last_word(runs: Path) -> None:
    rows = {"total": 100, "succeeded": 10, "errored": 40, "expired": 0, "cancelled": 0}
    indexed(runs, "2026-11-20", state="over_error_rate", exit_code=3, rows=rows, rows_done=50)
    (view,) = [view for view in view_runs(f"file://{runs}") if view.uri.endswith("20")]
    assert view.state is State.DEAD  # somebody has started it again since


def test_a_damaged_entry_is_left_out(runs: Path) -> None:
    (runs / "_index" / "old-version.json").write_text("{}")
    (view,) = [view for view in view_runs(f"file://{runs}") if view.uri.endswith("old-version")]
    assert (view.state, view.rows_done) == (State.COMPLETE, 100)


def told(uri: Path, *arguments: str) -> Told:
    return status(status_parser("tests").parse_args([str(uri), *arguments]))


def test_the_last_line_is_the_contracts_with_the_runs_own_status(folder: Folder) -> None:
    line = told(folder.finished().path).to_json()
    assert line["rows"] == {
        "total": 100,
        "succeeded": 97,
        "errored": 3,
        "expired": 0,
        "cancelled": 0,
    }
    assert line["tokens"] == {"prompt": 1000, "completion": 2000, "cached": 5, "image": 6}
    assert (line["status"], line["run"]) == ("complete", folder.uri)
    assert (line["seconds"], line["exit_code"]) == (60.0, 0)
    assert "lease" not in line


def test_json_has_everything(folder: Folder) -> None:
    line = told(folder.planned(done=1).leased().told(Phase.RUNNING).path, "--json").to_json()
    assert line["rate_lately"] == {"rows_per_s": 2.0, "tokens_per_s": 40.0}
    assert line["replicas"]["running"] == 1
    assert (line["lease"]["lives"], line["lease"]["owner"]) == (True, folder.owner)
    assert [start["number"] for start in line["starts_known"]] == [1, 2]
    assert json.loads(json.dumps(line)) == line


def test_of_a_folder_the_last_line_has_sums_and_json_every_run(runs: Path) -> None:
    line = told(runs).to_json()
    assert (line["status"], line["run"]) == ("runs", f"file://{runs}")
    assert (line["rows"]["total"], line["tokens"]["completion"]) == (500, 20 + 20 + 1000 * 2 + 2000)
    assert line["runs_by_status"]["complete"] == 2
    assert "runs" not in line
    assert len(told(runs, "--json").to_json()["runs"]) == 6


def test_strictly_only_a_complete_run_is_fine(folder: Folder, runs: Path) -> None:
    assert told(runs / "old-version", "--fail-unless-done").exit_code is ExitCode.DONE
    assert told(runs / "2026-11-20").exit_code is ExitCode.DONE
    assert told(runs / "2026-11-20", "--fail-unless-done").exit_code is ExitCode.FAILED
    assert told(runs, "--fail-unless-done").exit_code is ExitCode.FAILED
    only_gone = runs.parent / "gone"
    indexed(only_gone, "2026-11-18")
    assert told(only_gone, "--fail-unless-done").exit_code is ExitCode.DONE


def test_no_run_is_refused_with_the_place_that_was_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"file://{tmp_path}/nowhere: there is no run"):
        told(tmp_path / "nowhere")


def test_another_programs_run_json_is_refused(folder: Folder) -> None:
    folder.put("run.json", {"by": "somebody"})
    with pytest.raises(RunMismatchError, match=r"run\.json is not this program's"):
        told(folder.path)


def run_status(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.status", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )


def test_a_page_is_for_people_and_the_last_line_for_machines(folder: Folder) -> None:
    folder.planned(done=1).leased(LeaseState.RELEASED)
    folder.told(Phase.ENDED, status=RunStatus.FAILED, exit_code=1, error="[died] planted-secret")
    with run_status(str(folder.path), SOME_SECRET="planted-secret") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    (line,) = stdout.splitlines()
    assert (json.loads(line)["status"], json.loads(line)["run_error"]) == ("failed", "[died] ***")
    for words in ("failed", "50 of 100 done", "18 in open shards", "2 timeout", "[died] ***"):
        assert words in stderr
    assert "planted" not in stderr


def test_a_store_that_is_not_there_is_exit_2() -> None:
    with run_status("s3://bucket/runs", AWS_ENDPOINT_URL="http://127.0.0.1:9") as process:
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "s3://bucket/runs: the bucket cannot be reached" in json.loads(stdout)["error"]


def test_who_watches_may_leave_at_any_time(folder: Folder) -> None:
    folder.planned(done=1).leased().told(Phase.RUNNING)
    with run_status(str(folder.path), "--watch") as process:
        assert process.stderr is not None
        assert "rows 50/100" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["status"] == "running"


def test_watching_ends_with_the_run(folder: Folder) -> None:
    arguments = argparse.Namespace(
        uri=str(folder.finished().path), watch=True, json=False, fail_unless_done=False
    )
    assert status(arguments).status == "complete"


def test_an_annotated_dataset_is_no_damaged_run(tmp_path: Path) -> None:
    Folder(tmp_path).planned()
    manifest = json.loads((tmp_path / "run.json").read_text())
    Folder(tmp_path).put("run.json", {**manifest, "job": "annotate"})
    (tmp_path / "_plan.json").unlink()
    for look in (view_run, find_run):  # its remedy is not --new-run, which would discard it
        with pytest.raises(RunMismatchError, match=r"annotated dataset, .*/_runs/") as caught:
            look(f"file://{tmp_path}")
        assert "--new-run" not in str(caught.value)
