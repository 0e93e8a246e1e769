"""What a replica's process measures of itself, looked at just before it is exported.

In: the replica, once it has one, and its engine's starts. Out: gauges of its state, its admission
window and its backlog, and how long engines took to start.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline import metrics
from pipeline.engine import Engine
from pipeline.replica import Replica
from pipeline.roster import Phase


class ReplicaMetrics:
    """Of one replica's process."""

    def __init__(self) -> None:
        self._replica: Replica | None = None

    def timed(self, start_engine: Callable[[], Engine]) -> Callable[[], Engine]:
        """``start_engine``, which tells how long it takes each time."""

        def start() -> Engine:
            began = time.monotonic()
            try:
                return start_engine()
            finally:
                metrics.ENGINE_START_SECONDS.set(time.monotonic() - began)

        return start

    def attach(self, replica: Replica) -> None:
        """The engine is up."""
        self._replica = replica

    def look(self) -> None:
        """Set what is so just now."""
        replica = self._replica
        phase = Phase.STARTING
        if replica is not None:
            phase = Phase.DRAINED if replica.draining else Phase.RUNNING
            requests = replica.requests
            metrics.WINDOW_LIMIT.set(requests.limit)
            metrics.WINDOW_REQUESTS.set(requests.inside)
            metrics.BACKLOG_REQUESTS.set(requests.waiting)
        for state in Phase:
            metrics.REPLICA_STATE.set(state is phase, state)
