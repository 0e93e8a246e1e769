"""Requests as recorded: what a replay puts in place of what today's input and config come to.

In: a prepared block. Out: the same with recorded parameters and seeds; today's travel along as
carried columns, so that they stand beside the records. Runs in the flow's tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.records import Prepared, block_shard, prepared_block, read_prepared
from pipeline.sampling import Sampling

TODAY_SAMPLING = "today_sampling"
"""Column: the parameters that a row resolves to today, JSON."""
TODAY_SEEDS = "today_seeds"
"""Column: the seeds of all its samples today."""
RowKey = tuple[str, int]
"""(input file, input row)"""


@dataclass(frozen=True, slots=True)
class Asked:
    """The request of some samples of a row, as recorded; picklable."""

    sampling: str
    """Resolved parameters, JSON."""
    seeds: tuple[int, ...]
    """One per sample to make."""


def as_recorded(block: pa.Table, *, asked: Mapping[RowKey, Asked]) -> pa.Table:
    """A prepared block with the recorded parameters and seeds, and today's as carried columns."""
    shard = block_shard(block)
    items = read_prepared(block)
    today = pa.table(
        {
            TODAY_SAMPLING: pa.array(
                [i.sampling.as_json if isinstance(i, Prepared) else i.sampling for i in items],
                pa.string(),
            ),
            TODAY_SEEDS: pa.array(
                [i.seeds if isinstance(i, Prepared) else (i.seed,) for i in items],
                pa.list_(pa.int64()),
            ),
        }
    )
    asked_here = [asked[shard.uri, item.input_row] for item in items]
    changed = [
        replace(item, sampling=_sampling(want), seeds=want.seeds)
        if isinstance(item, Prepared)
        else item
        for item, want in zip(items, asked_here, strict=True)
    ]
    return prepared_block(shard, changed, today)


def _sampling(asked: Asked) -> Sampling:
    return Sampling.model_validate({**json.loads(asked.sampling), "n": len(asked.seeds)})
