"""A Ray cluster with Ray's own autoscaler, whose nodes are processes on this machine.

Nodes are real Ray nodes; their GPUs are only numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)
from ray.util import get_node_ip_address

from cluster import parts, processes
from cluster.ports import free_ports
from pipeline.children import descendants, reap
from tests.variables import without_ray

_HEAD = "ray.head.default"
_MARKER = "AUTOSCALED_CLUSTER"
_NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
"""Ray would ask for one that lies around."""
_STARTS = 3
"""Of the head, which Ray gives 30 s to come up."""
_LISTS = (
    "cluster_synced_files",
    "head_setup_commands",
    "head_start_ray_commands",
    "initialization_commands",
    "setup_commands",
    "worker_setup_commands",
    "worker_start_ray_commands",
)


class LocalNodes(FakeMultiNodeProvider):
    """Ray's own provider of such nodes, for types that tell their memory, as real ones do."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Mapping[str, Any], labels: Any
    ) -> None:
        given = {key: value for key, value in resources.items() if key != "memory"}
        with self.lock:
            before = descendants()
            try:
                super()._create_node_with_resources_and_labels(
                    node_config, tags, count, given, labels
                )
            except Exception:  # not up within Ray's 30 s: the autoscaler tries again
                reap(descendants() - before)
                raise


class Autoscaled:
    """One that runs."""

    def __init__(self, address: str, group: processes.Group, log: Path) -> None:
        self.address = address
        self.group = group
        self.log = log

    @property
    def address_variables(self) -> dict[str, str]:
        """What a process that is to use it needs in its environment."""
        return {"RAY_ADDRESS": self.address, **_NO_TOKEN}

    def nodes(self) -> int:
        """That run, the head among them."""
        return sum(_name(process) == "raylet" for process in processes.find(self.group))


@contextmanager
def autoscaled(*, head_cpus: int, worker: Mapping[str, Any], most: int) -> Iterator[Autoscaled]:
    """A head, and up to ``most`` nodes with ``worker``'s resources, none of them there yet.

    A node that nobody uses for some seconds is taken away again.
    """
    for _ in range(_STARTS):
        cluster = _start(head_cpus, worker, most)
        try:
            if _is_up(cluster):
                yield cluster
                return
        finally:
            processes.stop(cluster.group)
            shutil.rmtree(cluster.group.directory, ignore_errors=True)
    raise AssertionError("Ray's patience with its head ended each time")


def _start(head_cpus: int, worker: Mapping[str, Any], most: int) -> Autoscaled:
    folder = Path(tempfile.mkdtemp(prefix="mv-grow-", dir="/tmp"))  # sockets: short
    gcs, dashboard, agent, environments, client = free_ports(5)
    address = f"{get_node_ip_address()}:{gcs}"
    (folder / "autoscaler.json").write_text(json.dumps(_config(address, worker, most)))
    marker = {_MARKER: uuid.uuid4().hex}
    head = processes.start(
        "head",
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--port={gcs}", f"--num-cpus={head_cpus}"),
            *("--num-gpus=0", f"--object-store-memory={100 * 2**20}"),
            *(f"--temp-dir={folder}", f"--autoscaling-config={folder / 'autoscaler.json'}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            f"--runtime-env-agent-port={environments}",
            *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={client}"),
            "--disable-usage-stats",
        ],
        environment={
            **without_ray(),
            **_NO_TOKEN,
            **marker,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            # the second autoscaler, as KubeRay and `ray up` have it
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_NODE_TYPE_NAME": _HEAD,
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            **parts.START_LIMITS,
        },
        directory=folder,
        log=folder / "log",
    )
    return Autoscaled(address, processes.Group([head], marker, folder), folder / "log")


def _config(address: str, worker: Mapping[str, Any], most: int) -> dict[str, Any]:
    types = {
        _HEAD: {"resources": {}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    return {
        "cluster_name": "autoscaled",
        "max_workers": most,
        "provider": {
            "type": "external",
            "module": f"{__name__}.{LocalNodes.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,  # they come with Ray
        },
        "available_node_types": types,
        "head_node_type": _HEAD,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        # read without a default, for providers of real machines
        **{key: {} for key in ("auth", "file_mounts")},
        **{key: [] for key in _LISTS},
    }


def _is_up(cluster: Autoscaled) -> bool:
    """Waits for the head; false if Ray had no more patience with it."""
    (head,) = cluster.group.records
    for _ in range(900):
        if "Ray runtime started" in cluster.log.read_text():
            return True
        if not processes.is_alive(head):
            assert parts.ray_gave_up(cluster.log), cluster.log.read_text()
            return False
        time.sleep(0.2)
    raise AssertionError(f"Ray did not start: {cluster.log.read_text()}")


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""
