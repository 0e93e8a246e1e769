"""The event loop: shards are prepared, given to replicas, worked off and committed.

In: a ``ClusterSpec``, a ``Workload`` and a ``Policy``. Out: a ``SimulatedRun``. Deterministic by
seed. As in ``pipeline.pool``, a shard goes to the replica with the fewest shards as soon as that
has room; those of a replica that is lost go first to whichever has room.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.simulation.engine import EngineModel
from cluster.simulation.policies import Policy
from cluster.simulation.replica import BoundShard, Rows, SimulatedReplica
from cluster.simulation.workload import Workload

BUCKET_S = 5.0
"""Resolution of the record of how busy the engines were."""
_CALLS_TO_OPEN = 2
"""Requests to the store before a shard's rows are known to be missing: its part, its journal."""


@dataclass(frozen=True)
class StoreModel:
    """How long a request to the object store takes: log-normal, and now and then very slow."""

    median_s: float = 0.04
    sigma: float = 0.5
    slow_share: float = 0.01
    slow_s: float = 2.0

    def draw(self, dice: random.Random) -> float:
        """Seconds of one request."""
        slow = self.slow_s if dice.random() < self.slow_share else 0.0
        return slow + self.median_s * dice.lognormvariate(0.0, self.sigma)


@dataclass(frozen=True)
class Churn:
    """Spot instances: one replica of the cluster is lost now and then, and comes back."""

    every_s: float = 600.0
    boot_s: float = 180.0
    """Until another node is there and its engine has loaded the model."""


@dataclass(frozen=True)
class ClusterSpec:
    """Everything but the rows and the policy."""

    replicas: int
    engine: EngineModel
    store: StoreModel = StoreModel()
    prepare_rows_s: float = 500.0
    """Rows that one CPU prepares in a second."""
    prepare_cpus: int = 2
    """CPUs that prepare, per replica."""
    driver_s: float = 0.006
    """Seconds of the driver per shard: two tasks of Ray Data and a call, one after the other."""
    journal_s: float = 5.0
    """``limits.journal_s``."""
    churn: Churn | None = None
    ready_s: tuple[float, ...] = ()
    """When each replica's engine is ready; all at once by default."""
    seed: int = 0


@dataclass
class SimulatedRun:
    """What came of a run. Times in seconds from the moment that all engines are ready."""

    policy: str
    workload: str
    engine: str
    replicas: int
    rows: int
    shards: int
    first_admission: float = 0.0
    last_completion: float = 0.0
    makespan: float = 0.0
    """Until the last part was committed."""
    bound: float = 0.0
    """What no schedule goes below: max(work / capacity, longest row), lost replicas left out of
    the capacity while they are away."""
    work_s: float = 0.0
    """Engine seconds of all rows at the engine's best rate."""
    losses: list[tuple[float, float]] = field(default_factory=list)
    """(lost, back) of replicas."""
    redone_tokens: int = 0
    """Completion tokens that had been generated to their row's end, and were generated again."""
    tokens: int = 0
    preempted: int = 0
    driver_s: float = 0.0
    """Seconds the driver was busy."""
    running: dict[int, float] = field(default_factory=dict)
    """Sequence-seconds by bucket of time."""
    times_done: bytearray = field(default_factory=bytearray)
    """How often each row was committed."""

    @property
    def efficiency(self) -> float:
        """Rows' work over what the replicas could have done meanwhile; at most 1."""
        return self.work_s / (self.replicas * self.makespan)

    @property
    def over_bound(self) -> float:
        """Makespan / lower bound; at least 1."""
        return self.makespan / self.bound


def simulate(spec: ClusterSpec, workload: Workload, policy: Policy) -> SimulatedRun:
    """Run ``workload`` on a simulated cluster."""
    return _Cluster(spec, workload, policy).run()


class _Cluster:
    def __init__(self, spec: ClusterSpec, workload: Workload, policy: Policy) -> None:
        self._spec = spec
        self._workload = workload
        self._dice = random.Random(spec.seed)
        rows = Rows(workload)
        self._replicas = [SimulatedReplica(rows, policy, spec.engine) for _ in range(spec.replicas)]
        shards = policy.cut(workload.rows, spec.replicas)
        self._to_read = deque(
            BoundShard(index, rows, set(rows)) for index, rows in enumerate(shards)
        )
        self._ready: deque[BoundShard] = deque()
        self._preparing = 0
        self._driver_free = 0.0
        self._left = len(shards)
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._serial = 0
        self._now = 0.0
        self._running: dict[int, float] = defaultdict(float)
        self._completion = rows.completion
        self._result = SimulatedRun(
            policy=policy.name,
            workload=workload.name,
            engine=spec.engine.name,
            replicas=spec.replicas,
            rows=workload.rows,
            shards=len(shards),
            tokens=int(workload.completion.sum()),
            times_done=bytearray(workload.rows),
            first_admission=-1.0,
        )

    def run(self) -> SimulatedRun:
        for replica, ready_s in zip(self._replicas, self._spec.ready_s, strict=False):
            replica.up = False
            self._at(ready_s, self._boot, replica)
        self._prepare()
        if self._spec.churn is not None:
            self._at(self._spec.churn.every_s, self._lose)
        while self._left:
            self._now, _, handle, subject = heapq.heappop(self._events)
            handle(*subject)
        result = self._result
        result.makespan = self._now
        result.running = dict(self._running)
        engine = self._spec.engine
        prompt, completion = self._workload.prompt, self._workload.completion
        result.work_s = engine.work_s(int(prompt.sum()), int(completion.sum()))
        longest = max(map(engine.alone_s, prompt.tolist(), completion.tolist()))
        capacity_s = adjusted_bound(result.work_s, self._spec.replicas, result.losses)
        result.bound = max(capacity_s, longest)
        return result

    def _at(self, when: float, handle: Callable[..., None], *subject: Any) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, handle, subject))

    def _store_s(self, calls: int = 1) -> float:
        return sum(self._spec.store.draw(self._dice) for _ in range(calls))

    # read and prepare

    def _prepare(self) -> None:
        """Start as many as CPUs are free; what is ready and not bound yet is bounded, too."""
        cpus = self._spec.prepare_cpus * self._spec.replicas
        while (
            self._to_read
            and self._preparing < cpus
            and self._preparing + len(self._ready) < cpus + self._spec.replicas
        ):
            shard = self._to_read.popleft()
            self._preparing += 1
            self._at(self._now + self._prepare_s(shard), self._prepared, shard)

    def _prepare_s(self, shard: BoundShard) -> float:
        return self._store_s() + len(shard.rows) / self._spec.prepare_rows_s

    def _prepared(self, shard: BoundShard) -> None:
        self._preparing -= 1
        self._ready.append(shard)
        self._bind()
        self._prepare()

    # the driver

    def _bind(self) -> None:
        """Bind what is ready to the replicas with the fewest shards, one after the other."""
        while self._ready:
            replica = min(self._replicas, key=_claim)
            if not replica.has_room:
                return
            shard = self._ready.popleft()
            replica.arriving += 1
            self._driver_free = max(self._driver_free, self._now) + self._spec.driver_s
            self._result.driver_s += self._spec.driver_s
            self._at(self._driver_free, self._arrive, replica, shard)

    def _arrive(self, replica: SimulatedReplica, shard: BoundShard) -> None:
        replica.arriving -= 1
        if not replica.up:
            self._ready.appendleft(shard)
            self._bind()
            return
        replica.queued.append(shard)
        self._open_next(replica)

    # a replica

    def _open_next(self, replica: SimulatedReplica) -> None:
        while (shard := replica.next_to_open()) is not None:
            seconds = self._store_s(_CALLS_TO_OPEN)
            if shard.attempts:  # its prepared block may be lost with the node
                seconds += self._prepare_s(shard)
            shard.attempts += 1
            self._at(self._now + seconds, self._opened, replica, shard, replica.life)

    def _opened(self, replica: SimulatedReplica, shard: BoundShard, life: int) -> None:
        if replica.life != life:
            return
        shard.opened = self._now
        if not shard.missing:
            self._commit(replica, shard)
            return
        if self._result.first_admission < 0:
            self._result.first_admission = self._now
        replica.take_in(shard)
        if replica.engine.idle:
            self._begin(replica)
        elif (end := replica.engine.cut(self._now)) is not None:
            replica.epoch += 1
            self._at(end, self._end, replica, replica.epoch)

    def _begin(self, replica: SimulatedReplica) -> None:
        end = replica.begin(self._now)
        if end is not None:
            self._at(end, self._end, replica, replica.epoch)

    def _end(self, replica: SimulatedReplica, epoch: int) -> None:
        if replica.epoch != epoch:
            return
        engine = replica.engine
        self._running[int(self._now / BUCKET_S)] += engine.running * engine.epoch_s
        self._result.preempted += engine.preempted_now
        for shard in replica.end(self._now):
            self._result.last_completion = self._now
            self._commit(replica, shard)
        self._begin(replica)

    def _commit(self, replica: SimulatedReplica, shard: BoundShard) -> None:
        self._at(self._now + self._store_s(), self._committed, replica, shard, replica.life)

    def _committed(self, replica: SimulatedReplica, shard: BoundShard, life: int) -> None:
        if replica.life != life:
            return
        for row in shard.rows:
            self._result.times_done[row] += 1
        del replica.open[shard.index]
        self._left -= 1
        self._open_next(replica)
        self._bind()
        self._prepare()

    # losses

    def _lose(self) -> None:
        churn = self._spec.churn
        assert churn is not None
        up = [replica for replica in self._replicas if replica.up]
        if up:
            replica = self._dice.choice(up)
            durable = self._now - self._spec.journal_s * self._dice.random() - self._store_s()
            lost, left = replica.lose(durable)
            self._ready.extendleft(reversed(left))
            self._result.redone_tokens += sum(self._completion[row] for row in lost)
            back = self._now + churn.boot_s
            self._result.losses.append((self._now, back))
            self._at(back, self._boot, replica)
            self._bind()
        self._at(self._now + churn.every_s, self._lose)

    def _boot(self, replica: SimulatedReplica) -> None:
        replica.boot()
        self._open_next(replica)
        self._bind()
        self._prepare()


def _claim(replica: SimulatedReplica) -> tuple[bool, int]:
    return not replica.has_room, replica.bound


def adjusted_bound(work_s: float, replicas: int, losses: Sequence[tuple[float, float]]) -> float:
    """Seconds in which ``replicas`` engines, less those away, can do ``work_s`` engine seconds."""
    changes = sorted([(lost, -1) for lost, _ in losses] + [(back, 1) for _, back in losses])
    now, up, left = 0.0, replicas, work_s
    for when, change in changes:
        if up and left <= up * (when - now):
            break
        left -= up * (when - now)
        now, up = when, up + change
    return now + left / up
