"""What the pool asks of a cluster, done with Ray's placement groups and actors.

In: a ``ReplicaSpec`` and what one replica needs. A place is a placement group with one bundle per
node of the replica: reserved whole or not at all, and Ray itself gives it back if the driver dies.
A worker is a ``ReplicaActor`` in the first bundle and a follower in each further one, held by
the driver alone: Ray neither restarts them nor retries their work, the pool does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline import logs
from pipeline.actor import NAME_LENGTH, SUSPECT, ReplicaActor, ReplicaSpec
from pipeline.budget import Budget
from pipeline.capacity import NodeCapacity, bundles, waits_for
from pipeline.engine_spec import EngineSpec
from pipeline.errors import EngineError, PipelineError
from pipeline.plan import OPEN_SHARDS
from pipeline.pool import Done, Ended, Event, Failed, Suspected, Up
from pipeline.profile import Needs
from pipeline.redact import configure_logging

_LOOK_INTERVAL_S = 0.5
"""Between two questions about the nodes, or about places that wait."""
_END_S = 3.0
"""What their processes get to end by themselves."""
_GIB = 2**30
_ACCELERATOR = "accelerator_type:"
_LOST = (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
"""What a call ends with if its actor, or the node under it, is gone."""


class _Call(Enum):
    START = auto()
    FOLLOW = auto()
    RUN = auto()


@dataclass(eq=False)
class RayWorker:
    """The actors of one replica."""

    leader: Any
    followers: list[Any]
    calls: set[ray.ObjectRef] = field(default_factory=set)
    """Not answered yet."""


class RayCluster:
    """A ``pool.Cluster`` of placement groups, actors, and blocks in Ray's object store."""

    def __init__(self, spec: ReplicaSpec, needs: Needs, roster: Any) -> None:
        self._spec = spec
        self._needs = needs
        self._roster = roster
        self._places: set[PlacementGroup] = set()
        self._held: dict[PlacementGroup, frozenset[str]] = {}
        self._workers: set[RayWorker] = set()
        self._calls: dict[ray.ObjectRef, tuple[_Call, RayWorker, int]] = {}
        self._nodes = _Kept(ray.nodes)
        self._going = _Kept(state.get_draining_nodes)
        self._table = _Kept(placement_group_table)

    def reserve(self) -> PlacementGroup:
        """See ``pool.Cluster``."""
        strategy = "STRICT_PACK" if self._needs.nodes == 1 else "STRICT_SPREAD"
        place = placement_group(bundles(self._needs), strategy=strategy)
        self._places.add(place)
        self._table.forget()
        return place

    def nodes_of(self, place: PlacementGroup) -> Collection[str]:
        """See ``pool.Cluster``."""
        if place not in self._held:
            entry = self._table.get().get(place.id.hex())
            if entry is None or entry["state"] != "CREATED":
                return ()
            self._held[place] = frozenset(entry["bundles_to_node_id"].values())
            self._nodes.forget()  # a new node may be younger than the list of nodes
        return self._held[place]

    def release(self, place: PlacementGroup) -> None:
        """See ``pool.Cluster``."""
        self._places.discard(place)
        self._held.pop(place, None)
        remove_placement_group(place)
        self._table.forget()

    def live_nodes(self) -> frozenset[str]:
        """See ``pool.Cluster``."""
        return frozenset(node["NodeID"] for node in self._nodes.get() if node["Alive"])

    def going_nodes(self) -> frozenset[str]:
        """See ``pool.Cluster``."""
        return frozenset(self._going.get())

    def spare_cpus(self, *, of_all: bool) -> float:
        """See ``pool.Cluster``. Others' places are placement groups, too."""
        there = sum(n["Resources"].get("CPU", 0.0) for n in self._nodes.get() if n["Alive"])
        if of_all:
            taken = sum(map(_cpus_of, self._table.get().values()))
        else:
            taken = len(self._held) * self._needs.nodes * self._needs.cpus_per_node
        return float(there - taken)

    def lacking(self) -> str | None:
        """See ``pool.Cluster``."""
        free = available_resources_per_node()
        return waits_for(
            self._needs,
            [
                node_capacity(node["NodeManagerHostname"], free.get(node["NodeID"], {}))
                for node in self._nodes.get()
                if node["Alive"] and node["NodeID"] not in self._going.get()
            ],
        )

    def start(self, place: PlacementGroup, name: str) -> RayWorker:
        """See ``pool.Cluster``."""
        share: dict[str, Any] = {
            "num_cpus": self._needs.cpus_per_node,
            "num_gpus": self._needs.gpus_per_node,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        leader = (
            ray.remote(ReplicaActor)
            .options(**share, max_concurrency=OPEN_SHARDS, scheduling_strategy=_bundle(place, 0))
            .remote(self._spec, self._roster, name)
        )
        followers = [
            ray.remote(_Follower)
            .options(**share, scheduling_strategy=_bundle(place, rank))
            .remote()
            for rank in range(1, self._needs.nodes)
        ]
        worker = RayWorker(leader, followers)
        self._workers.add(worker)
        meeting = leader.meet.remote() if followers else None
        for rank, follower in enumerate(followers, 1):
            follows = follower.follow.remote(self._spec, name, meeting, self._needs.nodes, rank)
            self._watch(follows, _Call.FOLLOW, worker)
        self._watch(leader.start.remote(meeting, self._needs.nodes), _Call.START, worker)
        return worker

    def submit(self, worker: RayWorker, ticket: int, item: ray.ObjectRef, *, alone: bool) -> None:
        """See ``pool.Cluster``."""
        self._watch(worker.leader.run.remote(item, alone), _Call.RUN, worker, ticket)

    def kill(self, worker: RayWorker) -> None:
        """See ``pool.Cluster``."""
        self._workers.discard(worker)
        for call in worker.calls:
            self._calls.pop(call, None)
        for actor in (worker.leader, *worker.followers):
            ray.kill(actor, no_restart=True)

    def wait(self, timeout_s: float) -> Sequence[Event[RayWorker, str | None]]:
        """See ``pool.Cluster``."""
        if not self._calls:
            time.sleep(timeout_s)
            return []
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:  # what else is there by now
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        return list(self._events(ready))

    def close(self, within_s: float) -> None:
        """See ``pool.Cluster``."""
        budget = Budget.of(within_s)
        leaders = [worker.leader for worker in self._workers] if within_s else []
        keep = min(_END_S, within_s / 2)
        _wait_for_all([leader.stop.remote() for leader in leaders], budget.left(keep=keep))
        # a process that is killed does not send its last metrics
        _wait_for_all([leader.__ray_terminate__.remote() for leader in leaders], budget.left())
        for worker in list(self._workers):
            self.kill(worker)
        for place in list(self._places):
            self.release(place)

    def _watch(self, ref: ray.ObjectRef, call: _Call, worker: RayWorker, ticket: int = 0) -> None:
        worker.calls.add(ref)
        self._calls[ref] = (call, worker, ticket)

    def _events(self, ready: Sequence[ray.ObjectRef]) -> Iterator[Event[RayWorker, str | None]]:
        for ref in ready:
            found = self._calls.pop(ref, None)
            if found is None:  # of a worker that ended a moment ago
                continue
            call, worker, ticket = found
            worker.calls.discard(ref)
            try:
                result = ray.get(ref)
            except RayTaskError as error:
                if call is _Call.RUN:
                    yield Failed(worker, ticket, _own(error))
                else:
                    yield self._ended(worker, _own(error))
            except _LOST as error:
                yield self._ended(worker, EngineError(last_line(error)))
            else:
                match call:
                    case _Call.START:
                        yield Up(worker)
                    case _Call.FOLLOW:
                        yield self._ended(worker, EngineError("its engine ended on another node"))
                    case _Call.RUN if result == SUSPECT:
                        yield Suspected(worker, ticket)
                    case _Call.RUN:
                        yield Done(worker, ticket, result)

    def _ended(self, worker: RayWorker, error: Exception) -> Ended[RayWorker]:
        self.kill(worker)
        return Ended(worker, error)


class _Follower:
    """The actor that holds one further node of a replica, and runs its part of the engine."""

    def follow(self, spec: ReplicaSpec, name: str, meeting: Any, nodes: int, rank: int) -> None:
        """Runs until that part of the engine ends, for whatever reason."""
        configure_logging(logging.INFO, "%(levelname)s %(name)s: %(message)s")
        logs.name_process(run=spec.run_name, replica=name[:NAME_LENGTH])
        engine: EngineSpec = spec.engine.on_node(meeting, nodes, rank)
        spec.follow_engine(engine)


class _Kept:
    """An answer that is asked for at most twice a second."""

    def __init__(self, ask: Any) -> None:
        self._ask = ask
        self._answer: Any = None
        self._asked = -_LOOK_INTERVAL_S

    def get(self) -> Any:
        if time.monotonic() - self._asked >= _LOOK_INTERVAL_S:
            self._answer, self._asked = self._ask(), time.monotonic()
        return self._answer

    def forget(self) -> None:
        self._asked = -_LOOK_INTERVAL_S


def node_capacity(name: str, resources: dict[str, Any]) -> NodeCapacity:
    """Ray's resources of one node, in total or free, in the project's terms."""
    return NodeCapacity(
        name=name,
        cpus=resources.get("CPU", 0.0),
        gpus=int(resources.get("GPU", 0)),
        memory_gib=resources.get("memory", 0.0) / _GIB,
        accelerator=next(
            (key[len(_ACCELERATOR) :] for key in resources if key.startswith(_ACCELERATOR)), None
        ),
    )


def last_line(error: Exception) -> str:
    """What a remote traceback ends with: the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Worker exit detail")[0] if lines else type(error).__name__


def _cpus_of(group: dict[str, Any]) -> float:
    """What an entry of the table of placement groups holds."""
    if group["state"] != "CREATED":
        return 0.0
    return float(sum(bundle.get("CPU", 0.0) for bundle in group["bundles"].values()))


def _wait_for_all(calls: list[ray.ObjectRef], timeout_s: float) -> None:
    """Until all are answered, or the actor is gone."""
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=timeout_s, fetch_local=False)


def _bundle(place: PlacementGroup, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=index)


def _own(error: RayTaskError) -> PipelineError:
    cause = error.cause
    if isinstance(cause, PipelineError):
        return type(cause)(str(cause))
    first_line = str(cause).partition("\n")[0]
    return EngineError(f"{type(cause).__name__}: {first_line}")
