"""A replica's actor: prepared blocks in, committed parts' stats out.

One shard at a time per calling thread, several threads: what earlier attempts journaled is taken
over, the rest generated, journaled as it finishes, and committed when it is whole. Beside that, a
pulse to the driver's ``Roster`` once a second, which brings its orders back.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa
import ray
from ray.exceptions import RayError

from pipeline import logs, metrics
from pipeline.commit import Attempt, Destination, commit_outcomes, committed_stats
from pipeline.cpu import Step, added, block_cpu
from pipeline.engine import Engine, follow_vllm
from pipeline.engine_spec import EngineSpec, Meeting, engine_fingerprint, engine_version
from pipeline.errors import EngineError
from pipeline.hardware import hardware
from pipeline.journal import Journal
from pipeline.leaving import seconds_left
from pipeline.open_shards import OpenShards
from pipeline.plan import Shard
from pipeline.progress import RowTally
from pipeline.ray_metrics import Exporter
from pipeline.records import (
    Failure,
    Outcome,
    Prepared,
    SampleKey,
    block_shard,
    carried_columns,
    count_images,
    read_prepared,
    samples_asked,
    with_known,
)
from pipeline.redact import configure_logging, redacted_text
from pipeline.replica import Replica, ReplicaLimits, within
from pipeline.replica_metrics import ReplicaMetrics
from pipeline.roster import DRIVER_SILENCE_S, FIRST_ANSWER_S, Phase, Pulse
from pipeline.suspects import Suspects, check_engine, complete_alone

log = logging.getLogger(__name__)

_PULSE_S = 1.0
_ANSWER_S = 5.0
_LAST_WORDS_S = 10.0
"""What the other shards of a replica that cannot go on get to write their journals, at least."""
_LEAVING_S = 10.0
"""Of the time a node has left, what goes to the last journals and the end of the engine."""
_SOONER_S = 1.0
"""By so much a node's new deadline must be before the one that is known."""
_EXIT_BROKEN = 1
SUSPECT = "suspect"
"""Returned for a shard that must run alone: an earlier start's replicas have died of it."""
NAME_LENGTH = 8
"""Of the random names in parts' stats: enough to tell a run's replicas, and processes, apart."""


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica needs to know of the run; picklable."""

    to: Destination
    engine: EngineSpec
    start_engine: Callable[[EngineSpec], Engine]
    """Builds the engine on the replica's node, the first if there are several."""
    limits: ReplicaLimits
    follow_engine: Callable[[EngineSpec], None] = follow_vllm
    """Runs the engine's part on each further node, until that ends."""
    started: float = 0.0
    """When the driver's start began, in seconds since 1970."""
    run_name: str = ""
    """The config's; what metrics and logs call the run."""


class ReplicaActor:
    """The actor that holds one replica; on the first of its nodes, if it spans several."""

    def __init__(self, spec: ReplicaSpec, roster: Any, name: str) -> None:
        configure_logging(logging.INFO, "%(levelname)s %(name)s: %(message)s")
        self._spec = spec
        self._began = time.monotonic()
        self._cold_start_s = 0.0
        self._open = OpenShards()
        self._heart = _Heart(roster, self._open, name)
        replica = name[:NAME_LENGTH]
        logs.name_process(run=spec.run_name, replica=replica)
        self._measured = ReplicaMetrics()
        self._exporter = Exporter(run=spec.run_name, replica=replica, look=self._measured.look)
        self._signature = {
            "process": self._heart.process,
            "hardware": hardware(),
            "engine": engine_fingerprint(asdict(spec.engine)),
            "version": engine_version(),
        }

    def meet(self) -> Meeting:
        """Where the processes on the replica's other nodes find the engine's first."""
        return Meeting.at(ray.util.get_node_ip_address())

    def start(self, meeting: Meeting | None, nodes: int) -> None:
        """Start the engine, over ``nodes`` nodes that join it at ``meeting``; call it first.

        Raises:
            EngineRefusalError: the engine cannot be started like this anywhere.
            EngineError: it could not be started.
        """
        engine = self._spec.engine
        if meeting is not None:
            engine = engine.on_node(meeting, nodes, rank=0)
        start_engine = self._measured.timed(partial(self._spec.start_engine, engine))
        bounded = partial(within, self._spec.limits.start_s, self._give_up, start_engine)
        self._replica = Replica(bounded, self._spec.limits)
        self._cold_start_s = round(time.monotonic() - self._began, 3)
        self._heart.attach(self._replica)
        self._measured.attach(self._replica)

    def run(self, block: pa.Table, alone: bool = False) -> str | None:
        """Complete and commit one shard; called from several threads at a time.

        Args:
            block: its prepared rows.
            alone: whether replicas have died of it; then this one has no other shard.

        Returns:
            Its stats as JSON; None if a drain left it open; ``SUSPECT``.

        Raises:
            StorageError, AccountingError: the part cannot be written whole.
        """
        draining = self._replica.draining
        result = None if draining else self._run(block_shard(block), block, alone)
        if result is None and self._heart.leaving:
            self._heart.leave()
        return result

    def stop(self) -> None:
        """Stop the engine and its processes."""
        self._heart.stop()
        self._exporter.close()
        self._replica.shutdown()

    def _run(self, shard: Shard, block: pa.Table, alone: bool) -> str | None:
        """Do as ``run`` says."""
        to = self._spec.to
        with self._open.shard(shard.index), logs.about(shard=shard.index):
            done = committed_stats(to, shard)
            if done is not None:  # by an attempt whose answer was lost with its node
                return done.to_json()
            started, opened = time.monotonic(), time.time()
            journal = Journal(to, shard)
            cpu = self._replica.cpu
            with cpu.counts(Step.QUEUE):
                prepared = read_prepared(block)
            with cpu.counts(Step.JOURNAL):
                known = {outcome.key: outcome for outcome in journal.read()}
            items = with_known(prepared, known)
            if journal.trials and not alone:
                return SUSPECT
            suspects = Suspects(journal, to.run_id, self._spec.started) if alone else None
            try:
                outcomes = self._complete(shard, items, journal, known, suspects)
            except EngineError as error:
                self._end_process(shard, error)
            if len(outcomes) < len(_keys(items) | known.keys()):
                return None
            with cpu.counts(Step.COMMIT), metrics.COMMIT_SECONDS.timed():
                stats = commit_outcomes(
                    to,
                    shard,
                    outcomes,
                    carried_columns(block),
                    seconds=time.monotonic() - started,
                    known=known.keys(),
                    samples=samples_asked(prepared, known.values()),
                    cpu_s=added(block_cpu(block), self._replica.take_cpu()),
                    images=count_images(block),
                    attempt=self._attempt(opened),
                    engine_tokens=self._replica.engine_tokens.take(),
                    experts=self._replica.expert_tokens.take(),
                    replica=self._signature,
                )
                journal.clear()
                if suspects is not None:
                    suspects.clear()
            metrics.SHARD_SECONDS.observe(time.monotonic() - started)
            return stats.to_json()

    def _attempt(self, opened: float) -> Attempt:
        return Attempt(
            replica=self._heart.name[:NAME_LENGTH],
            process=self._heart.process[:NAME_LENGTH],
            node=redacted_text(platform.node()),
            engine_restarts=self._replica.engine_restarts,
            start=round(self._spec.started, 3),
            opened=round(opened, 3),
            cold_start_s=self._cold_start_s,
        )

    def _complete(
        self,
        shard: Shard,
        items: Sequence[Prepared | Failure],
        journal: Journal,
        known: Mapping[SampleKey, Outcome],
        suspects: Suspects | None,
    ) -> list[Outcome]:
        """The shard's outcomes: what is known of them, and the rest as it is generated."""
        wanted = _keys(items) | known.keys()
        outcomes = [*known.values()]
        rows = RowTally(Counter(row for row, _ in wanted))
        self._open.count(shard.index, rows.count(outcomes, known=True))
        for batch in self._batches(shard, items, known, suspects):
            outcomes += batch
            self._open.count(shard.index, rows.count(batch))
            if len(outcomes) < len(wanted) or suspects is not None:
                with self._replica.cpu.counts(Step.JOURNAL), metrics.JOURNAL_SECONDS.timed():
                    journal.append([outcome for outcome in batch if outcome.attempts])
        return outcomes

    def _batches(
        self,
        shard: Shard,
        items: Sequence[Prepared | Failure],
        known: Mapping[SampleKey, Outcome],
        suspects: Suspects | None,
    ) -> Iterator[list[Outcome]]:
        generate = partial(self._replica.generate, shard.index)
        if suspects is None:
            return generate(items, known=known)
        if not self._open.made_tokens:
            check_engine(items, generate)
            self._replica.engine_tokens.take()  # no record has that token
        return complete_alone(items, known, suspects, generate, lambda: self._replica.draining)

    def _end_process(self, shard: Shard, error: EngineError) -> NoReturn:
        """A replica without engine ends; the driver starts another one in its place.

        Raising instead would end the whole run for one machine's fault.
        """
        self._open.give_up(shard.index, _LAST_WORDS_S)
        self._give_up(str(error))

    def _give_up(self, reason: str) -> NoReturn:
        """End the process; by then all that is finished is in the journals."""
        log.error("this replica cannot go on: %s", reason)
        self._heart.last_beat(reason)
        os._exit(_EXIT_BROKEN)


def _keys(items: Sequence[Prepared | Failure]) -> frozenset[SampleKey]:
    """The records that these rows make."""
    return frozenset(
        key
        for item in items
        for key in (
            [(item.input_row, index) for index in range(item.sampling.n)]
            if isinstance(item, Prepared)
            else [item.key]
        )
    )


class _Heart:
    """Sends the replica's pulse once a second, from before its engine starts to its end."""

    def __init__(self, roster: Any, shards: OpenShards, name: str) -> None:
        self._roster = roster
        self._shards = shards
        self._replica: Replica | None = None
        self.name = name
        self.process = uuid.uuid4().hex
        self._give_up_at = time.monotonic() + FIRST_ANSWER_S
        self._draining = False
        self._node_goes_at = math.inf
        self._stopped = threading.Event()
        threading.Thread(target=self._beat_on, name="pulse", daemon=True).start()

    @property
    def leaving(self) -> bool:
        """Whether this process ends because its node does."""
        return self._node_goes_at < math.inf

    def attach(self, replica: Replica) -> None:
        """The engine is up: from now on orders reach it."""
        self._replica = replica

    def stop(self) -> None:
        """No more pulses."""
        self._stopped.set()

    def leave(self) -> NoReturn:
        """End the process before its node does, once no shard is open; call it only if ``leaving``.

        Some shards end at once, others as soon as their rows are through the engine: what they have
        is journaled by then. The driver starts another process elsewhere, and gives to others what
        this one returned nothing for.
        """
        self._shards.wait_for_all(max(_LAST_WORDS_S, self._node_goes_at - time.monotonic()))
        self.last_beat("its node was taken away")
        os._exit(_EXIT_BROKEN)

    def last_beat(self, error: str) -> None:
        """Tell why this process ends."""
        try:
            ray.get(self._roster.beat.remote(self._pulse(error)), timeout=_ANSWER_S)
        except RayError as failure:
            log.warning("the driver does not hear why: %s", failure)

    def _beat_on(self) -> None:
        while not self._stopped.is_set():
            self._beat()
            self._look_at_node()
            self._stopped.wait(_PULSE_S)

    def _beat(self) -> None:
        try:
            pulse = self._pulse()
            order = ray.get(self._roster.beat.remote(pulse), timeout=_ANSWER_S)
        except RayError as error:
            if time.monotonic() > self._give_up_at:
                log.warning("no driver answers any more: %s", type(error).__name__)
                self._drain(0.0)
            return
        self._shards.heard(pulse.shards)
        self._give_up_at = time.monotonic() + DRIVER_SILENCE_S
        if order.drain_s is not None:
            self._drain(order.drain_s)

    def _look_at_node(self) -> None:
        if self.leaving and self._shards.wait_for_all(0):
            self.leave()
        left = None if self._replica is None else seconds_left()
        if left is None:
            return
        goes_at = time.monotonic() + left
        if goes_at < self._node_goes_at - _SOONER_S:
            log.warning("the node goes in %.0f s: this replica takes nothing more", left)
            self._node_goes_at = goes_at
            self._drain(max(0.0, left - _LEAVING_S))

    def _drain(self, grace_s: float) -> None:
        if self._replica is not None:
            self._draining = True
            self._replica.drain(grace_s)

    def _pulse(self, error: str | None = None) -> Pulse:
        tallies, any_open = self._shards.look()
        phase = Phase.RUNNING
        if self._replica is None:
            phase = Phase.STARTING
        elif self._draining and not any_open:
            phase = Phase.DRAINED
        restarts = self._replica.engine_restarts if self._replica else 0
        made = self._shards.made_tokens
        return Pulse(self.name, self.process, phase, tallies, restarts, error, made)
