"""A replica's actor shell: prepared blocks in, committed parts' stats out.

One shard at a time per calling thread, several threads: what earlier attempts journaled is taken
over, the rest generated, journaled as it finishes, and committed when it is whole. Beside that, a
pulse to the driver's ``Roster`` once a second, which brings its orders back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa
import ray
from ray.exceptions import RayError

from pipeline.commit import Destination, PartStats, commit_outcomes, committed_stats
from pipeline.cpu import Step, added, block_cpu
from pipeline.engine import Engine, EngineSpec
from pipeline.errors import EngineError
from pipeline.journal import Journal
from pipeline.plan import Shard
from pipeline.progress import Tally
from pipeline.records import (
    Completion,
    Failure,
    Outcome,
    Prepared,
    SampleKey,
    Status,
    block_shard,
    carried_columns,
    read_prepared,
)
from pipeline.redact import configure_logging
from pipeline.replica import Replica, ReplicaLimits
from pipeline.roster import DRIVER_SILENCE_S, Phase, Pulse

log = logging.getLogger(__name__)

_PULSE_S = 1.0
_ANSWER_S = 5.0
_LAST_WORDS_S = 10.0
"""What the other shards of a replica that cannot go on get to write their journals."""
_TEARDOWN_S = 60.0
"""From the end of a flow: an engine takes 5-10 s to stop."""
_EXIT_BROKEN = 1


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica needs to know of the run; picklable."""

    to: Destination
    engine: EngineSpec
    start_engine: Callable[[EngineSpec], Engine]
    """Builds the engine on the replica's node."""
    limits: ReplicaLimits


class ReplicaActor:
    """A Ray Data actor that holds one replica."""

    def __init__(self, spec: ReplicaSpec, roster: Any) -> None:
        configure_logging(logging.INFO, "%(levelname)s %(name)s: %(message)s")
        self._spec = spec
        self._open = _OpenShards()
        self._heart = _Heart(roster, self._open)
        self._replica = Replica(partial(spec.start_engine, spec.engine), spec.limits)
        self._heart.attach(self._replica)
        # Ray Data drops its actors at the end of a flow, or their processes just exit. Not __del__:
        # in an interpreter that is finalizing, it would wait for threads that never run again.
        weakref.finalize(self, _end, self._heart, self._replica)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Complete and commit one shard; called from several threads at a time.

        Raises:
            StorageError, AccountingError: the part cannot be written whole.
        """
        shard = block_shard(block)
        stats = None if self._replica.draining else self._run(shard, block)
        return pa.table({"stats": pa.array([stats.to_json()] if stats else [], pa.string())})

    def _run(self, shard: Shard, block: pa.Table) -> PartStats | None:
        """The shard's stats once it is committed; None if a drain left it open."""
        to = self._spec.to
        with self._open.shard(shard.index):
            done = committed_stats(to, shard)
            if done is not None:  # by an attempt whose answer was lost with its node
                return done
            started = time.monotonic()
            journal = Journal(to, shard)
            cpu = self._replica.cpu
            with cpu.counts(Step.QUEUE):
                items = read_prepared(block)
            with cpu.counts(Step.JOURNAL):
                known = {outcome.key: outcome for outcome in journal.read()}
            try:
                outcomes = self._complete(shard, items, journal, known)
            except EngineError as error:
                self._end_process(error)
            if len(outcomes) < len(_keys(items)):
                return None
            with cpu.counts(Step.COMMIT):
                stats = commit_outcomes(
                    to,
                    shard,
                    outcomes,
                    carried_columns(block),
                    seconds=time.monotonic() - started,
                    known=known.keys() & _keys(items),
                    cpu_s=added(block_cpu(block), self._replica.take_cpu()),
                )
                journal.clear()
            return stats

    def _complete(
        self,
        shard: Shard,
        items: Sequence[Prepared | Failure],
        journal: Journal,
        known: Mapping[SampleKey, Outcome],
    ) -> list[Outcome]:
        """The shard's outcomes: what is known of them, and the rest as it is generated."""
        wanted = _keys(items)
        outcomes = [outcome for key, outcome in known.items() if key in wanted]
        self._open.count(shard.index, outcomes)
        for batch in self._replica.generate(shard.index, items, known=known):
            outcomes += batch
            self._open.count(shard.index, batch)
            if len(outcomes) < len(wanted):
                with self._replica.cpu.counts(Step.JOURNAL):
                    journal.append([outcome for outcome in batch if outcome.attempts])
        return outcomes

    def _end_process(self, error: EngineError) -> NoReturn:
        """A replica without engine ends; Ray starts another one in its place, here or elsewhere.

        Raising instead would end the whole run for one machine's fault.
        """
        log.error("this replica cannot go on: %s", error)
        self._open.wait_for_others(_LAST_WORDS_S)
        self._heart.last_beat(str(error))
        os._exit(_EXIT_BROKEN)


def _end(heart: _Heart, replica: Replica) -> None:
    """The engine's processes end, and soon after this one, come what may: a library that hangs at
    its end must not keep the place, and the memory, that another replica needs."""
    timer = threading.Timer(_TEARDOWN_S, os._exit, (0,))
    timer.daemon = True
    timer.start()
    heart.stop()
    replica.shutdown()


def _keys(items: Sequence[Prepared | Failure]) -> frozenset[SampleKey]:
    """The records that these rows make."""
    return frozenset(
        (item.input_row, index)
        for item in items
        for index in range(item.sampling.n if isinstance(item, Prepared) else 1)
    )


class _OpenShards:
    """The shards a replica is working on, and what came of them; for the pulse."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: dict[int, Tally] = {}
        self._ended: dict[int, Tally] = {}

    @contextmanager
    def shard(self, index: int) -> Iterator[None]:
        """Within, the shard is open."""
        with self._changed:
            self._open[index] = Tally()
        try:
            yield
        finally:
            with self._changed:
                self._ended[index] = self._open.pop(index)
                self._changed.notify_all()

    def count(self, index: int, outcomes: Sequence[Outcome]) -> None:
        """Add ``outcomes`` to the shard's tally."""
        tally = sum(map(_tally, outcomes), Tally())
        with self._changed:
            self._open[index] += tally

    def take(self) -> tuple[dict[int, Tally], bool]:
        """Tallies of open shards and those that ended since the last call; whether any is open."""
        with self._changed:
            tallies = {**self._ended, **self._open}
            self._ended = {}
            return tallies, bool(self._open)

    def wait_for_others(self, timeout_s: float) -> None:
        """Until the calling thread's shard is the only one that is open."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._open) <= 1, timeout_s)


def _tally(outcome: Outcome) -> Tally:
    tokens = outcome.completion_tokens if isinstance(outcome, Completion) else 0
    return Tally(int(outcome.sample_index == 0), int(outcome.status is Status.ERRORED), tokens)


class _Heart:
    """Sends the replica's pulse once a second, from before its engine starts to its end."""

    def __init__(self, roster: Any, shards: _OpenShards) -> None:
        self._roster = roster
        self._shards = shards
        self._replica: Replica | None = None
        self._name = ray.get_runtime_context().get_actor_id()
        self._process = uuid.uuid4().hex
        self._handle = ray.get_runtime_context().current_actor
        self._answered = time.monotonic()
        self._draining = False
        self._stopped = threading.Event()
        threading.Thread(target=self._beat_on, name="pulse", daemon=True).start()

    def attach(self, replica: Replica) -> None:
        """The engine is up: from now on orders reach it."""
        self._replica = replica

    def stop(self) -> None:
        """No more pulses."""
        self._stopped.set()

    def last_beat(self, error: str) -> None:
        """Tell why this process ends."""
        try:
            ray.get(self._roster.beat.remote(self._pulse(error)), timeout=_ANSWER_S)
        except RayError as failure:
            log.warning("the driver does not hear why: %s", failure)

    def _beat_on(self) -> None:
        while not self._stopped.is_set():
            self._beat()
            self._stopped.wait(_PULSE_S)

    def _beat(self) -> None:
        try:
            order = ray.get(self._roster.beat.remote(self._pulse()), timeout=_ANSWER_S)
        except RayError as error:
            if time.monotonic() - self._answered > DRIVER_SILENCE_S:
                log.warning("no driver answers any more: %s", type(error).__name__)
                self._drain(0.0)
            return
        self._answered = time.monotonic()
        self._handle = None
        if order.drain_s is not None:
            self._drain(order.drain_s)

    def _drain(self, grace_s: float) -> None:
        if self._replica is not None:
            self._draining = True
            self._replica.drain(grace_s)

    def _pulse(self, error: str | None = None) -> Pulse:
        tallies, any_open = self._shards.take()
        phase = Phase.RUNNING
        if self._replica is None:
            phase = Phase.STARTING
        elif self._draining and not any_open:
            phase = Phase.DRAINED
        restarts = self._replica.engine_restarts if self._replica else 0
        return Pulse(self._name, self._process, phase, tallies, restarts, error, self._handle)
