"""How a preflight asks nodes: questions are functions that run there, and answers may fail to come.

A node that hangs, or whose process dies, is an answer too: ``Unanswered``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cluster.preflight.findings import Check, Fault, shared
from pipeline.capacity import NodeCapacity

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Node:
    """One live node of the cluster."""

    id: str
    name: str
    """For people, different for each node."""
    address: str
    """The one that other nodes reach it by."""
    capacity: NodeCapacity
    object_store_gib: float
    """What Ray's object store may take of the shared memory."""
    held_cpus: float = 0
    held_gpus: float = 0
    """Of its CPUs and GPUs, those that somebody's tasks and actors hold now."""

    @property
    def held(self) -> bool:
        """Whether anybody works there."""
        return self.held_cpus > 0 or self.held_gpus > 0


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Why a node gave no answer; without secrets."""

    reason: str


class Crew(Protocol):
    """The nodes, and a process on each that answers questions about it."""

    @property
    def nodes(self) -> Sequence[Node]:
        """Those that were alive at the start."""

    @property
    def grows(self) -> bool:
        """Whether an autoscaler adds nodes for replicas that wait."""

    def ask(
        self, questions: Mapping[str, Callable[[], T]], *, timeout_s: float, gpus: int = 0
    ) -> dict[str, T | Unanswered]:
        """Each question (picklable) is answered on the node whose id is its key, all at once.

        With ``gpus``, the process that answers holds that many of the node's, and sees no other.
        """


def split(answers: Mapping[str, T | Unanswered]) -> tuple[dict[str, T], dict[str, str]]:
    """The answers, and why the others have none; by node."""
    came = {node: one for node, one in answers.items() if not isinstance(one, Unanswered)}
    missing = {node: one.reason for node, one in answers.items() if isinstance(one, Unanswered)}
    return came, missing


def silent(check: Check, names: Mapping[str, str], missing: Mapping[str, str]) -> list[Fault]:
    """The faults of nodes that did not answer; ``names`` and ``missing`` by node id."""
    advice = "see to the node, and try again"
    return shared(check, ((names[node], f"{why}; {advice}") for node, why in missing.items()))
