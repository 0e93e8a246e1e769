"""CPU time by step: where the pipeline's own cost goes.

In: clocks of threads and processes. Out: seconds per step, which travel with a shard's block to its
part's stats, and from there into the report. A look at a clock takes below a microsecond, and there
are some ten per shard.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

import pyarrow as pa


class Step(StrEnum):
    """What CPU time was spent on."""

    START = "start"
    """A process's first look at the model's small files, and the imports for it."""
    READ = "read"
    PREPARE = "prepare"
    QUEUE = "queue"
    """Prepared blocks into rows, in the replica."""
    RENDER = "render"
    """Images decoded and cut into the engine's tiles, in the replica."""
    ENGINE = "engine"
    """The thread that talks to the engine: admission and the engine's client, not the engine."""
    JOURNAL = "journal"
    COMMIT = "commit"
    RAY = "ray"
    """The rest of the processes that run the steps: Ray's part in them, and what no step counts."""


_COLUMN = "cpu_s"
_BEFORE_REPLICA = (Step.START, Step.READ, Step.PREPARE, Step.RAY)
_TYPE = pa.struct([(step, pa.float64()) for step in _BEFORE_REPLICA])


class Laps:
    """A clock that is read lap by lap; the first lap starts when it is made."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._last = clock()

    def lap(self) -> float:
        """Seconds since the lap before."""
        last, self._last = self._last, self._clock()
        return self._last - last


class Meter:
    """What the threads of one process spend, by step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent: defaultdict[Step, float] = defaultdict(float)
        self._process = Laps()

    @contextmanager
    def counts(self, step: Step) -> Iterator[None]:
        """What the calling thread spends within, is ``step``'s."""
        started = time.thread_time()
        try:
            yield
        finally:
            spent = time.thread_time() - started
            with self._lock:
                self._spent[step] += spent

    def take(self, more: Mapping[Step, Laps]) -> dict[str, float]:
        """Seconds by step since the last call; ``more`` are steps with a clock of their own.

        ``ray`` is what is left of the process. It is less than 0 when a step ends after this that
        began before the last call; sums over many calls are not.
        """
        with self._lock:
            spent = {**self._spent, **{step: laps.lap() for step, laps in more.items()}}
            self._spent.clear()
            rest = self._process.lap() - sum(spent.values())
        return added(spent, {Step.RAY: rest})


def thread_laps(thread: threading.Thread) -> Laps:
    """The CPU time of a running thread, for other threads to read."""
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    return Laps(lambda: time.clock_gettime(clock))


def with_cpu(block: pa.Table, spent: Mapping[str, float]) -> pa.Table:
    """``block`` with what its rows have cost so far, in place of what it said of that.

    A column, the same in each row: a schema's metadata is not sure to pass through Ray Data.
    """
    kept = block.drop_columns([_COLUMN]) if _COLUMN in block.column_names else block
    column = pa.repeat(pa.scalar(dict(spent), _TYPE), block.num_rows)
    return kept.append_column(_COLUMN, column)


def block_cpu(block: pa.Table) -> dict[str, float]:
    """What the block's rows have cost so far: seconds by step; empty if it does not say."""
    if _COLUMN not in block.column_names or block.num_rows == 0:
        return {}
    spent: dict[str, float | None] = block.column(_COLUMN)[0].as_py()
    return {step: seconds for step, seconds in spent.items() if seconds is not None}


def added(*costs: Mapping[str, float] | Mapping[Step, float]) -> dict[str, float]:
    """Seconds by step, summed."""
    total: defaultdict[str, float] = defaultdict(float)
    for cost in costs:
        for step, seconds in cost.items():
            total[str(step)] += seconds
    return dict(total)
