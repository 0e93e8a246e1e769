"""What the simulation compares: the pipeline's own scheduling, and the plain one beside it.

A policy says how rows are cut into shards, how many of them a replica has at a time, in which
order their rows go to the engine, and how many the engine gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.admission import AdmissionWindow, EngineLoad
from pipeline.backlog import Backlog, Waiting
from pipeline.plan import OPEN_SHARDS, InputFile, Plan, make_plan

SHARD_ROWS = 512
"""``limits.shard_rows`` unless configured."""
_SHARD_BYTES = 64 * 2**20
_ROW_BYTES = 2_000
_FILE_ROWS = 100_000
_WINDOW_PER_SEQUENCE = 1.25


class Window(Protocol):
    """How many requests an engine gets; see ``pipeline.admission.AdmissionWindow``."""

    @property
    def limit(self) -> int:
        """Most requests inside the engine."""

    def observe(self, load: EngineLoad, inside: int) -> None:
        """Hear of a step."""


class Queue(Protocol):
    """Rows that wait for a replica's engine; see ``pipeline.backlog.Backlog``."""

    def __len__(self) -> int:
        """Rows that wait."""

    def add(self, samples: Sequence[Waiting[int]]) -> None:
        """Take in the rows of one shard."""

    def pop(self) -> int | None:
        """The row to go next."""


@dataclass(frozen=True)
class Policy:
    """One way to schedule a run."""

    name: str
    cut: Callable[[int, int], Sequence[range]]
    """(rows, replicas) -> shards."""
    make_queue: Callable[[int], Queue]
    """Of the number of open shards."""
    make_window: Callable[[int], Window]
    """Of the engine's most sequences."""
    open_shards: int = OPEN_SHARDS
    """Shards a replica works on at a time."""
    queued_shards: int = 1
    """Shards bound to a replica beyond those."""


class FifoQueue:
    """Rows in the order they came."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows) - self._next

    def add(self, samples: Sequence[Waiting[int]]) -> None:
        """Behind all others."""
        self._rows = self._rows[self._next :] + [waiting.sample for waiting in samples]
        self._next = 0

    def pop(self) -> int | None:
        """The oldest."""
        if self._next == len(self._rows):
            return None
        self._next += 1
        return self._rows[self._next - 1]


@dataclass
class ConstantWindow:
    """A number that somebody set."""

    limit: int

    def observe(self, load: EngineLoad, inside: int) -> None:
        """Nothing follows from it."""


def input_files(rows: int) -> list[InputFile]:
    """So many rows in Parquet files of 100,000 rows of 2 kB."""
    return [
        InputFile(f"s3://b/{first:012d}.parquet", 0, "", count, count * _ROW_BYTES)
        for first in range(0, rows, _FILE_ROWS)
        for count in (min(_FILE_ROWS, rows - first),)
    ]


def plan_of(files: Sequence[InputFile], replicas: int) -> Plan:
    """The pipeline's plan of ``files`` with its default limits."""
    return make_plan(files, shard_rows=SHARD_ROWS, shard_bytes=_SHARD_BYTES, replicas=replicas)


def planned(rows: int, replicas: int) -> list[range]:
    """The pipeline's plan of so many rows."""
    return row_ranges(plan_of(input_files(rows), replicas))


def row_ranges(plan: Plan) -> list[range]:
    """The plan's shards as rows of all files, one after the other."""
    shards, first = [], 0
    for shard in plan.shards:
        shards.append(range(first, first + shard.rows))
        first += shard.rows
    return shards


def equal(rows: int, replicas: int) -> list[range]:
    """Shards of one size, whatever the number of replicas."""
    del replicas
    return [range(first, min(first + SHARD_ROWS, rows)) for first in range(0, rows, SHARD_ROWS)]


def _backlog(open_shards: int) -> Queue:
    return Backlog[int](open_shards)


def _admission_window(_seats: int) -> Window:
    return AdmissionWindow()


def _fifo_queue(_open_shards: int) -> Queue:
    return FifoQueue()


def _constant_window(seats: int) -> Window:
    return ConstantWindow(int(_WINDOW_PER_SEQUENCE * seats))


PIPELINE = Policy("pipeline", planned, _backlog, _admission_window)
"""What runs: ``plan.make_plan``, ``backlog.Backlog`` and ``admission.AdmissionWindow``."""
FIFO = Policy("FIFO, equal shards", equal, _fifo_queue, _constant_window)
"""Rows in input order, shards of 512 rows, a window of 1.25 x the engine's sequences."""
