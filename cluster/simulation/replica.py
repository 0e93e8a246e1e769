"""One replica: its open and queued shards, its backlog, its admission window and its engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.simulation.engine import EngineModel, SimulatedEngine
from cluster.simulation.policies import Policy
from cluster.simulation.workload import Workload
from pipeline.admission import EngineLoad
from pipeline.backlog import Waiting, expected_steps, prefix_key


@dataclass(eq=False, slots=True)
class BoundShard:
    """A shard on its way to a replica, or open there."""

    index: int
    rows: range
    missing: set[int]
    """Rows without a completion that is kept."""
    opened: float = 0.0
    attempts: int = 0
    finished: list[tuple[float, int]] = field(default_factory=list)
    """(when, row) of this attempt."""


class Rows:
    """The workload as the replicas look it up, row by row."""

    def __init__(self, workload: Workload) -> None:
        self.prompt: list[int] = workload.prompt.tolist()
        self.completion: list[int] = workload.completion.tolist()
        self._limit: list[int] = workload.limit.tolist()

    def waiting(self, rows: Iterable[int]) -> list[Waiting[int]]:
        """What the backlog is told of each row. No two share a prefix."""
        return [
            Waiting(row, prefix_key((row,)), expected_steps(self.prompt[row], self._limit[row]))
            for row in rows
        ]


class SimulatedReplica:
    """The state of one replica; the cluster's event loop drives it."""

    def __init__(self, rows: Rows, policy: Policy, model: EngineModel) -> None:
        self._rows = rows
        self._policy = policy
        self._model = model
        self.open: dict[int, BoundShard] = {}
        self.queued: deque[BoundShard] = deque()
        self.arriving = 0
        """Shards that are bound to it and on their way."""
        self.up = True
        self.life = 0
        """Starts of its process; what was planned for an earlier one does not happen."""
        self.epoch = 0
        """Number of the epoch that is on its way; an end that was planned for another is void."""
        self._start()

    def _start(self) -> None:
        self._queue = self._policy.make_queue(self._policy.open_shards)
        self._window = self._policy.make_window(self._model.max_num_seqs)
        self.engine = SimulatedEngine(self._model)
        self._shard_of: dict[int, BoundShard] = {}

    @property
    def bound(self) -> int:
        """Shards that are its own."""
        return len(self.open) + len(self.queued) + self.arriving

    @property
    def has_room(self) -> bool:
        """Whether one more shard may be bound to it."""
        return self.up and self.bound < self._policy.open_shards + self._policy.queued_shards

    def next_to_open(self) -> BoundShard | None:
        """A queued shard, now open, if there is one and a place for it."""
        if not (self.up and self.queued and len(self.open) < self._policy.open_shards):
            return None
        shard = self.queued.popleft()
        self.open[shard.index] = shard
        return shard

    def take_in(self, shard: BoundShard) -> None:
        """The shard's missing rows wait for the engine from now on."""
        self._queue.add(self._rows.waiting(sorted(shard.missing)))
        for row in shard.missing:
            self._shard_of[row] = shard
        self._pump()

    def begin(self, now: float) -> float | None:
        """Start the engine's next epoch; when it ends."""
        hungry = self.engine.running < self._model.max_num_seqs and len(self._queue)
        self.epoch += 1
        return self.engine.begin(now, most_steps=1 if hungry else None)

    def end(self, now: float) -> list[BoundShard]:
        """The epoch is over; shards of which no row is missing any more."""
        preempted, steps = self.engine.preempted_now, self.engine.epoch_steps
        done = self.engine.end()
        whole = []
        for row in done:
            shard = self._shard_of.pop(row)
            shard.finished.append((now, row))
            shard.missing.discard(row)
            if not shard.missing:
                whole.append(shard)
        self._tell_window(steps, len(done), preempted)
        self._pump()
        return whole

    def lose(self, durable: float) -> tuple[list[int], list[BoundShard]]:
        """Its process is gone; finished rows that were not journaled by ``durable`` are lost.

        Returns:
            Those rows; the shards it leaves, in their order.
        """
        self.up = False
        self.life += 1
        self.epoch += 1
        lost = []
        for shard in self.open.values():
            gone = [row for when, row in shard.finished if when > durable]
            shard.missing.update(gone)
            shard.finished.clear()
            lost += gone
        left = [*self.open.values(), *self.queued]
        self.open.clear()
        self.queued.clear()
        return lost, left

    def boot(self) -> None:
        """A new process, with a new engine."""
        self.up = True
        self._start()

    def _tell_window(self, steps: int, finished: int, preempted: int) -> None:
        inside = self.engine.running + self.engine.waiting + finished
        running, waiting = self.engine.running + finished, self.engine.waiting
        for step in range(steps - 1):
            load = EngineLoad(running, waiting, 0, 0 if step else preempted)
            self._window.observe(load, inside)
        load = EngineLoad(running - finished, waiting, finished, preempted if steps == 1 else 0)
        self._window.observe(load, inside - finished)

    def _pump(self) -> None:
        inside = self.engine.running + self.engine.waiting
        while inside < self._window.limit and (row := self._queue.pop()) is not None:
            self.engine.submit(row, self._rows.prompt[row], self._rows.completion[row])
            inside += 1
