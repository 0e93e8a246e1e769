"""suspects: which row of a shard ends its replica's process, found by trying rows alone.

    _journal/<shard>/<when>-<id>.json     a trial: rows that nothing else is in the engine with

In: a shard that replicas have died of, alone on one of them; its rows without a record. Out: their
outcomes, in batches; the row that kills is ``engine_fatal``, the others complete.

A process that dies cannot tell what was inside. So it writes that down first: a trial is stored
before its rows enter the engine, and removed once they are through. Trials that were left behind
are the deaths of earlier processes, of this start of the run or another, on any node. Each death
halves the rows that may have caused it; those that no trial accuses go first, so every process
completes something before it meets the killer.

A row is convicted after three deaths at which it was alone, all within this start: a driver that is
killed takes its replicas with it, which is no row's fault. An engine is asked for one token first:
one that cannot do that is at fault itself. And the pool spreads the deaths of a shard over nodes.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline import storage
from pipeline.errors import EngineError, ErrorCode, RowError
from pipeline.journal import TRIAL_SUFFIX, Journal
from pipeline.records import Failure, Outcome, Prepared, SampleKey, engine_failure
from pipeline.sampling import Sampling

log = logging.getLogger(__name__)

_DEATHS_TO_CONVICT = 3


class Generate(Protocol):
    """``Replica.generate`` for one shard."""

    def __call__(
        self, items: Sequence[Prepared | Failure], *, known: Collection[SampleKey] = ...
    ) -> Iterator[list[Outcome]]:
        """The outcomes of ``items`` without those in ``known``; fewer if a drain ends it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows that were in an engine alone when its process ended."""

    rows: tuple[int, ...]
    start: float
    """When the driver's start began, which made it."""


class Suspects:
    """The trials of one shard."""

    def __init__(self, journal: Journal, run: str, start: float) -> None:
        """Read the trials that were left behind.

        Args:
            journal: the shard's, as it was read.
            run: id of the run; trials of another do not count.
            start: when the driver's start began.

        Raises:
            StorageError: a trial cannot be read.
        """
        self._run = run
        self._folder = journal.folder
        self._start = start
        read = {uri: _read(uri, run) for uri in journal.trials}
        self._left = {uri: trial for uri, trial in read.items() if trial is not None}

    def next(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Of ``rows``, which have no record yet, those to try next."""
        return next_rows(rows, [trial.rows for trial in self._left.values()])

    def deaths_alone(self, row: int) -> int:
        """How many processes of this start ended with just this row inside."""
        alone = Trial((row,), self._start)
        return sum(trial == alone for trial in self._left.values())

    @contextmanager
    def trial(self, rows: Sequence[int]) -> Iterator[None]:
        """Within, ``rows`` are in the engine; if the process or its engine ends, that stays known.

        Raises:
            StorageError: the trial cannot be stored.
        """
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}{TRIAL_SUFFIX}"
        uri = storage.join(self._folder, name)
        document = {"run": self._run, "rows": list(rows), "start": self._start}
        storage.put_bytes(uri, json.dumps(document).encode())
        try:
            yield
        except EngineError:
            raise
        except BaseException:
            storage.delete(uri)
            raise
        storage.delete(uri)

    def clear(self) -> None:
        """Remove what was left behind: the part holds all rows now."""
        storage.delete_all(list(self._left))
        self._left = {}


def next_rows(rows: Sequence[int], accused: Sequence[Collection[int]]) -> tuple[int, ...]:
    """Of ``rows``, those to try next, in the order given.

    Args:
        rows: without a record yet.
        accused: rows that were alone in an engine when it ended, by death.

    Those outside of all smallest groups of ``accused`` come first; then the first half of the
    smallest group, the larger one if it is odd.
    """
    groups = {group for each in accused if (group := frozenset(each).intersection(rows))}
    smallest = [group for group in groups if not any(other < group for other in groups)]
    free = tuple(row for row in rows if not any(row in group for group in smallest))
    if free or not smallest:
        return free
    group = min(smallest, key=lambda group: (len(group), min(group)))
    return tuple(row for row in rows if row in group)[: (len(group) + 1) // 2]


def complete_alone(
    items: Sequence[Prepared | Failure],
    known: Collection[SampleKey],
    suspects: Suspects,
    generate: Generate,
    draining: Callable[[], bool],
) -> Iterator[list[Outcome]]:
    """Complete one shard that replicas have died of; each batch must be journaled before the next.

    Raises:
        EngineError: the engine is at fault itself, or died of rows that stay accused.
        StorageError: a trial cannot be stored.
    """
    rows = {item.input_row: item for item in items if isinstance(item, Prepared)}
    done = set(known)
    yield from generate([item for item in items if isinstance(item, Failure)], known=done)
    while left := [row for row in rows if missing(rows[row], done)]:
        if draining():
            return
        chosen = suspects.next(left)
        deaths = suspects.deaths_alone(chosen[0])
        if deaths >= _DEATHS_TO_CONVICT:
            batch = _fatal(rows[chosen[0]], missing(rows[chosen[0]], done), deaths)
            done.update(outcome.key for outcome in batch)
            yield batch
            continue
        with suspects.trial(chosen):
            for batch in generate([rows[row] for row in chosen], known=done):
                done.update(outcome.key for outcome in batch)
                yield batch


def check_engine(items: Sequence[Prepared | Failure], generate: Generate) -> None:
    """Have the engine make one token, for the first token of a prompt.

    Raises:
        EngineError: it cannot.
    """
    item = next((item for item in items if isinstance(item, Prepared)), None)
    if item is None:
        return
    least = replace(
        item,
        input_row=-1,
        token_ids=item.token_ids[:1],
        images=(),
        image_tokens=0,
        prompt_tokens=1,
        sampling=Sampling(max_completion_tokens=1),
        seeds=item.seeds[:1],
    )
    answers = [outcome for batch in generate([least]) for outcome in batch]
    if failed := [answer for answer in answers if isinstance(answer, Failure)]:
        raise EngineError(f"the engine cannot make one token: {failed[0].message}")


def missing(item: Prepared, done: Collection[SampleKey]) -> list[int]:
    """The samples of a row that have no record yet."""
    return [index for index in range(item.sampling.n) if (item.input_row, index) not in done]


def _fatal(item: Prepared, samples: Sequence[int], deaths: int) -> list[Outcome]:
    log.warning("row %d ends the processes of replicas", item.input_row)
    message = f"{deaths} replicas' processes ended with this row alone in their engines"
    error = RowError(ErrorCode.ENGINE_FATAL, message)
    return [engine_failure(item, index, error, deaths) for index in samples]


def _read(uri: str, run: str) -> Trial | None:
    """None if it is no trial, another run's, or was removed meanwhile."""
    try:
        document = json.loads(storage.read_bytes(uri))
        if document["run"] != run:
            return None
        return Trial(tuple(map(int, document["rows"])), float(document["start"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is not a trial of rows and is left out: %s", uri, error)
        return None
