"""The shards that wait for a replica, and those among them that may only run alone.

In: shards as they are offered, and those that come back. Out: the next one to give out. Pure.

A replica that dies says nothing of which of its shards, and which of its rows, it died of. So each
shard counts the replicas that ended while they worked on it. After two it is a *suspect*: it gets a
replica of its own, which then knows whom to blame, and finds the row (see ``suspects``).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_DEATHS_TO_SUSPECT = 2
"""One may be any machine's fault, and a shard alone leaves its replica's other places empty."""

Item = TypeVar("Item")


@dataclass(eq=False, slots=True)
class QueuedShard(Generic[Item]):
    """One shard, from its offer to its end."""

    ticket: int
    """Its number, by order of offer."""
    item: Item
    deaths: int = 0
    """Replicas that ended unasked while they worked on it."""
    died_on: Counter[str] = field(default_factory=Counter)
    """Of those that had nothing else: how many were on each node."""

    @property
    def is_suspect(self) -> bool:
        """Whether it may only run alone."""
        return self.deaths >= _DEATHS_TO_SUSPECT

    def suspect(self) -> None:
        """An earlier start of the run has found that it ends replicas."""
        self.deaths = max(self.deaths, _DEATHS_TO_SUSPECT)

    def count_death(self, nodes: Collection[str], *, alone: bool) -> None:
        """A replica on these nodes ended unasked while it worked on the shard."""
        self.deaths += 1
        if alone:
            self.died_on.update(nodes)

    def deaths_on(self, nodes: Collection[str]) -> int:
        """How often a replica with nothing else ended on one of these nodes, at most."""
        return max((self.died_on[node] for node in nodes), default=0)


class ShardQueue(Generic[Item]):
    """Shards that wait, in order of their offer."""

    def __init__(self) -> None:
        self._waiting: deque[QueuedShard[Item]] = deque()
        self._offered = 0
        self.suspects: list[QueuedShard[Item]] = []
        """Those that wait for a replica of their own, the oldest first."""

    def __len__(self) -> int:
        """The shards that any replica may take."""
        return len(self._waiting)

    def __bool__(self) -> bool:
        """Whether any shard waits, suspects included."""
        return bool(self._waiting or self.suspects)

    def offer(self, item: Item) -> None:
        """Add a new shard."""
        self._offered += 1
        self._waiting.append(QueuedShard(self._offered, item))

    def next(self) -> QueuedShard[Item]:
        """Take the first that any replica may have."""
        return self._waiting.popleft()

    def put_back(self, shards: Iterable[QueuedShard[Item]]) -> None:
        """Have these wait again, before all that were offered later."""
        everyone = sorted([*self._waiting, *self.suspects, *shards], key=lambda each: each.ticket)
        self._waiting = deque(shard for shard in everyone if not shard.is_suspect)
        self.suspects = [shard for shard in everyone if shard.is_suspect]
