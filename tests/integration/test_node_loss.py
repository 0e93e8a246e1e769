"""A node that dies in the middle of a run costs the seconds since its last journal, not the run.

Both worker nodes die, one after the other, and one comes back in between. Each node has one CPU, so
that two replicas need the head and the one that came back.

A cluster of its own, as it is broken on purpose. The engine is the echo engine: what is tested is
the way around it. Not covered: losing the head node, which ends the job (run it again to resume).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.local import ClusterOptions, LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(400)]

ROWS = 2000  # still at it when the node is back, on a busy machine too


def nodes_with(cluster: LocalCluster, mark: str) -> set[str]:
    """Names of its nodes (their processes' working folders) with a worker that does this."""
    found = set()
    for process in psutil.process_iter():
        try:
            folder = Path(process.cwd())
            doing = " ".join(process.cmdline())
            if folder.is_relative_to(cluster.state.directory) and mark in doing:
                found.add(folder.name)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_run_survives_the_loss_of_a_node_and_uses_the_one_that_comes_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"prompt": [f"Say {i}." for i in range(ROWS)]}), tmp_path / "in" / "a.parquet"
    )
    config = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": "mini-maverick-tp1", "replicas": 2},
        "limits": {"shard_rows": 25},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    with LocalCluster(tmp_path / "state", ClusterOptions(cpus_per_node=1)) as cluster:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            **cluster.state.environment(),
            "FAKE_ENGINE_DELAY_S": "6",
        }
        command = [sys.executable, "-m", "tests.integration.nightly_with_fake_engine"]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(
                [*command, "--config", str(tmp_path / "job.yaml")],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as job,
        ):
            while "tok/s" not in (tmp_path / "log").read_text():
                time.sleep(0.2)
                assert job.poll() is None, (tmp_path / "log").read_text()
            first, *_ = sorted(nodes_with(cluster, "ReplicaActor") & {"node-1", "node-2"})
            (second,) = {"node-1", "node-2"} - {first}
            cluster.kill_node(int(first.removeprefix("node-")))
            time.sleep(5)
            back = cluster.add_node()
            cluster.kill_node(int(second.removeprefix("node-")))
            while back not in nodes_with(cluster, "ReplicaActor"):
                time.sleep(0.1)
                assert job.poll() is None, "the node that came back was not used"
            stdout, _ = job.communicate(timeout=300)
    result = json.loads(stdout)
    assert (job.returncode, result["status"]) == (0, "complete"), (tmp_path / "log").read_text()
    assert result["rows"] == {
        "total": ROWS,
        "succeeded": ROWS,
        "errored": 0,
        "expired": 0,
        "cancelled": 0,
    }
    rows = ds.dataset(tmp_path / "out" / "data").to_table(columns=["input_row"])
    assert sorted(rows.column("input_row").to_pylist()) == list(range(ROWS))
    assert "marked dead" in (tmp_path / "log").read_text()
