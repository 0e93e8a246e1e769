"""admission: how many requests an engine gets to hold at a time. Pure; follows the engine.

In: what the engine says after each of its steps (``EngineLoad``). Out: ``AdmissionWindow.limit``,
the most requests to have inside it now. Nothing about the model or the hardware need be known.

An engine runs as many requests as it can and keeps the rest waiting. It loses nothing as long as
somebody waits whenever a place becomes free; every request beyond that only grows what an engine's
death costs, and takes the choice of what comes next from the backlog. So the window is

    those that ran in the last step + a reserve as large as the most that ended in one step lately

and is doubled while the engine takes all it gets, up to a few times what it runs: requests on
their way to it, whose images are still being decoded, are not there yet. It begins small: what the
first shard brings is all there is to choose from then. Preemptions say that the
running requests outgrew the KV cache: the engine computes what it dropped once more. They cut the
window below what ran, and it comes back by and by (additive increase, multiplicative decrease, as
in RFC 5681).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_FIRST = 8
_ON_THEIR_WAY = 256
"""What the window may grow to whatever the engine runs, as long as none of it waits there."""
_MOST = 16_384
_LEAST_RESERVE = 4
_RESERVE_PER_FINISHED = 1.5
_MOST_PER_RUNNING = 4
_MEMORY = 0.98
"""Of the most that ended in one step, what is remembered a step later: half of it after 34."""
_CUT = 0.9
_STEPS_PER_CUT = 16
"""Steps a cut is given to show its effect before the next."""
_STEPS_PER_RISE = 8
"""Steps without preemption until the window of a cut engine is one request wider."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says after a step."""

    running: int
    """Requests with a place in the batch, those that ended in this step left out."""
    waiting: int
    """Requests without one."""
    finished: int = 0
    """Requests that ended in this step."""
    preempted: int = 0
    """Requests that lost their place in this step, as the KV cache was full."""
    prompt_tokens: int = 0
    """Prompt tokens of the requests that were completed in this step, images expanded and cached
    ones included, each request's once however often it was computed."""
    completion_tokens: int = 0
    """Tokens generated for those requests."""
    rank: int = 0
    """The data-parallel rank whose step it was; the load is that of all."""


class AdmissionWindow:
    """The most requests an engine should hold, step by step."""

    def __init__(self, first: int = _FIRST, most: int = _MOST) -> None:
        """Args:
        first: the limit until the engine has said something.
        most: what the limit never exceeds.
        """
        self._limit = first
        self._most = most
        self._burst = 0.0
        self._ceiling: int | None = None
        self._steps_since_cut = 0

    @property
    def limit(self) -> int:
        """Most requests to have inside the engine now; at least 1."""
        return self._limit if self._ceiling is None else min(self._limit, self._ceiling)

    def observe(self, load: EngineLoad, inside: int) -> None:
        """Follow what the engine said after a step.

        Args:
            load: what it said.
            inside: requests given to it and not back, or on their way, by the caller's count.
        """
        ran = load.running + load.finished
        self._burst = max(float(load.finished), _MEMORY * self._burst)
        self._yield_to_preemptions(ran, load.preempted)
        if load.waiting:
            reserve = max(_LEAST_RESERVE, math.ceil(_RESERVE_PER_FINISHED * self._burst))
            self._limit = min(self._most, ran + load.preempted + reserve)
        elif inside >= self._limit:  # it was given all that it may get, and took it
            most = min(self._most, max(_ON_THEIR_WAY, _MOST_PER_RUNNING * ran))
            self._limit = min(max(most, self._limit), 2 * self._limit)

    def _yield_to_preemptions(self, ran: int, preempted: int) -> None:
        self._steps_since_cut += 1
        if preempted:
            if self._ceiling is None or self._steps_since_cut >= _STEPS_PER_CUT:
                self._ceiling = max(1, int(_CUT * min(ran + preempted, self.limit)))
                self._steps_since_cut = 0
        elif self._ceiling is not None and self._steps_since_cut % _STEPS_PER_RISE == 0:
            self._ceiling += 1
            if self._ceiling >= self._limit:
                self._ceiling = None
