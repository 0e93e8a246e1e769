"""What a preflight finds: the checks by name, and their faults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Check(StrEnum):
    """What is looked at; the keys of ``checks`` in the last line."""

    CAPACITY = "capacity"
    GPUS = "gpus"
    MEMORY = "memory"
    SHARED_MEMORY = "shared_memory"
    VERSIONS = "versions"
    CLOCKS = "clocks"
    WEIGHTS = "weights"
    BUCKET = "bucket"
    ALL_REDUCE = "all_reduce"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that would spoil a run."""

    check: Check
    nodes: tuple[str, ...]
    """Names of those that have it; none: it is the cluster's as a whole."""
    message: str
    """What is wrong, where, and what to do."""

    @property
    def sentence(self) -> str:
        """With the nodes in front."""
        if not self.nodes:
            return f"{self.message}."
        return f"{listed(self.nodes)}: {self.message}."


def listed(names: Sequence[str]) -> str:
    """Node names as a sentence begins with them."""
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"


def shared(check: Check, found: Iterable[tuple[str, str]]) -> list[Fault]:
    """Faults of (node, message) pairs: nodes with the same message are one fault."""
    nodes: dict[str, list[str]] = {}
    for node, message in found:
        nodes.setdefault(message, []).append(node)
    return [Fault(check, tuple(names), message) for message, names in nodes.items()]
