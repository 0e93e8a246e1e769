"""Clocks: how far each node's is from the driver's, and the object store's from each node's.

In: moments before and after a question, and the answer. Out: offsets with their uncertainty, and
faults. Leases compare no clocks, but records carry times of the nodes that made them, and S3
refuses requests of a machine that is 15 minutes off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.preflight.crew import Crew, Unanswered
from cluster.preflight.findings import Check, Fault, shared

_ROUNDS = 5
_ANSWER_S = 20.0
_UNANSWERED = 2
"""Rounds of a node without an answer, after which it has none."""
MOST_BETWEEN_NODES_S = 1.0
"""Beyond that, a report's throughput over time puts rows into the wrong bins."""
MOST_TO_STORE_S = 60.0
"""S3 refuses at 900 s; a clock that is a minute off is not kept by anybody."""

_STORE_REMEDY = "S3 refuses requests at 900 s: have NTP keep whichever is wrong"


@dataclass(frozen=True, slots=True)
class Offset:
    """How far a clock is ahead of another, seconds."""

    seconds: float
    uncertainty_s: float

    @property
    def at_least_s(self) -> float:
        """What it is off in any case."""
        return max(0.0, abs(self.seconds) - self.uncertainty_s)


def offset(before: float, there: float, after: float, *, resolution_s: float = 0.0) -> Offset:
    """Of a clock that showed ``there`` at some moment between ``before`` and ``after``: taken as
    the middle, as half of the round trip is the most it can be wrong (Cristian's algorithm)."""
    return Offset(there - (before + after) / 2, (after - before) / 2 + resolution_s)


def measure_clocks(crew: Crew, node_ids: list[str]) -> dict[str, Offset | Unanswered]:
    """Each node's clock against this process's, by the fastest of some round trips."""
    return {node: _measure(crew, node) for node in node_ids}


def _measure(crew: Crew, node: str) -> Offset | Unanswered:
    best: Offset | None = None
    unanswered = 0
    for _ in range(_ROUNDS):
        before = time.time()
        there = crew.ask({node: time.time}, timeout_s=_ANSWER_S)[node]
        after = time.time()
        if isinstance(there, Unanswered):
            unanswered += 1
            if unanswered == _UNANSWERED:
                return there
            continue
        found = offset(before, there, after)
        if best is None or found.uncertainty_s < best.uncertainty_s:
            best = found
    assert best is not None
    return best


def judge_clocks(nodes: Mapping[str, Offset], stores: Mapping[str, Offset]) -> list[Fault]:
    """Faults of clocks: the nodes' against the driver's, the store's against each node's."""
    told = [
        (
            name,
            f"its clock is {_off(found)} the driver's; have chrony or another NTP client keep it",
        )
        for name, found in nodes.items()
        if found.at_least_s > MOST_BETWEEN_NODES_S
    ]
    told += [
        (name, f"the object store's clock is {_off(found)} the node's; {_STORE_REMEDY}")
        for name, found in stores.items()
        if found.at_least_s > MOST_TO_STORE_S
    ]
    return shared(Check.CLOCKS, told)


def _off(found: Offset) -> str:
    return f"{abs(found.seconds):.1f} s {'ahead of' if found.seconds > 0 else 'behind'}"
