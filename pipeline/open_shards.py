"""The shards a replica is working on, and what came of them: its pulse tells.

In: shards as they open and end, and their outcomes, from several threads. Out: tallies, which are
reported until the roster is known to have them; waits for the end of all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipeline import metrics
from pipeline.progress import Tally


class OpenShards:
    """Open shards, and those that ended and may not be known yet; thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: dict[int, Tally] = {}
        self._ended: dict[int, Tally] = {}
        self._given_up: set[int] = set()
        self.made_tokens = 0
        """Completion tokens that this process has made itself."""

    @contextmanager
    def shard(self, index: int) -> Iterator[None]:
        """Within, the shard is open."""
        with self._changed:
            self._open[index] = Tally()
            metrics.OPEN_SHARDS.set(len(self._open))
        try:
            yield
        finally:
            with self._changed:
                self._ended[index] = self._open.pop(index)
                metrics.OPEN_SHARDS.set(len(self._open))
                self._changed.notify_all()

    def count(self, index: int, tally: Tally) -> None:
        """Add ``tally`` to the shard's."""
        metrics.REPLICA_ROWS.add(tally.rows - tally.known_rows)
        metrics.REPLICA_TOKENS.add(tally.tokens - tally.known_tokens)
        with self._changed:
            self._open[index] += tally
            self.made_tokens += tally.tokens - tally.known_tokens

    def look(self) -> tuple[dict[int, Tally], bool]:
        """Tallies of open shards, and of those that ended and are not known to be heard; whether
        any is open."""
        with self._changed:
            return {**self._ended, **self._open}, bool(self._open)

    def heard(self, tallies: Mapping[int, Tally]) -> None:
        """The roster has these: shards that have ended need not be reported again."""
        with self._changed:
            for index, tally in tallies.items():
                if self._ended.get(index) == tally:
                    del self._ended[index]

    def wait_for_all(self, timeout_s: float) -> bool:
        """Until no shard is open; whether that came true."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def give_up(self, index: int, timeout_s: float) -> None:
        """The calling thread's shard ends here; waits until the others have ended, or do as well.

        The wait is ``timeout_s`` at most.
        """
        with self._changed:
            self._given_up.add(index)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open.keys() <= self._given_up, timeout_s)
