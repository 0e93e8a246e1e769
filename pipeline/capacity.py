"""What a replica takes of a cluster, whether that can hold it, and what is missing in plain words.

In: what one replica needs, a number of replicas, and what each node has, in total or free. Out: the
share to reserve on each node; sentences, none if it fits. The judgement is pure; what nodes have is
asked of Ray (``flow.cluster_nodes``) or, where no cluster is named, of this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.profile import EngineProfile, Needs

PREPARE_CPUS = 1
"""CPUs beside the replicas', to read and prepare rows with."""
_GIB = 2**30
_MEMORY_SLACK = 0.9
"""Ray reports 70-95 % of a node's memory as schedulable: 90 % of a need is asked for."""
_ACCELERATOR_SHARE = 0.001
"""Of a node's mark for its kind of GPU: enough to be put there, and never used up."""


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What one node has in total."""

    name: str
    cpus: float
    gpus: int
    memory_gib: float
    accelerator: str | None = None
    """Kind of its GPUs as Ray names it, e.g. H100."""


def this_machine(*, cpus: float) -> NodeCapacity | None:
    """This machine as the one node of a Ray with ``cpus``; None if it has GPUs, whose kind only
    Ray can tell."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    return NodeCapacity(
        name="this machine", cpus=cpus, gpus=0, memory_gib=psutil.virtual_memory().total / _GIB
    )


def bundles(needs: Needs) -> list[dict[str, float]]:
    """What one replica reserves, node by node, as Ray's resources."""
    share: dict[str, float] = {
        "CPU": needs.cpus_per_node,
        "memory": int(needs.memory_gib_per_node * _MEMORY_SLACK * _GIB),
    }
    if needs.gpus_per_node:
        share["GPU"] = needs.gpus_per_node
    if needs.accelerator is not None:
        share[f"accelerator_type:{needs.accelerator}"] = _ACCELERATOR_SHARE
    return [dict(share) for _ in range(needs.nodes)]


def waits_for(needs: Needs, free: Sequence[NodeCapacity]) -> str | None:
    """Why a place for one replica cannot be had of what ``free`` says the nodes have left; None if
    it can."""
    if not free:
        return "the cluster has no live node"
    fitting = sum(slots(node, needs) > 0 for node in free)
    if fitting >= needs.nodes:
        return None
    return _no_room(needs, free, fitting, " free")


def missing(profile: EngineProfile, replicas: int, nodes: Sequence[NodeCapacity]) -> list[str]:
    """What ``nodes`` lack to hold ``replicas`` of ``profile``; empty if they fit."""
    needs = profile.needs
    if not nodes:
        return ["the cluster has no live node"]
    fitting = [node for node in nodes if slots(node, needs) > 0]
    if len(fitting) < needs.nodes:
        return [_no_room(needs, nodes, len(fitting), "")]
    held = _replicas_held(fitting, needs)
    if held < replicas:
        return [
            f"{replicas} replicas of {_describe(needs)} were asked for, the cluster holds {held}"
        ]
    return []


def slots(node: NodeCapacity, needs: Needs) -> int:
    """How many replicas' shares fit on ``node`` at once."""
    if needs.accelerator is not None and node.accelerator != needs.accelerator:
        return 0
    count = int(node.cpus // needs.cpus_per_node)
    count = min(count, int(node.memory_gib // (needs.memory_gib_per_node * _MEMORY_SLACK)))
    if needs.gpus_per_node:
        count = min(count, node.gpus // needs.gpus_per_node)
    return count


def _replicas_held(nodes: Sequence[NodeCapacity], needs: Needs) -> int:
    """Most replicas that fit when each takes a share on ``needs.nodes`` different nodes.

    k replicas fit exactly if the nodes, each counted with at most k shares, have k x nodes shares.
    """
    counts = [slots(node, needs) for node in nodes]
    held = 0
    while sum(min(count, held + 1) for count in counts) >= (held + 1) * needs.nodes:
        held += 1
    return held


def _no_room(needs: Needs, nodes: Sequence[NodeCapacity], fitting: int, there: str) -> str:
    best = max(nodes, key=lambda node: (node.gpus, node.cpus, node.memory_gib))
    kind = f" {best.accelerator}" if best.accelerator else ""
    return (
        f"a replica needs {_describe(needs)}; {fitting} of {len(nodes)} nodes have that{there} "
        f"(the largest, {best.name}, has {best.gpus}{kind} GPUs, {best.cpus:g} CPUs, "
        f"{best.memory_gib:.0f} GiB)"
    )


def _describe(needs: Needs) -> str:
    kind = f"{needs.accelerator} " if needs.accelerator else ""
    gpus = f"{needs.gpus_per_node} {kind}GPUs, " if needs.gpus_per_node else ""
    per_node = f"{gpus}{needs.cpus_per_node} CPUs and {needs.memory_gib_per_node:g} GiB"
    return f"{needs.nodes} node{'s' if needs.nodes > 1 else ''} with {per_node}" + (
        " each" if needs.nodes > 1 else ""
    )
