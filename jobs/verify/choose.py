"""Which records are replayed: spread over the whole run, and the same ones each time.

In: how many records of each part succeeded. Out: ``Chosen`` records, read from the parts they are
in, and the shards of just their rows. The run's id seeds the choice: another run, another choice;
the same run, the same one, on any machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import pyarrow.compute as pc

from jobs.verify.asked import RowKey
from pipeline import storage
from pipeline.commit import read_stored_part
from pipeline.jsonl import row_spans
from pipeline.plan import Shard
from pipeline.records import Status

_THREADS = 8


@dataclass(frozen=True, slots=True)
class Chosen:
    """A record to replay, as its part has it."""

    record: Mapping[str, Any]
    shard: int
    hardware: str
    """What its replica ran on; empty if the part does not say."""
    engine: str
    """The fingerprint of its replica's engine; empty if the part does not say."""

    @property
    def row(self) -> RowKey:
        """Its row of the input."""
        return self.record["input_file"], self.record["input_row"]


def choose(run_id: str, succeeded: Mapping[int, int], sample: int) -> dict[int, list[int]]:
    """Per shard, which of its succeeded records to take, by their order in the part.

    The run's succeeded records are cut into ``sample`` stretches of one length, and one record is
    drawn from each; all, if there are no more than ``sample``.

    Args:
        run_id: the run's id.
        succeeded: shard -> number of records that succeeded.
        sample: how many to take.
    """
    shards = sorted(succeeded)
    ends = list(accumulate(succeeded[shard] for shard in shards))
    count = ends[-1] if ends else 0
    if count <= sample:
        return {shard: list(range(succeeded[shard])) for shard in shards if succeeded[shard]}
    rng = Random(run_id)
    taken: dict[int, list[int]] = {}
    for stretch in range(sample):
        first, end = stretch * count // sample, (stretch + 1) * count // sample
        place = rng.randrange(first, end)
        number = bisect_right(ends, place)
        before = ends[number - 1] if number else 0
        taken.setdefault(shards[number], []).append(place - before)
    return taken


def read_chosen(output_uri: str, taken: Mapping[int, Sequence[int]]) -> list[Chosen]:
    """The records that ``choose`` took, in the order of the input.

    Raises:
        StorageError: a part cannot be read.
    """

    def read(shard: int) -> list[Chosen]:
        stored = read_stored_part(output_uri, shard)
        good = stored.table.filter(pc.equal(stored.table.column("status"), str(Status.SUCCEEDED)))
        by = stored.stats.replica
        return [
            Chosen(record, shard, by.get("hardware", ""), by.get("engine", ""))
            for record in good.take(list(taken[shard])).to_pylist()
        ]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [each for chosen in pool.map(read, sorted(taken)) for each in chosen]


def shards_of_rows(plan: Sequence[Shard], rows: Mapping[int, Sequence[int]]) -> list[Shard]:
    """Shards, numbered from 0, of just some rows; neighbours share one.

    Args:
        plan: the run's shards.
        rows: shard of the plan -> row numbers in its file.

    Raises:
        StorageError: a JSONL file cannot be read, to see where its rows are.
    """
    found: list[Shard] = []
    for number in sorted(rows):
        shard = plan[number]
        spans = _spans(shard)
        for first, count in _stretches(sorted(set(rows[number]))):
            here = first - shard.first_row
            bounds = (spans[here][0], spans[here + count - 1][1]) if spans else ()
            found.append(Shard(len(found), shard.uri, first, count, *bounds))
    return found


def _spans(shard: Shard) -> list[tuple[int, int]]:
    """Where each row of a JSONL shard is; empty for Parquet."""
    if not shard.end_byte:
        return []
    with storage.open_input(shard.uri) as file:
        return row_spans(file, shard.first_byte, shard.end_byte)


def _stretches(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(first row, how many) of each unbroken stretch of ascending row numbers."""
    stretches: list[tuple[int, int]] = []
    for row in rows:
        if stretches and sum(stretches[-1]) == row:
            first, count = stretches.pop()
            stretches.append((first, count + 1))
        else:
            stretches.append((row, 1))
    return stretches
