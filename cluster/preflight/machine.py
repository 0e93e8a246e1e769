"""A node's machine in one look: versions, GPUs and memory."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.preflight.gpus import GpuFacts, look_at_gpus
from cluster.preflight.memory import MemoryFacts, look_at_memory
from cluster.preflight.versions import installed


@dataclass(frozen=True, slots=True)
class Machine:
    """What one node has."""

    installed: dict[str, str]
    """Versions of packages, by name."""
    gpus: GpuFacts
    memory: MemoryFacts

    @property
    def versions(self) -> dict[str, str]:
        """All that must be the same on every node that has it."""
        return self.installed | self.gpus.versions


def look_at_machine(*, with_gpus: bool) -> Machine:
    """This node's machine; its GPUs only if the profile needs some."""
    gpus = look_at_gpus() if with_gpus else GpuFacts()
    return Machine(installed(), gpus, look_at_memory())
