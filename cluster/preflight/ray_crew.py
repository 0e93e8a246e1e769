"""The crew on a Ray cluster: one process per node, pinned there, that takes no CPU from anybody.

In: RAY_ADDRESS, or this machine alone. Out: a ``Crew``. Scouts hold neither CPUs nor memory in
Ray's books, so a cluster whose replicas hold everything can still be looked at.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node  # there is no public one by node
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.preflight.crew import Node, Unanswered
from jobs import signals
from pipeline.flow import cluster, cluster_grows
from pipeline.ray_cluster import node_capacity
from pipeline.redact import configure_logging, redacted_text

T = TypeVar("T")

_GIB = 2**30
_POLL_S = 0.25
"""Between two looks for a signal, while an answer is waited for."""
_QUESTIONS_AT_A_TIME = 8
"""Of one scout: a question that hangs must not keep the next from being asked."""


class _Scout:
    """The process on a node."""

    def __init__(self) -> None:
        configure_logging(logging.WARNING, "%(message)s")
        logging.getLogger("cluster.preflight").setLevel(logging.INFO)

    def answer(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - becomes a fault; secrets of this node stay here
            return Unanswered(redacted_text(f"{type(error).__name__}: {error}"))


class RayCrew:
    """Scouts on all live nodes of the connected cluster."""

    def __init__(self) -> None:
        self.grows = cluster_grows()
        free = available_resources_per_node()
        alive = [node for node in ray.nodes() if node["Alive"]]
        names = _names(alive)
        self.nodes: Sequence[Node] = [
            _node(node, name, free.get(node["NodeID"], node["Resources"]))
            for node, name in zip(alive, names, strict=True)
        ]
        self._scouts = {node.id: _hire(node.id, gpus=0) for node in self.nodes}

    def ask(
        self, questions: Mapping[str, Callable[[], T]], *, timeout_s: float, gpus: int = 0
    ) -> dict[str, T | Unanswered]:
        """As ``Crew.ask``."""
        scouts = {id_: _hire(id_, gpus=gpus) if gpus else self._scouts[id_] for id_ in questions}
        asked = {id_: scouts[id_].answer.remote(question) for id_, question in questions.items()}
        until = time.monotonic() + timeout_s
        answers = {id_: _answer(ref, until, timeout_s) for id_, ref in asked.items()}
        if gpus:
            for scout in scouts.values():
                ray.kill(scout)
        return answers


@contextmanager
def ray_crew(local_cpus: int) -> Iterator[RayCrew]:
    """The nodes of the cluster in RAY_ADDRESS, else of a Ray of ``local_cpus`` in this process.

    Raises:
        CapacityError, EngineError: as ``flow.cluster``.
    """
    with cluster(local_cpus=local_cpus):
        yield RayCrew()


def _hire(node_id: str, *, gpus: int) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    scout = ray.remote(
        num_cpus=0,
        num_gpus=gpus,
        max_restarts=0,
        max_concurrency=_QUESTIONS_AT_A_TIME,
        scheduling_strategy=pinned,
    )(_Scout)
    return scout.remote()


def _answer(ref: Any, until: float, timeout_s: float) -> Any:
    try:
        while not ray.wait([ref], timeout=_POLL_S)[0] and time.monotonic() < until:
            signals.check()
        return ray.get(ref, timeout=0)
    except GetTimeoutError:
        return Unanswered(f"no answer within {timeout_s:g} s")
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Unanswered(redacted_text(f"the process there ended ({lines[-1]})"))


def _node(node: Mapping[str, Any], name: str, free: Mapping[str, float]) -> Node:
    total = node["Resources"]
    return Node(
        id=node["NodeID"],
        name=name,
        address=node["NodeManagerAddress"],
        capacity=node_capacity(name, node["Resources"]),
        object_store_gib=total.get("object_store_memory", 0.0) / _GIB,
        held_cpus=total.get("CPU", 0.0) - free.get("CPU", 0.0),
        held_gpus=total.get("GPU", 0.0) - free.get("GPU", 0.0),
    )


def _names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name a node was started with, else its host's; with a piece of its id where two agree."""
    names = [
        node["NodeManagerHostname"]
        if node["NodeName"] == node["NodeManagerAddress"]
        else node["NodeName"]
        for node in nodes
    ]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name} ({node['NodeID'][:6]})"
        for name, node in zip(names, nodes, strict=True)
    ]
