"""Finding the processes of a run in a mini-cluster, and ending them.

Ray and vLLM write titles over their processes' environments, so a process is known by its title
and its ancestors: node's part -> raylet -> replica -> engine core -> workers. All are looked for
below the cluster's own processes: another cluster on the machine is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import psutil

from cluster import processes
from cluster.state import ClusterState

REPLICA = "ReplicaActor"
ENGINE = "VLLM::"
ENGINE_CORE = f"{ENGINE}EngineCore"
WORKER = f"{ENGINE}Worker"
_RAYLET = "raylet"


class Victim(StrEnum):
    """A process, and the blow it gets: SIGKILL, unless the name says SIGTERM."""

    DRIVER = "driver"
    REPLICA = "replica"
    ENGINE_CORE = "engine core"
    ENGINE_CORE_TERM = "engine core, SIGTERM"
    WORKER = "worker"
    WORKER_TERM = "worker, SIGTERM"
    RAYLET = "raylet"
    S3 = "S3 server"


ENGINES = frozenset(
    {Victim.ENGINE_CORE, Victim.ENGINE_CORE_TERM, Victim.WORKER, Victim.WORKER_TERM}
)
"""What an engine without a model has not."""
WORKERS = frozenset({Victim.WORKER, Victim.WORKER_TERM})
"""What an engine of one rank has not."""
TERMINATED = frozenset({Victim.ENGINE_CORE_TERM, Victim.WORKER_TERM})


@dataclass(frozen=True)
class Found:
    """A process of the cluster, and the node whose part it is."""

    process: psutil.Process
    node: str
    name: str
    title: str


def replicas(state: ClusterState) -> list[Found]:
    """The replicas' processes, on whatever nodes."""
    return [one for one in _of_nodes(state) if REPLICA in one.title]


def engine_processes(state: ClusterState, title: str) -> list[Found]:
    """Engine cores (``ENGINE_CORE``), workers (``WORKER``) or both (``ENGINE``).

    Those whose replica is gone are among them.
    """
    return [one for one in _of_nodes(state) if title in one.title]


def raylets(state: ClusterState) -> list[Found]:
    """The raylets of the nodes besides the head."""
    return [one for one in _of_nodes(state) if one.name == _RAYLET]


def with_replica(state: ClusterState, candidates: Sequence[Found]) -> list[Found]:
    """Those of the candidates whose node holds a replica."""
    nodes = {one.node for one in replicas(state)}
    return [one for one in candidates if one.node in nodes]


def owned_engines(state: ClusterState, title: str) -> list[Found]:
    """As ``engine_processes``, but only those below a living replica."""
    owners = {one.process.pid for one in replicas(state)}
    return [one for one in engine_processes(state, title) if owners & _ancestors(one.process)]


def kill(process: psutil.Process) -> None:
    """SIGKILL that very process; none if it is gone (psutil compares start times)."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def terminate(process: psutil.Process) -> None:
    """SIGTERM to that very process, as service managers and batch systems send it."""
    try:
        process.terminate()
    except psutil.NoSuchProcess:
        return


def _of_nodes(state: ClusterState) -> list[Found]:
    return [
        found
        for part in state.nodes
        for process in processes.find(state.part_group(part.name))
        if (found := _look(process, part.name)) is not None
    ]


def _look(process: psutil.Process, node: str) -> Found | None:
    try:
        return Found(process, node, process.name(), " ".join(process.cmdline()))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _ancestors(process: psutil.Process) -> set[int]:
    try:
        return {parent.pid for parent in process.parents()}
    except psutil.NoSuchProcess:
        return set()
