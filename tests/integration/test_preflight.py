"""``cluster.preflight`` on a real Ray cluster of three nodes, with a real S3 server.

One run sees everything but the model in order; the all-reduce is real, between processes of two
nodes at a time. Not covered: nodes on several machines, GPUs, NCCL.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import parts
from cluster.state import ClusterState
from pipeline import storage
from pipeline.profile import REPO_ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

INPUT = "s3://batch/preflight-input"
OUTPUT = "s3://batch/preflight-run"
ASK = """
import json, os, time
from functools import partial
import ray
from cluster.preflight.ray_crew import RayCrew
from pipeline.flow import cluster

@ray.remote(num_cpus=2)
class Replica:
    def node(self):
        return ray.get_runtime_context().get_node_id()

with cluster(local_cpus=1):
    replica = Replica.remote()
    where = ray.get(replica.node.remote())
    while ray.available_resources()["CPU"] > 4:  # Ray's books follow within a second
        time.sleep(0.1)
    crew = RayCrew()
    (busy,) = [node for node in crew.nodes if node.id == where]
    first, second = [node for node in crew.nodes if node.id != where]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    told = crew.ask({busy.id: partial(int, secret), first.id: os.getpid}, timeout_s=120)
    lost = crew.ask({second.id: partial(os._exit, 1)}, timeout_s=120)
    hung = crew.ask({first.id: partial(time.sleep, 600)}, timeout_s=1)
    again = crew.ask({first.id: os.getpid}, timeout_s=120)
print(json.dumps({
    "held": [busy.held_cpus, first.held_cpus, second.held_cpus],
    "refused": told[busy.id].reason,
    "lost": lost[second.id].reason,
    "hung": hung[first.id].reason,
    "same": again[first.id] == told[first.id],
}))
"""


def put_config(folder: Path) -> Path:
    """A job whose replicas take two nodes, and whose model has lost its last bytes."""
    model = folder / "model"
    shutil.copytree(REPO_ROOT / "cluster" / "models" / "mini-maverick", model)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(3_000_000)
    profile = yaml.safe_load((REPO_ROOT / "cluster/engines/mini-maverick-tp1.yaml").read_text())
    profile |= {"model": str(model)}
    profile["needs"] = {"nodes": 2, "cpus_per_node": 1, "memory_gib_per_node": 0.5}
    (folder / "two-nodes.yaml").write_text(yaml.safe_dump(profile))
    config = {
        "input": {"uri": f"{INPUT}/"},
        "output": {"uri": OUTPUT},
        "engine": {"profile": str(folder / "two-nodes.yaml")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def objects_below(cluster: ClusterState, prefix: str) -> int:
    listing = parts.s3_client(cluster).list_objects_v2(Bucket=cluster.bucket, Prefix=prefix)
    return int(listing["KeyCount"])


def preflight(config: Path) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.preflight", "--config", str(config), "--checksums"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    (line,) = done.stdout.splitlines()
    return done.returncode, json.loads(line), done.stderr


def test_each_node_is_asked_and_the_one_fault_is_found(
    mini_cluster: ClusterState, tmp_path: Path
) -> None:
    storage.put_bytes(f"{INPUT}/rows.parquet", b"PAR1")
    code, told, stderr = preflight(put_config(tmp_path))
    assert (code, told["status"]) == (1, "faults"), stderr
    assert told["checks"] == {
        **dict.fromkeys(
            ["capacity", "memory", "shared_memory", "versions", "clocks", "bucket", "all_reduce"],
            "ok",
        ),
        "gpus": "not_needed",
        "weights": "faults",
    }
    names = ["head", "node-1", "node-2"]
    (fault,) = told["faults"]
    assert sorted(fault["nodes"]) == names
    assert f"{tmp_path}/model/model.safetensors has 3000000 bytes" in fault["message"]
    assert f"weights: nodes {', '.join(fault['nodes'])}: {fault['message']}." in stderr
    assert sorted(node["name"] for node in told["nodes"]) == names
    assert all(node["versions"] and node["clock"] and node["store_clock"] for node in told["nodes"])
    groups = told["all_reduce"]
    assert [group["nodes"] for group in groups] == [["head", "node-1"], ["node-1", "node-2"]]
    assert all(group["backend"] == "gloo" and group["bus_gb_s"] > 0 for group in groups)
    assert objects_below(mini_cluster, "preflight-run") == 0, "a preflight leaves nothing"
    for secret in (mini_cluster.secret_key, mini_cluster.token):
        assert secret not in stderr + json.dumps(told)


def test_nodes_that_are_busy_hang_die_or_fail_give_an_answer(mini_cluster: ClusterState) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=600, cwd=REPO_ROOT
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["held"] == [2, 0, 0], "who holds everything is asked all the same"
    assert told["refused"] == "ValueError: invalid literal for int() with base 10: '***'"
    assert "the process there ended" in told["lost"]
    assert told["hung"] == "no answer within 1 s"
    assert told["same"], "a question that hangs keeps no other from being asked"
