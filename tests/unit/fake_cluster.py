"""A cluster of nodes that are only numbers, behind the pool's protocol.

It reserves as Ray does (all shares of a place at once, each on another node, or none), and fails
the test where a GPU would be taken twice, a worker started outside of a place, or a place given
back twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pipeline.capacity import NodeCapacity, waits_for
from pipeline.errors import EngineError, PipelineError
from pipeline.pool import Done, Ended, Event, Failed, Up
from pipeline.profile import Needs


@dataclass
class Node:
    """Of so many GPUs and CPUs."""

    gpus: int = 8
    cpus: int = 64


@dataclass(eq=False)
class FakePlace:
    """Asked for, then on nodes, then given back."""

    nodes: tuple[str, ...] = ()
    released: bool = False


@dataclass(eq=False)
class FakeWorker:
    """What a replica's processes are."""

    place: FakePlace
    name: str
    up: bool = False
    gone: bool = False
    work: dict[int, str] = field(default_factory=dict)
    alone: bool = False
    """Whether its only shard is a suspect."""


class FakeCluster:
    """Nodes by name; whoever tests decides when workers come up, end, or are done."""

    def __init__(
        self,
        nodes: int,
        needs: Needs,
        node: Node | None = None,
        *,
        beside: FakeCluster | None = None,
    ) -> None:
        """``beside`` is another run's view of the same nodes."""
        self.needs = needs
        self.nodes: dict[str, Node] = beside.nodes if beside else {}
        self.everyones: list[FakePlace] = beside.everyones if beside else []
        self.places: list[FakePlace] = []
        self.workers: list[FakeWorker] = []
        self.events: list[Event[FakeWorker, str | None]] = []
        self.started_in: list[FakePlace] = []
        self.closed_within_s: float | None = None
        self.going: set[str] = set()
        """Nodes that are about to be taken away."""
        self._added = 0
        for _ in range(nodes):
            self.add_node(node)

    def add_node(self, node: Node | None = None) -> str:
        """A further node; its name."""
        self._added += 1
        name = f"node-{self._added}"
        self.nodes[name] = node or Node()
        return name

    def lose_node(self, name: str) -> None:
        """With all workers that are on it, in part or whole."""
        del self.nodes[name]
        for worker in self.working:
            if name in worker.place.nodes:
                self.end(worker, EngineError("its node is gone"))

    @property
    def held(self) -> list[FakePlace]:
        """Places that are on nodes."""
        return [place for place in self.places if place.nodes]

    @property
    def working(self) -> list[FakeWorker]:
        """Workers that are there."""
        return [worker for worker in self.workers if not worker.gone]

    def free(self, name: str) -> NodeCapacity:
        """What no place has of a node."""
        taken = sum(place.nodes.count(name) for place in self.everyones)
        node = self.nodes[name]
        gpus = node.gpus - taken * self.needs.gpus_per_node
        cpus = node.cpus - taken * self.needs.cpus_per_node
        assert gpus >= 0, f"{name}: a GPU is taken twice"
        assert cpus >= 0, f"{name}: a CPU is taken twice"
        return NodeCapacity(name, cpus, gpus, 1000, self.needs.accelerator)

    def come_up(self, worker: FakeWorker) -> None:
        """Its engine is loaded."""
        worker.up = True
        self.events.append(Up(worker))

    def end(self, worker: FakeWorker, error: Exception | None = None) -> None:
        """It dies."""
        worker.gone = True
        self.events.append(Ended(worker, error or EngineError("killed")))

    def finish(self, worker: FakeWorker, ticket: int) -> None:
        """A shard is committed."""
        self.events.append(Done(worker, ticket, worker.work.pop(ticket)))

    def fail(self, worker: FakeWorker, ticket: int, error: PipelineError) -> None:
        """A shard cannot be done."""
        worker.work.pop(ticket)
        self.events.append(Failed(worker, ticket, error))

    # What the pool asks for.

    def reserve(self) -> FakePlace:
        place = FakePlace()
        self.places.append(place)
        self.everyones.append(place)
        return place

    def nodes_of(self, place: FakePlace) -> Collection[str]:
        assert not place.released
        if not place.nodes:
            fitting = [name for name in self.nodes if self._fits(name) and name not in self.going]
            if len(fitting) >= self.needs.nodes:
                place.nodes = tuple(fitting[: self.needs.nodes])
        return place.nodes

    def release(self, place: FakePlace) -> None:
        assert not place.released, "given back twice"
        place.released = True
        self.places.remove(place)
        self.everyones.remove(place)
        assert not [w for w in self.working if w.place is place], "a worker was left behind"

    def live_nodes(self) -> frozenset[str]:
        return frozenset(self.nodes)

    def going_nodes(self) -> frozenset[str]:
        return frozenset(self.going)

    def spare_cpus(self, *, of_all: bool) -> float:
        there = sum(node.cpus for node in self.nodes.values())
        taken = [place for place in (self.everyones if of_all else self.places) if place.nodes]
        return there - len(taken) * self.needs.nodes * self.needs.cpus_per_node

    def lacking(self) -> str | None:
        staying = [name for name in self.nodes if name not in self.going]
        return waits_for(self.needs, [self.free(name) for name in staying])

    def start(self, place: FakePlace, name: str) -> FakeWorker:
        assert place.nodes
        assert not place.released
        assert not [worker for worker in self.working if worker.place is place]
        worker = FakeWorker(place, name)
        self.workers.append(worker)
        self.started_in.append(place)
        return worker

    def submit(self, worker: FakeWorker, ticket: int, item: str, *, alone: bool) -> None:
        assert worker.up
        assert not worker.work or not (alone or worker.alone), "a suspect is not alone"
        worker.alone = alone
        if not worker.gone:  # Ray would tell a moment later that it is
            worker.work[ticket] = item

    def kill(self, worker: FakeWorker) -> None:
        worker.gone = True

    def wait(self, _timeout_s: float) -> Sequence[Event[FakeWorker, str | None]]:
        events, self.events = self.events, []
        return events

    def close(self, within_s: float) -> None:
        self.closed_within_s = within_s
        for worker in self.working:
            self.kill(worker)
        for place in list(self.places):
            self.release(place)

    def _fits(self, name: str) -> bool:
        free = self.free(name)
        needs = self.needs
        return free.gpus >= needs.gpus_per_node and free.cpus >= needs.cpus_per_node


class SlowCluster(FakeCluster):
    """Behaves as Ray does: a place is there a moment after it was asked for, and the table of
    places and the list of nodes are kept for half a second. Counts the reads of the table.
    """

    def __init__(self, nodes: int, needs: Needs, node: Node, clock: Callable[[], float]) -> None:
        self.reads = 0
        self._clock = clock
        self._asked: dict[FakePlace, float] = {}
        self._table: dict[FakePlace, tuple[str, ...]] = {}
        self._table_at = self._nodes_at = -math.inf
        self._seen: dict[str, Node] = {}
        super().__init__(nodes, needs, node)

    @property
    def waiting(self) -> list[FakePlace]:
        """Places that were asked for and are not there yet."""
        return [place for place in self.places if not place.nodes]

    def reserve(self) -> FakePlace:
        place = super().reserve()
        self._asked[place] = self._clock()
        self._table_at = -math.inf
        return place

    def nodes_of(self, place: FakePlace) -> Collection[str]:
        self._read()
        if self._table.get(place):
            self._nodes_at = -math.inf
        return self._table.get(place, ())

    def release(self, place: FakePlace) -> None:
        super().release(place)
        self._table_at = -math.inf

    def live_nodes(self) -> frozenset[str]:
        if self._clock() - self._nodes_at >= 0.5:
            self._seen, self._nodes_at = dict(self.nodes), self._clock()
        return frozenset(self._seen)

    def spare_cpus(self, *, of_all: bool) -> float:
        self._read()
        places = self._table if of_all else {place: place.nodes for place in self.held}
        there = sum(self.nodes[name].cpus for name in self.live_nodes() if name in self.nodes)
        taken = sum(len(nodes) for nodes in places.values())
        return there - taken * self.needs.cpus_per_node

    def _read(self) -> None:
        if self._clock() - self._table_at < 0.5:
            return
        self.reads += 1
        self._table_at = self._clock()
        for place in self.places:
            if self._clock() - self._asked[place] >= 0.1:
                super().nodes_of(place)
        self._table = {place: place.nodes for place in self.places}
