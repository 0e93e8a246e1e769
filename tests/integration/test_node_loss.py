"""A node that dies in the middle of a run costs the shards it had open, not the run.

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

from cluster.local import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(400)]

ROWS = 600


def nodes_with_replicas() -> set[str]:
    """Names of the nodes (their processes' working folders) that hold a replica's actor."""
    found = set()
    for process in psutil.process_iter():
        try:
            if "ReplicaActor" in " ".join(process.cmdline()):
                found.add(Path(process.cwd()).name)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_run_goes_on_without_a_node_that_died(tmp_path: Path) -> None:
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
    with LocalCluster(tmp_path / "state") as cluster:
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
            (victim, *_) = sorted(nodes_with_replicas() & {"node-1", "node-2"})
            cluster.kill_node(int(victim.removeprefix("node-")))
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
