"""Main memory and shared memory of the nodes that can hold a replica.

In: what each node has. Out: faults. What Ray may give away is judged with the capacity; here it is
what the machine has free.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.preflight.crew import Node
from cluster.preflight.findings import Check, Fault, shared
from pipeline.profile import EngineProfile

_GIB = 2**30
_SHM = Path("/dev/shm")
_BROADCAST_GIB = 10 * 16 / 1024
"""vLLM's queue from an engine to its workers: 10 chunks of VLLM_MQ_MAX_CHUNK_BYTES_MB (16)."""
_RESPONSE_GIB = 10 * 24 / 1024
"""Its queue back, one per worker (``MessageQueue``'s defaults)."""
_NCCL_GIB = 1.0
"""NVIDIA's advice for containers: NCCL's shared-memory transport takes MiB per pair of GPUs."""

_SHM_REMEDY = (
    "start the container with a larger --shm-size, on Kubernetes with an emptyDir of medium Memory "
    "mounted there"
)


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Memory of one node, GiB."""

    total_gib: float
    available_gib: float
    shared_gib: float | None
    """Size of /dev/shm; None: there is none."""


def look_at_memory() -> MemoryFacts:
    """The memory of this node."""
    memory = psutil.virtual_memory()
    shared_gib = shutil.disk_usage(_SHM).total / _GIB if _SHM.is_dir() else None
    return MemoryFacts(memory.total / _GIB, memory.available / _GIB, shared_gib)


def shared_need_gib(profile: EngineProfile, node: Node) -> float:
    """Shared memory for Ray's object store and one replica's share of processes, GiB."""
    workers = workers_per_node(profile)
    queues = _BROADCAST_GIB + workers * _RESPONSE_GIB
    nccl = _NCCL_GIB if profile.needs.gpus_per_node else 0.0
    return node.object_store_gib + queues + nccl


def workers_per_node(profile: EngineProfile) -> int:
    """Worker processes of one replica on each of its nodes."""
    return max(1, profile.ranks // profile.needs.nodes)


def judge_memory(profile: EngineProfile, found: Mapping[Node, MemoryFacts]) -> list[Fault]:
    """Faults of the nodes that can hold a share of a replica."""
    need = profile.needs.memory_gib_per_node
    advice = f"a replica takes {need:g} GiB there; end what else runs on the machine"
    told = (
        (node.name, f"{facts.available_gib:.1f} GiB of memory are available, and {advice}")
        for node, facts in found.items()
        if facts.available_gib < need and not node.held
    )
    return shared(Check.MEMORY, told)


def judge_shared_memory(profile: EngineProfile, found: Mapping[Node, MemoryFacts]) -> list[Fault]:
    """Faults of nodes whose /dev/shm is too small: engines die of SIGBUS when it is full."""
    told = []
    for node, facts in found.items():
        need = shared_need_gib(profile, node)
        if facts.shared_gib is not None and facts.shared_gib < need:
            parts = f"{node.object_store_gib:.2f} of them for Ray's object store"
            message = f"/dev/shm has {facts.shared_gib:.2f} of {need:.2f} GiB ({parts})"
            told.append((node.name, f"{message}; {_SHM_REMEDY}"))
    return shared(Check.SHARED_MEMORY, told)
