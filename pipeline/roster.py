"""What the driver and its replicas know of each other while a run goes on.

In: a ``Pulse`` per replica and second; the driver's looks and orders. Out: an ``Order`` to each
replica, a ``Snapshot`` to the driver. Lives in one small actor beside the driver (see
``roster_actor``); losing it loses no row. Pure but for the clock it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.progress import Tally

DRIVER_SILENCE_S = 15.0
"""A driver that has not looked for so long is hung or cut off, and may be replaced after 20 s (the
lease's): its replicas write down what they have and stop."""
FIRST_ANSWER_S = 120.0
"""To the roster's first answer: a machine that starts many processes at once may be slow to bring
its process up."""
_HEARD_S = 5.0
"""A replica beats every second; one without a beat for longer is gone, or as good as that."""


class Phase(StrEnum):
    """What a replica is doing."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a replica says of itself, once a second."""

    replica: str
    """The same for all processes that take this replica's place."""
    process: str
    """This process alone."""
    phase: Phase
    shards: Mapping[int, Tally]
    """Open shards, and those that ended since the last pulse: outcomes so far."""
    engine_restarts: int
    """Of this process."""
    error: str | None = None
    """Why the process is about to end."""
    made_tokens: int = 0
    """Completion tokens that this process has made itself."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the driver wants of a replica."""

    drain_s: float | None = None
    """Admit no more rows, and stop after so many seconds; None = go on."""


@dataclass(frozen=True, slots=True)
class Silent:
    """A replica that has not been heard of."""

    replica: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the driver sees when it looks."""

    tally: Tally = field(default_factory=Tally)
    running: int = 0
    """Replicas that were just heard of, and are neither starting nor drained."""
    made_tokens: int = 0
    """Completion tokens that all processes have made, lost ones included: it only grows."""
    engine_restarts: int = 0
    replica_restarts: int = 0
    last_error: str | None = None
    silent: tuple[Silent, ...] = ()
    """Running replicas by the seconds since their last pulse, the longest first."""
    lacking: str | None = None
    """What replicas without a place in the cluster wait for; the driver adds it."""


class Roster:
    """Keeps the last pulse of each replica, and the driver's order."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pulses: dict[str, Pulse] = {}
        self._heard: dict[str, float] = {}
        self._shards: dict[int, Tally] = {}
        self._total = Tally()
        self._processes: set[str] = set()
        self._made_tokens: dict[str, int] = {}
        self._engine_restarts: dict[str, int] = {}
        self._last_error: str | None = None
        self._drain_until: float | None = None
        self._looked: float | None = None
        self._called = clock()

    def beat(self, pulse: Pulse) -> Order:
        """A replica's pulse, answered by what it shall do."""
        now = self._now()
        self._processes.add(pulse.process)
        self._pulses[pulse.replica] = pulse
        self._heard[pulse.replica] = now
        for shard, tally in pulse.shards.items():
            before = self._shards.get(shard, Tally())
            if tally != before:
                self._total += tally - before
            self._shards[shard] = tally
        self._made_tokens[pulse.process] = pulse.made_tokens
        self._engine_restarts[pulse.process] = pulse.engine_restarts
        self._last_error = pulse.error or self._last_error
        return self._order(now)

    def look(self) -> Snapshot:
        """The driver's look, which also tells that it is there."""
        now = self._looked = self._now()
        running = [p.replica for p in self._pulses.values() if p.phase is Phase.RUNNING]
        silent = [Silent(name, now - self._heard[name]) for name in running]
        return Snapshot(
            tally=self._total,
            running=sum(item.seconds < _HEARD_S for item in silent),
            made_tokens=sum(self._made_tokens.values()),
            engine_restarts=sum(self._engine_restarts.values()),
            replica_restarts=len(self._processes) - len(self._pulses),
            last_error=self._last_error,
            silent=tuple(sorted(silent, key=lambda item: -item.seconds)),
        )

    def drain(self, grace_s: float) -> None:
        """Have every replica stop: those that are running, and those still to come."""
        if self._drain_until is None:
            self._drain_until = self._clock() + grace_s

    def _now(self) -> float:
        """The time of this call. If nobody called for long, the machine stood still, and neither
        driver nor replicas are to blame: that time does not count as their silence."""
        now = self._clock()
        still_s, self._called = now - self._called, now
        if still_s > _HEARD_S:
            self._heard = {name: min(now, at + still_s) for name, at in self._heard.items()}
            if self._looked is not None:
                self._looked = min(now, self._looked + still_s)
        return now

    def _order(self, now: float) -> Order:
        if self._drain_until is not None:
            return Order(drain_s=max(0.0, self._drain_until - now))
        if self._looked is not None and now - self._looked > DRIVER_SILENCE_S:
            return Order(drain_s=0.0)
        return Order()
