"""A node that dies in the middle of a run costs the seconds since its last journal, not the run.

Both worker nodes die, one after the other; one comes back in between, the other never does. A
replica needs a whole node, and the head, which is too small for one, reads the rows.

A cluster of its own, as it is broken on purpose. The engine is the echo engine: what is tested is
the way around it. Not covered: losing the head node, which ends the job (run it again to resume).
"""

import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.local import ClusterOptions, LocalCluster
from pipeline.profile import load_profile
from tests.integration.fake_job import started, workers

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(900)]

ROWS = 4000
"""Two minutes at the engine's first pace: still at it when the node is back, on a busy machine."""


def nodes_with(cluster: LocalCluster, mark: str) -> set[str]:
    return {node for node, _ in workers(cluster, mark)}


def test_a_run_survives_the_loss_of_a_node_and_uses_the_one_that_comes_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"prompt": [f"Say {i}." for i in range(ROWS)]}), tmp_path / "in" / "a.parquet"
    )
    profile = load_profile("mini-maverick-tp1").model_dump(mode="json", exclude_none=True)
    profile["needs"]["cpus_per_node"] = 2  # a whole node: the head's CPU is left to read rows
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    config = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": str(tmp_path / "profile.yaml"), "replicas": 2},
        "limits": {"shard_rows": 50},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    with LocalCluster(tmp_path / "state", ClusterOptions(head_cpus=1)) as cluster:
        slowly = {"FAKE_ENGINE_DELAY_S": "4", "FAKE_ENGINE_HURRY": str(tmp_path / "hurry")}
        variables = {**cluster.state.environment(), **slowly}
        with started(tmp_path / "job.yaml", tmp_path / "log", **variables) as job:
            job.wait_for("tok/s")
            cluster.kill_node(1)
            time.sleep(5)
            back = cluster.add_node()
            cluster.kill_node(2)
            while back not in nodes_with(cluster, "ReplicaActor"):
                time.sleep(0.1)
                assert job.process.poll() is None, "the node that came back was not used"
            (tmp_path / "hurry").touch()
            code, result, log = job.end(timeout_s=600)
    assert (code, result["status"]) == (0, "complete"), log
    assert result["rows"] == {
        "total": ROWS,
        "succeeded": ROWS,
        "errored": 0,
        "expired": 0,
        "cancelled": 0,
    }
    rows = ds.dataset(tmp_path / "out" / "data").to_table(columns=["input_row"])
    assert sorted(rows.column("input_row").to_pylist()) == list(range(ROWS))
    assert re.search(r"replica \d of 2 (lost its node|ended)", log)
