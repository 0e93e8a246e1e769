"""A run on nodes that Ray's own autoscaler brings: none is there when it begins, none stays after.

The autoscaler, the job and its Ray nodes are real; GPUs are only numbers, and the engine is the
echo engine. Not covered: a cloud that has no nodes to give.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.profile import load_profile
from tests.integration import fake_job
from tests.integration.autoscaled import Autoscaled, autoscaled
from tests.variables import without_ray
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROWS = 1200  # more than one replica could end before the second is up
WORKER = {
    "CPU": 2,
    "GPU": 8,
    "accelerator_type:H100": 1,
    "memory": 4 * 2**30,
    "object_store_memory": 100 * 2**20,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    with autoscaled(head_cpus=1, worker=WORKER, most=2) as found:
        yield found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A job of two or three replicas with a node's GPUs each."""
    prompts = pa.table({"prompt": [f"Say {i}." for i in range(ROWS)]})
    (tmp_path / "in").mkdir()
    pq.write_table(prompts, tmp_path / "in" / "a.parquet")
    document = load_profile("mini-maverick-tp1").model_dump(mode="json", exclude_none=True)
    document["engine_args"]["tensor_parallel_size"] = 8  # as many ranks as GPUs
    document["needs"] = {
        "nodes": 1,
        "gpus_per_node": 8,
        "accelerator": "H100",
        "cpus_per_node": 1,
        "memory_gib_per_node": 1,
    }
    (tmp_path / "h100.yaml").write_text(yaml.safe_dump(document))
    job = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": str(tmp_path / "h100.yaml"), "replicas": {"min": 1, "max": 3}},
        "limits": {"shard_rows": 20},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path / "job.yaml"


def run(cluster: Autoscaled, module: str, config: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, last line and log of a job."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--config", str(config)],
        env={**without_ray(), **cluster.address_variables},
        capture_output=True,
        text=True,
        timeout=400,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def unwrapped(log: str) -> str:
    """Without the lines that a table breaks sentences into."""
    return " ".join(log.replace("│", " ").split())


def test_before_a_run_what_the_autoscaler_will_add_is_told(
    cluster: Autoscaled, config: Path
) -> None:
    told = "0 of 1 nodes have that"
    code, found, log = run(cluster, "cluster.preflight", config)
    assert (code, found["checks"]["capacity"]) == (0, "waits"), log
    assert told in found["waits"][0]
    assert cluster.nodes() == 1
    # last: where the plan's own tasks take long, the autoscaler brings a node for them
    code, _, log = run(cluster, "jobs.plan", config)
    assert code == 0, log
    assert told in unwrapped(log)
    assert "autoscaler is asked for more nodes" in unwrapped(log)


def test_nodes_come_for_the_replicas_that_wait_and_go_after_the_run(
    cluster: Autoscaled, config: Path
) -> None:
    wait_until(lambda: cluster.nodes() == 1, 200)  # the plan's, if one came, has gone
    hurry = config.parent / "hurry"
    variables = {"FAKE_ENGINE_DELAY_S": "20", "FAKE_ENGINE_HURRY": str(hurry)}
    with fake_job.started(
        config, config.parent / "log", **cluster.address_variables, **variables
    ) as job:
        wait_until(lambda: job.log.read_text().count("is up after") == 2, 400)
        hurry.touch()
        code, result, log = job.end()
    assert (code, result["rows"]["succeeded"]) == (0, ROWS), log
    rows = ds.dataset(config.parent / "out" / "data").to_table(columns=["input_row"])
    assert sorted(rows["input_row"].to_pylist()) == list(range(ROWS))
    report = json.loads((config.parent / "out" / "report.json").read_text())
    assert [replica["cold_starts"] for replica in report["replicas"]] == [1, 1]
    wait_until(lambda: cluster.nodes() == 1, 200)
