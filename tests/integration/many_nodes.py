"""Replicas over two nodes each on up to 64 real Ray nodes: placed, lost, come back, given back.

``python -m tests.integration.many_nodes --nodes 64 --replicas 16``: 4 minutes and 16 GiB on two
cores, too much for ``make test`` (``test_places`` has three nodes). GPUs are only numbers, the
engine is the echo engine. Ends with 1 at the first thing that is not so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from pipeline.pool import Pool
from tests.integration.test_places import (
    NODE,
    TWO_NODES,
    all_is_given_back,
    free_gpus,
    groups,
    pool_of,
    up,
)
from tests.variables import variables

LOST = 3
PATIENCE_S = 300.0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=16)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="mv-many-", dir="/tmp") as folder,  # sockets: short
        variables({"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}),
    ):
        (Path(folder) / "ray").mkdir()
        head = {"num_cpus": 2, "num_gpus": 0, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            _try(cluster, arguments.nodes, arguments.replicas)
        finally:
            ray.shutdown()
            cluster.shutdown()
    return 0


def _try(cluster: Cluster, nodes: int, replicas: int) -> None:
    small_store = {**NODE, "object_store_memory": 80 * 2**20}
    for _ in range(nodes):
        cluster.add_node(wait=False, **small_store)
    ray.init(address=cluster.address, log_to_driver=False)
    while sum(node["Alive"] for node in ray.nodes()) < nodes + 1:
        time.sleep(0.5)
    _say(f"{nodes} nodes, {free_gpus():g} GPUs free")
    with pool_of(TWO_NODES, replicas) as pool:
        _until(pool, lambda: up(pool) == min(replicas, nodes // 2))
        _tell("placed", pool)
        used = _used()
        lost = [node for node in cluster.worker_nodes if node.node_id in used][:LOST]
        for node in lost:
            cluster.remove_node(node, allow_graceful=False)
        gone = {node.node_id for node in lost}
        left = min(replicas, (nodes - LOST) // 2)
        _until(pool, lambda: up(pool) == left and not gone & set(_used()))
        _tell(f"{LOST} nodes lost", pool)
        for _ in range(LOST):
            cluster.add_node(**small_store)
        _until(pool, lambda: up(pool) == min(replicas, nodes // 2))
        _tell(f"{LOST} nodes new", pool)
    if not all_is_given_back():
        raise SystemExit("not all is given back")
    _say(f"given back: {len(groups())} groups, {free_gpus():g} GPUs free")


def _used() -> list[str]:
    """Nodes in places, once for each."""
    return [node for places in groups().values() for node in places]


def _tell(what: str, pool: Pool[Any, Any, Any, Any]) -> None:
    used = _used()
    if len(used) != len(set(used)):
        raise SystemExit(f"{what}: a node is held twice")
    _say(f"{what}: {up(pool)} replicas up on {len(used)} nodes, {free_gpus():g} GPUs free")


def _until(pool: Pool[Any, Any, Any, Any], ready: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not ready():
        list(pool.step(0.1))
        if time.monotonic() > until:
            raise SystemExit(f"{up(pool)} replicas are up, {pool.lacking}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
