"""A real job, looked at from outside while it runs, once it was killed, and when it is done.

On a real Ray, with the echo engine. The run is of a day of its own, and resumed without naming it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.status import Told, status, status_parser
from pipeline.index import read_index
from pipeline.observe import view_run, view_runs
from pipeline.status import RunView, State
from tests.integration.fake_job import RunningJob, nightly, started

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.usefixtures("one_ray")]

ROWS = 400
DAY = "2026-11-22"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / f"in-{DAY}").mkdir()
    prompts = [f"Say {number}." for number in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / f"in-{DAY}" / "a.parquet")
    document = {
        "input": {"uri": f"{tmp_path}/in-{{date}}"},
        "output": {"uri": f"{tmp_path}/runs/{{date}}"},
        "engine": {"profile": "mini-maverick-tp1", "overrides": {"max_num_seqs": 8}},
        "limits": {"shard_rows": 50, "journal_s": 0.5},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "job.yaml"


def seen(run: Path, ready: Callable[[RunView], object], job: RunningJob | None = None) -> RunView:
    """The run, once it is as it should be; ``job`` has to live meanwhile."""
    while True:
        assert job is None or job.process.poll() is None, job.log.read_text()
        view = view_run(f"file://{run}")
        if view is not None and ready(view):
            return view
        time.sleep(0.2)


def told(run: Path) -> Told:
    return status(status_parser("tests").parse_args([str(run)]))


def test_a_run_is_seen_while_it_lives_when_it_is_dead_and_when_it_is_done(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / DAY
    with started(config, tmp_path / "log", "--date", DAY, FAKE_ENGINE_DELAY_S="0.5") as job:
        live = seen(run, lambda view: view.state is State.RUNNING and view.rows_committed, job)
        pid = job.process.pid
        job.process.kill()
        job.process.wait()
    assert live.lease is not None
    assert live.lease.record.pid == pid
    assert (live.rows_total, live.exit_code, live.starts_count) == (ROWS, None, 1)

    dead = seen(run, lambda view: view.state is State.DEAD)
    parts = [pq.read_metadata(path).num_rows for path in (run / "data").glob("*.parquet")]
    assert dead.rows_committed == sum(parts)
    assert 0 < dead.rows_left < ROWS
    assert told(run).to_json()["status"] == "dead"
    assert [view.state for view in view_runs(f"file://{tmp_path}/runs")] == [State.DEAD]

    code, result, log = nightly(config, "--resume-latest")
    assert (code, result["run"], result["rows"]["succeeded"]) == (0, f"file://{run}", ROWS), log
    assert f"runs/{DAY} is the newest of 1 folders" in log
    done = seen(run, lambda view: not view.state.live)
    assert (done.state, done.rows_done, done.exit_code) == (State.COMPLETE, ROWS, 0)
    assert done.rows == {key: n for key, n in result["rows"].items() if key != "total"}
    assert done.tokens == result["tokens"]
    assert [(start.number, start.status) for start in done.starts] == [(1, None), (2, "complete")]
    assert done.starts[1].generated_rows == result["generated_rows"] < ROWS
    assert json.loads((run / "run.json").read_text())["config"]["date"] == DAY
    (entry,) = read_index(f"file://{tmp_path}/runs").values()
    assert entry.finished
    assert (entry.starts, entry.tokens) == (2, result["tokens"])
