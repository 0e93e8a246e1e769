"""Which request kills the engine: found by halving the suspects.

In: which requests were in the engine when it died, and which finished. Out: who may enter the
engine now, and, in the end, a verdict. Pure: no clock, no engine.

When an engine dies, every request inside is a suspect; half of them may enter the next engine,
alone. If it dies again the killer is in that half, and the others are cleared; if all of the half
finish, it is among the rest, which is halved in turn. So one killer among k requests costs at most
log2(k) further restarts, and an engine that died of something else costs none: every half finishes.
A request is convicted only if it was alone in the engine when it died, and that was at least the
third death it was in, so that machines that fail at a bad moment make no killer of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from itertools import islice
from typing import Generic, TypeVar

_DEATHS_TO_CONVICT = 3

K = TypeVar("K", bound=Hashable)


class Quarantine(Generic[K]):
    """The suspects of an engine's death, and the half of them that is being tried."""

    def __init__(self) -> None:
        self._suspects: dict[K, None] = {}
        """In the order in which they were inside."""
        self._tried: set[K] = set()
        self._deaths: Counter[K] = Counter()

    @property
    def active(self) -> bool:
        """Whether a killer is being looked for."""
        return bool(self._suspects)

    def admits(self, key: K) -> bool:
        """Whether ``key`` may enter the engine now."""
        return key in self._tried if self._suspects else True

    def deaths(self, key: K) -> int:
        """How many engines died with ``key`` inside."""
        return self._deaths[key]

    def died(self, inside: Iterable[K]) -> K | None:
        """The engine died with these requests inside; returns the one that is convicted, if any."""
        suspects = list(inside)
        self._deaths.update(suspects)
        if len(suspects) == 1 and self._deaths[suspects[0]] >= _DEATHS_TO_CONVICT:
            (convicted,) = suspects
            self._suspects = {}
            self._forget(convicted)
            return convicted
        if suspects:  # else it died idle: whoever was suspected before still is
            self._suspects = dict.fromkeys(suspects)
        self._try_next()
        return None

    def ended(self, key: K) -> bool:
        """``key`` finished, failed on its own or was given up: it is no suspect any more.

        Returns:
            Whether others may enter now who could not before.
        """
        self._deaths.pop(key, None)
        if key not in self._suspects:
            return False
        del self._suspects[key]
        self._forget(key)
        if self._tried:
            return False
        self._try_next()
        return True

    def _forget(self, key: K) -> None:
        self._deaths.pop(key, None)
        self._tried.discard(key)

    def _try_next(self) -> None:
        """The first half of the suspects, the larger one if they are odd."""
        self._tried = set(islice(self._suspects, (len(self._suspects) + 1) // 2))
