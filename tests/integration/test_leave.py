"""A node that is taken away in order, then the head: no row that an engine began is lost.

What a pod's ``preStop`` does, on a cluster of its own, with the echo engine, which writes down what
it is asked. Not covered: the time that a real engine takes to end.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.local import ClusterOptions, LocalCluster
from cluster.state import ClusterState
from pipeline.profile import REPO_ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(900)]

ROWS = 20_000  # more than can be done until the end
ROW_S = 4  # an engine holds what takes it three times as long, some shards nothing of it
WITHIN_S = 240
SUBMIT = """
import sys
from ray.job_submission import JobSubmissionClient
dashboard, entrypoint, *variables = sys.argv[1:]
environment = {"env_vars": dict(item.split("=", 1) for item in variables)}
JobSubmissionClient(dashboard).submit_job(
    entrypoint=entrypoint, submission_id="job", runtime_env=environment
)
"""
DRAIN = """
import sys
from ray.util.state import list_actors, list_nodes
from cluster.leave import drain_node
dashboard, within_s = sys.argv[1:]
(head,) = (node for node in list_nodes(dashboard) if node.is_head_node)
alive = list_actors(dashboard, filters=[("state", "=", "ALIVE")], raise_on_missing_output=False)
replicas = [actor.node_id for actor in alive if "ReplicaActor" in actor.class_name]
away = next(node for node in replicas if node != head.node_id)
sys.exit(0 if drain_node(dashboard, away, int(within_s)) else "actors are left on the node")
"""
"""What ``preStop`` does on a worker, which is named, as all nodes here are on one machine."""


def run(state: ClusterState, *arguments: str) -> None:
    """Run Python at the cluster, in a process of its own: Ray reads its token once in each."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO_ROOT,
        env={**os.environ, **state.environment(), "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def wait_until(ready: Callable[[], bool], why: str) -> None:
    """Poll until ``ready``, for five minutes at most."""
    until = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < until, why
        time.sleep(0.2)


def asked(folder: Path) -> dict[str, list[int]]:
    """Seeds of the requests that each engine got, by its process."""
    files = {path.name: path.read_text() for path in folder.iterdir()}
    return {name: [int(seed) for seed in text.split()] for name, text in files.items()}


def kept(out: Path) -> list[int]:
    """Seeds of the records in committed parts and journals."""
    paths = [*out.glob("data/*.parquet"), *out.glob("_journal/*/*.parquet")]
    return [seed for path in paths for seed in pq.read_table(path)["seed"].to_pylist()]


def test_no_row_that_an_engine_began_is_lost_or_made_twice(tmp_path: Path) -> None:
    calls, out = tmp_path / "calls", tmp_path / "out"
    for folder in (calls, tmp_path / "in"):
        folder.mkdir()
    prompts = [f"Say {number}." for number in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    document = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(out)},
        "engine": {"profile": "mini-maverick-tp1", "replicas": 2},
        # only what a drain writes down, which has time
        "limits": {"journal_s": 60, "journal_rows": 100_000, "drain_s": 120},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))

    def engines(count: int) -> bool:
        """Whether so many have begun something."""
        return sum(map(bool, asked(calls).values())) >= count

    # Each node holds one replica; of three that stay, one is left to prepare rows.
    size = ClusterOptions(nodes=3, cpus_per_node=1)
    with LocalCluster(tmp_path / "state", size) as cluster:
        state = cluster.state
        run(
            *(state, "-c", SUBMIT, state.dashboard_url),
            f"{sys.executable} -m tests.integration.nightly_with_fake_engine "
            f"--config {tmp_path / 'job.yaml'}",
            *(
                f"PYTHONPATH={REPO_ROOT}",
                f"FAKE_ENGINE_CALLS={calls}",
                f"FAKE_ENGINE_DELAY_S={ROW_S}",
            ),
        )
        wait_until(lambda: engines(2), "two engines do not begin")
        run(state, "-c", DRAIN, state.dashboard_url, str(WITHIN_S))
        wait_until(lambda: engines(3), "no engine begins in place of the one that left")
        run(state, "-m", "cluster.leave", "--within", str(WITHIN_S))  # finds itself on the head
        logs = state.directory.glob("head/ray/session_*/logs/job-driver-job.log")
        log = "".join(path.read_text() for path in logs if not path.parent.parent.is_symlink())
    assert "this replica takes nothing more" in log
    assert json.loads((out / "report.json").read_text())["exit_code"] == 75, log
    began = [seed for seeds in asked(calls).values() for seed in seeds]
    assert len(set(began)) == len(began) < ROWS
    assert sorted(kept(out)) == sorted(began)
