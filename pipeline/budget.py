"""The time that an end may take: one moment, handed down to all that has to be over by then."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left until a moment."""

    until: float = math.inf
    """By the monotonic clock; by default there is no such moment."""

    @classmethod
    def of(cls, seconds: float) -> Budget:
        """So much from now on."""
        return cls(time.monotonic() + seconds)

    def left(self, at_most: float = math.inf, *, keep: float = 0.0) -> float:
        """Seconds that a step may take: ``at_most``, and ``keep`` seconds stay for what follows."""
        return max(0.0, min(at_most, self.until - keep - time.monotonic()))
