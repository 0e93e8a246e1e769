"""The replicas of a run: their places in the cluster, their lives, and which works on which shard.

In: prepared shards, as they come; a ``Cluster`` to hold places and workers. Out: what came of each
shard. Every replica has a *seat* in the pool for the whole run. A seat asks for a *place* (the
share of the nodes that one replica takes, reserved as a whole or not at all), starts a *worker* in
it, and gives the worker up to ``depth`` shards at a time. Nothing here knows Ray; ``ray_cluster``
does.

- A replica works as soon as it is up: none waits for another to load, none holds a place idle. That
  is also why runs that share a full cluster cannot block each other.
- A worker that dies leaves its shards to whichever replica is free, first of all that wait.
- A shard that workers die of gets a worker of its own (see ``shard_queue``), and the next one on
  another node if there is one, so that a failing machine proves nothing.
- A worker that loses the store, or stops by itself, gets nothing more, and ends once its other
  shards have come back. The run fails only if several in a row lose the store.
- Its successor starts in the same place, unless a node of it is gone, or about to go: then the
  place is given back and the seat asks for another, as long as it takes; the others go on.
- Rows must be read and prepared somewhere: a place that leaves no CPU for that is given back until
  the nodes change, or all rows are read.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from pipeline.budget import Budget
from pipeline.errors import (
    EngineError,
    EngineRefusalError,
    PipelineError,
    StorageUnavailableError,
)
from pipeline.shard_queue import QueuedShard, ShardQueue

log = logging.getLogger(__name__)

_DEATHS_PER_SEAT = 4
"""Workers per seat that may end unasked, while no row is completed, until the run fails."""
_DEATHS_ALONE = 4
"""Beyond those, of workers with one suspect shard: to halve its rows takes some in a row."""
_DEATHS_OF_A_SHARD = 64
"""Workers that may end of one shard: enough for several rows of it to be found."""
_MORE_ON_A_NODE = 1
"""Deaths of a suspect on one node beyond those on another before it has to go there."""
_FAILED_LIVES_IN_A_PLACE = 2
"""Workers in a row that end without one shard done, after which a seat looks for another place:
its node may be at fault."""
_WITHOUT_STORE = 3
"""Workers in a row that lose the store, with no shard done between, after which the run fails."""
_LAST_WORDS_S = 15.0
"""For the other shards of a worker that is to end: their journals are written meanwhile."""
_CLOSE_S = 10.0
"""What engines get to end in order; their processes end with the workers' in any case."""
_CLOSE_DRAINED_S = 3.0
"""The same after a drain, whose time is up."""
_REMIND_S = 60.0
"""Between two lines about a seat that waits."""
_ASK_AGAIN_S = 10.0
"""Between two tries for a place that was given back, at least, while the nodes stay the same; twice
that at most, by chance, so that runs beside each other do not try in step."""

Item = TypeVar("Item")
Given = TypeVar("Given", contravariant=True)
Result = TypeVar("Result")
Place = TypeVar("Place")
Worker = TypeVar("Worker")


@dataclass(frozen=True, slots=True)
class Up(Generic[Worker]):
    """A worker is ready for shards."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class Ended(Generic[Worker]):
    """A worker is gone, with what it was doing."""

    worker: Worker
    error: Exception


@dataclass(frozen=True, slots=True)
class Done(Generic[Worker, Result]):
    """A worker is through with a shard."""

    worker: Worker
    ticket: int
    """Of the shard, as ``Cluster.submit`` was given."""
    result: Result


@dataclass(frozen=True, slots=True)
class Failed(Generic[Worker]):
    """A worker could not do a shard; the worker itself is still there."""

    worker: Worker
    ticket: int
    error: PipelineError


@dataclass(frozen=True, slots=True)
class Suspected(Generic[Worker]):
    """A worker has given a shard back, as it must run alone: an earlier start ended on it."""

    worker: Worker
    ticket: int


Event = Up[Worker] | Ended[Worker] | Done[Worker, Result] | Failed[Worker] | Suspected[Worker]


class Cluster(Protocol[Place, Worker, Given, Result]):
    """What the pool needs of a cluster. No call but ``wait`` blocks.

    What it says of nodes and places may be a moment old, but never older than the last ``reserve``
    or ``release``, and ``live_nodes`` never older than a place that ``nodes_of`` has found.
    """

    def reserve(self) -> Place:
        """Ask for a place; it may be had at once, later, or never."""

    def nodes_of(self, place: Place) -> Collection[str]:
        """The nodes a place is on; empty while it waits."""

    def release(self, place: Place) -> None:
        """Give a place back, asked for or held; what still runs in it ends."""

    def live_nodes(self) -> frozenset[str]:
        """The nodes that are there."""

    def going_nodes(self) -> frozenset[str]:
        """Those of them that are about to be taken away: nothing new is put there."""

    def spare_cpus(self, *, of_all: bool) -> float:
        """CPUs of all live nodes that no held place takes: none of this run, or none of anybody."""

    def lacking(self) -> str | None:
        """What a place that waits is waiting for, in words; None if it is about to be had."""

    def start(self, place: Place, name: str) -> Worker:
        """Start a worker in a place that is held."""

    def submit(self, worker: Worker, ticket: int, item: Given, *, alone: bool) -> None:
        """Give a worker that is up a shard; ``alone`` if workers have died of it: then the worker
        has no other, and is to find out which of its rows that is."""

    def kill(self, worker: Worker) -> None:
        """End a worker at once; its place stays held."""

    def wait(self, timeout_s: float) -> Sequence[Event[Worker, Result]]:
        """What happened; waits for the first up to ``timeout_s``."""

    def close(self, within_s: float) -> None:
        """End all workers, in order if there is time, and give every place back."""


@dataclass(eq=False)
class _Seat(Generic[Place, Worker, Item]):
    number: int
    """From 1."""
    name: str
    place: Place | None = None
    nodes: frozenset[str] = frozenset()
    worker: Worker | None = None
    up: bool = False
    work: dict[int, QueuedShard[Item]] = field(default_factory=dict)
    """By ticket."""
    alone: bool = False
    """Whether its only shard is a suspect."""
    since: float = 0.0
    """When it began to wait, or its worker to start."""
    reminded: float = 0.0
    shunned: tuple[frozenset[str], float] | None = None
    """The nodes as they were when its place was given back for want of CPUs, and when it may ask
    again although they are the same."""
    going: bool = False
    """Whether a node of its place is about to be taken away: its worker gets nothing more."""
    failed_lives: int = 0
    """Workers in a row, in its place, that ended without one shard done."""
    ending: tuple[Exception, float] | None = None
    """Why its worker gets nothing more, and when it ends at the latest."""

    @property
    def is_open(self) -> bool:
        """Whether its worker takes shards."""
        return self.up and not self.going and self.ending is None and not self.alone


class Pool(Generic[Place, Worker, Item, Result]):
    """Seats, and the shards that wait for one; for one thread. A context manager: its end is the
    end of all workers and places."""

    def __init__(
        self,
        cluster: Cluster[Place, Worker, Item, Result],
        names: Sequence[str],
        *,
        depth: int,
        spare_cpus: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A pool without any place yet.

        Args:
            cluster: holds places and workers.
            names: one per replica, the same for all workers that take its seat.
            depth: most shards a worker has at a time.
            spare_cpus: CPUs that places must leave free while rows are read.
            clock: monotonic seconds.
        """
        self._cluster = cluster
        self._seats: list[_Seat[Place, Worker, Item]] = [
            _Seat(number, name) for number, name in enumerate(names, 1)
        ]
        self._depth = depth
        self._spare_cpus = spare_cpus
        self._clock = clock
        self._queue: ShardQueue[Item] = ShardQueue()
        self._emptied: _Seat[Place, Worker, Item] | None = None
        """The seat that gets nothing more until a suspect can have it."""
        self._most_seated = 1
        self._failed_starts = 0
        self._deaths = self._deaths_alone = 0
        self._without_store = 0
        self._any_was_up = False
        self._fatal: PipelineError | None = None
        self.all_read = False
        """Whether no more rows are to be read and prepared: places may take all CPUs then."""
        self.draining = False
        """Whether workers were told to stop: shards then come back undone."""
        self.budget = Budget()
        """What there is until all of it has to be over."""

    def __enter__(self) -> Pool[Place, Worker, Item, Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        in_order_s = _CLOSE_DRAINED_S if self.draining else _CLOSE_S
        self._cluster.close(self.budget.left(in_order_s) if kind is None else 0.0)

    @property
    def room(self) -> int:
        """Shards that could be given out at once, beyond those that wait."""
        takers = [seat for seat in self._seats if seat.is_open and seat is not self._emptied]
        free = sum(self._depth - len(seat.work) for seat in takers)
        return max(0, free - self.waiting)

    @property
    def waiting(self) -> int:
        """Shards that wait for a replica, any of them."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether no shard waits or is worked on."""
        return not self._queue and not self.working

    @property
    def working(self) -> bool:
        """Whether any shard is worked on."""
        return any(seat.work for seat in self._seats)

    @property
    def lacking(self) -> str | None:
        """What the seats without a place wait for; None if all have one, or are about to."""
        without = [seat for seat in self._seats if not seat.nodes] if self._is_needed else []
        reason = self._reason(without) if without else None
        if reason is None:
            return None
        numbers = ", ".join(str(seat.number) for seat in without)
        return f"replica {numbers} of {len(self._seats)} waits: {reason}"

    @property
    def _is_needed(self) -> bool:
        """Whether a further worker would find something to do."""
        return not self.draining and (not self.all_read or bool(self._queue))

    def offer(self, item: Item) -> None:
        """One more shard; they are given out in this order."""
        self._queue.offer(item)

    def kill(self, name: str) -> bool:
        """End the worker that is up in the seat ``name``, for a successor; False if none is up."""
        for seat in self._seats:
            if seat.name == name and seat.up and seat.worker is not None:
                self._cluster.kill(seat.worker)
                self._replace(seat, EngineError("it gave no sign of life"))
                return True
        return False

    def note_progress(self) -> None:
        """A row was completed: what ended before that was no dead end."""
        self._deaths = self._deaths_alone = 0

    @property
    def dead_ends(self) -> int:
        """Workers that ended unasked since the last progress, once they are too many; else 0.

        The bound is of the most seats that ever had a place: when nodes go, the deaths so far must
        not look like too many for the seats that stay.
        """
        most = _DEATHS_PER_SEAT * self._most_seated
        found = self._deaths + self._deaths_alone
        return found if self._deaths > most or found > most + _DEATHS_ALONE else 0

    def step(self, timeout_s: float) -> Iterator[Result]:
        """Look after seats, give shards out, and yield what came of those that are done.

        Raises:
            EngineError: an engine refuses to start, or workers end again and again while no row
                is completed.
            PipelineError: a shard cannot be done by any worker. Workers that are left go on, so
                the caller can have them drained.
        """
        self._seat_all()
        self._give_out()
        for event in self._cluster.wait(timeout_s):
            seat = self._seat_of(event.worker)
            if seat is not None:  # else the last words of one that was replaced
                yield from self._heard(seat, event)
        self._end_those_ending()
        self._give_out()
        if self._fatal is not None and not self.draining:
            raise self._fatal

    def _heard(
        self, seat: _Seat[Place, Worker, Item], event: Event[Worker, Result]
    ) -> Iterator[Result]:
        match event:
            case Up():
                self._welcome(seat)
            case Ended(_, error):
                self._replace(seat, error)
            case Failed(_, ticket, error):
                self._failed(seat, ticket, error)
            case Suspected(_, ticket):
                seat.work[ticket].suspect()
                self._queue.put_back([seat.work.pop(ticket)])
            case Done(_, ticket, None) if not self.draining:
                self._retire(seat, ticket, EngineError("it takes no more rows, unasked"))
            case Done(_, ticket, result):
                if result is not None:
                    self._failed_starts = self._without_store = seat.failed_lives = 0
                    self.note_progress()
                seat.alone = False
                if seat.work.pop(ticket, None) is not None:
                    yield result

    def _failed(self, seat: _Seat[Place, Worker, Item], ticket: int, error: PipelineError) -> None:
        """A store that is lost is the worker's fault, until several in a row have lost it."""
        if self.draining:
            log.warning("replica %d leaves a shard as it is: %s", seat.number, error)
            seat.work.pop(ticket, None)
            return
        if isinstance(error, StorageUnavailableError):
            if seat.ending is None:
                self._without_store += 1
            self._retire(seat, ticket, error)
            if self._without_store < _WITHOUT_STORE:
                return
        seat.work.pop(ticket, None)
        self._fatal = self._fatal or error

    def _retire(self, seat: _Seat[Place, Worker, Item], ticket: int, error: Exception) -> None:
        """Take this shard back, and end the worker when its others have come back, or their time
        is up: they may be writing their journals."""
        if ticket in seat.work:
            self._queue.put_back([seat.work.pop(ticket)])
        if seat.ending is None:
            seat.ending = (error, self._clock() + _LAST_WORDS_S)

    def _end_those_ending(self) -> None:
        for seat in self._seats:
            if seat.ending is None or seat.worker is None:
                continue
            error, until = seat.ending
            if not seat.work or self._clock() >= until:
                self._cluster.kill(seat.worker)
                self._replace(seat, error)

    def _seat_all(self) -> None:
        """One step for all seats, so that the table of places is read once, however many ask."""
        nodes = self._cluster.live_nodes()
        going = self._cluster.going_nodes()
        for seat in self._seats:
            seat.going = bool(seat.nodes & going)
            if seat.nodes - nodes or (seat.going and not seat.work):
                self._leave_place(seat, "lost its node")
        if self._is_needed:
            self._ask_for_places(nodes)
            self._take_places(nodes)
            self._start_workers()
        for seat in self._seats:
            self._remind(seat)
        self._keep_cpus(nodes)

    def _ask_for_places(self, nodes: frozenset[str]) -> None:
        for seat in self._seats:
            if seat.place is None and self._may_ask(seat, nodes):
                seat.place = self._cluster.reserve()
                seat.since = seat.reminded = self._clock()

    def _take_places(self, nodes: frozenset[str]) -> None:
        """Take what places there are; one that leaves no CPU to prepare rows is given back.

        One at a time: the next step sees what is free then, and may keep the others.
        """
        found = [
            (seat, seat.place, frozenset(self._cluster.nodes_of(seat.place)))
            for seat in self._seats
            if seat.place is not None and not seat.nodes
        ]
        found = [(seat, place, held) for seat, place, held in found if held]
        if not found:
            return
        if not self.all_read and self._cluster.spare_cpus(of_all=True) < self._spare_cpus:
            seat, place, _ = found[-1]
            self._cluster.release(place)
            seat.place = None
            self._shun(seat, nodes)
            return
        for seat, _, held in found:
            seat.nodes, seat.shunned = held, None
        self._most_seated = max(self._most_seated, sum(bool(seat.nodes) for seat in self._seats))

    def _start_workers(self) -> None:
        for seat in self._seats:
            if seat.nodes and seat.worker is None and seat.place is not None:
                seat.worker = self._cluster.start(seat.place, seat.name)
                seat.since = self._clock()

    def _keep_cpus(self, nodes: frozenset[str]) -> None:
        """Nodes that are lost may have been those that prepared rows: one replica makes room."""
        if self.all_read or self._cluster.spare_cpus(of_all=False) >= self._spare_cpus:
            return
        held = [seat for seat in self._seats if seat.nodes]
        if held:
            seat = min(held, key=lambda seat: (seat.up, len(seat.work), -seat.number))
            self._leave_place(seat, "makes room to prepare rows")
            self._shun(seat, nodes)

    def _shun(self, seat: _Seat[Place, Worker, Item], nodes: frozenset[str]) -> None:
        wait_s = _ASK_AGAIN_S * (1 + random.random())
        seat.shunned = (nodes, self._clock() + wait_s)

    def _may_ask(self, seat: _Seat[Place, Worker, Item], nodes: frozenset[str]) -> bool:
        """A place just given back is not asked for again at once: it would be the same one. Of
        seats that gave theirs back, one at a time asks again."""
        if seat.shunned is None or self.all_read:
            return True
        before, again = seat.shunned
        asked = any(other.shunned and other.place is not None for other in self._seats)
        return nodes != before or (self._clock() > again and not asked)

    def _give_out(self) -> None:
        """The first shard that waits goes to the replica with the fewest."""
        if self.draining:
            return
        self._give_out_suspects()
        while len(self._queue):
            free = [
                seat
                for seat in self._seats
                if seat.is_open and seat is not self._emptied and len(seat.work) < self._depth
            ]
            if not free:
                return
            seat = min(free, key=lambda seat: (len(seat.work), seat.number))
            self._submit(seat, self._queue.next())

    def _give_out_suspects(self) -> None:
        """Each suspect gets a replica without work; one at a time is emptied for the next."""
        self._emptied, before = None, self._emptied
        for shard in list(self._queue.suspects):
            seat = self._seat_for(shard, before)
            if seat is None:
                continue
            if seat.work:
                self._emptied = self._emptied or seat
                continue
            self._queue.suspects.remove(shard)
            seat.alone = True
            self._submit(seat, shard)

    def _seat_for(
        self, shard: QueuedShard[Item], emptied: _Seat[Place, Worker, Item] | None
    ) -> _Seat[Place, Worker, Item] | None:
        """The replica for a suspect: one without work, or soon without, on a node where it died
        hardly more often than on others; None if there is none just now."""
        there = [seat for seat in self._seats if seat.up and not seat.going]
        fewest = min((shard.deaths_on(seat.nodes) for seat in there), default=0)
        fitting = [
            seat
            for seat in there
            if seat.is_open and shard.deaths_on(seat.nodes) <= fewest + _MORE_ON_A_NODE
        ]
        order = {
            seat: (bool(seat.work) and seat is not emptied, len(seat.work)) for seat in fitting
        }
        return min(fitting, key=lambda seat: (*order[seat], seat.number), default=None)

    def _submit(self, seat: _Seat[Place, Worker, Item], shard: QueuedShard[Item]) -> None:
        assert seat.worker is not None
        seat.work[shard.ticket] = shard
        self._cluster.submit(seat.worker, shard.ticket, shard.item, alone=shard.is_suspect)

    def _welcome(self, seat: _Seat[Place, Worker, Item]) -> None:
        seat.up = self._any_was_up = True
        self._failed_starts = 0
        log.info(
            "replica %d of %d is up after %.0f s",
            seat.number,
            len(self._seats),
            self._clock() - seat.since,
        )

    def _replace(self, seat: _Seat[Place, Worker, Item], error: Exception) -> None:
        log.warning("replica %d of %d ended: %s", seat.number, len(self._seats), error)
        if not seat.going:
            seat.failed_lives += not seat.alone
            self._count_death(seat, error)
        self._vacate(seat)
        if seat.failed_lives >= _FAILED_LIVES_IN_A_PLACE:
            self._leave_place(seat, "tries another place")

    def _count_death(self, seat: _Seat[Place, Worker, Item], error: Exception) -> None:
        if isinstance(error, EngineRefusalError) and not self._any_was_up:
            self._fatal = self._fatal or error
        self._deaths += not seat.alone
        self._deaths_alone += seat.alone
        self._failed_starts += not seat.up
        if self._failed_starts > _DEATHS_PER_SEAT * self._most_seated:
            message = f"{self._failed_starts} replicas did not come up: {error}"
            self._fatal = self._fatal or EngineError(message)
        for shard in seat.work.values() if seat.ending is None else ():
            shard.count_death(seat.nodes, alone=seat.alone)
            if shard.deaths > _DEATHS_OF_A_SHARD:
                message = f"{shard.deaths} replicas ended at the same shard: {error}"
                self._fatal = self._fatal or EngineError(message)

    def _vacate(self, seat: _Seat[Place, Worker, Item]) -> None:
        """The worker is gone; its shards wait first of all, in their old order."""
        self._queue.put_back(seat.work.values())
        seat.work, seat.worker, seat.up = {}, None, False
        seat.alone, seat.ending = False, None

    def _leave_place(self, seat: _Seat[Place, Worker, Item], why: str) -> None:
        assert seat.place is not None
        log.warning("replica %d of %d %s", seat.number, len(self._seats), why)
        if seat.worker is not None:
            self._cluster.kill(seat.worker)
        self._cluster.release(seat.place)
        self._vacate(seat)
        seat.place, seat.nodes, seat.going, seat.failed_lives = None, frozenset(), False, 0

    def _remind(self, seat: _Seat[Place, Worker, Item]) -> None:
        now = self._clock()
        if not seat.nodes and self._is_needed and now - seat.reminded >= _REMIND_S:
            seat.reminded = now
            if reason := self._reason([seat]):
                log.warning("replica %d of %d waits: %s", seat.number, len(self._seats), reason)

    def _reason(self, seats: Sequence[_Seat[Place, Worker, Item]]) -> str | None:
        if all(seat.shunned is not None for seat in seats):
            return f"{self._spare_cpus:g} CPU must stay free to prepare rows with"
        return self._cluster.lacking()

    def _seat_of(self, worker: Worker) -> _Seat[Place, Worker, Item] | None:
        return next((seat for seat in self._seats if seat.worker is worker), None)
