"""The roster's actor, as the driver holds it.

In: looks and orders. Out: a ``Snapshot``, if the roster answers in time: a machine that is short
of CPU may take long to start the actor's process, and a run does not wait for it meanwhile.
"""

from __future__ import annotations

import math
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import EngineError
from pipeline.roster import FIRST_ANSWER_S, Roster, Snapshot

_SHORTLY_S = 0.25
"""What one look waits; the roster answers in milliseconds."""
_ANSWER_S = 60.0
"""After the first answer. Replicas wait less: not answered for ``DRIVER_SILENCE_S``, they write
down what they have and start anew."""


class RosterActor:
    """The roster, in a process of its own."""

    def __init__(self, handle: Any, *, answer_s: float) -> None:
        """See ``start``."""
        self.handle = handle
        """What replicas send their pulses to."""
        self._patience_s = FIRST_ANSWER_S
        self._answer_s = answer_s
        self._asked: ray.ObjectRef | None = None
        self._asked_at = 0.0

    @classmethod
    def start(cls, *, answer_s: float = _ANSWER_S) -> RosterActor:
        """Start it on the driver's own node, as it is of no use without the driver; does not wait.

        Args:
            answer_s: seconds to any answer but the first, for which there are ``FIRST_ANSWER_S``.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        handle = ray.remote(num_cpus=0, scheduling_strategy=here)(Roster).remote()
        return cls(handle, answer_s=answer_s)

    def look(self) -> Snapshot | None:
        """What the roster knows; None if it has not answered yet, the next call asks on.

        Raises:
            EngineError: it has not answered for too long.
            RayError: it is gone.
        """
        is_late = self._asked is not None
        found = self._answer()
        if found is not None and is_late:  # to a question of some time ago
            return self._answer() or found
        return found

    def drain(self, grace_s: float) -> None:
        """Have every replica stop within ``grace_s``; no look raises from now on for want of an
        answer, as the driver ends in any case."""
        self.handle.drain.remote(grace_s)
        self._patience_s = self._answer_s = math.inf

    def _answer(self) -> Snapshot | None:
        if self._asked is None:
            self._asked, self._asked_at = self.handle.look.remote(), time.monotonic()
        answered, _ = ray.wait([self._asked], timeout=_SHORTLY_S)
        if not answered:
            silent_s = time.monotonic() - self._asked_at
            if silent_s > self._patience_s:
                raise EngineError(
                    f"the process that keeps the run's roster has not answered for {silent_s:.0f} "
                    "s: is the driver's node short of CPU or memory? The same command resumes"
                )
            return None
        found: Snapshot = ray.get(self._asked)
        self._asked, self._patience_s = None, self._answer_s
        return found
