"""What a million rows cost the driver outside Ray, measured on the code that runs.

In: a number of rows. Out: CPU seconds and object-store requests of planning, of saving and loading
the plan, of the listing that a resume starts with, and of reading all parts' footers, on a local
folder that holds a part for each shard.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from cluster.simulation.policies import input_files, plan_of
from pipeline.commit import (
    Destination,
    commit_outcomes,
    committed_shards,
    part_uri,
    read_stats,
)
from pipeline.plan import Plan
from pipeline.records import Completion
from pipeline.report import total

_KEYS_PER_LISTING = 1000
"""Objects that S3 names in one answer."""
_REQUESTS_PER_FOOTER = 1
_MILLION = 1_000_000
_MIB = 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class DriverTimes:
    """CPU seconds of the driver, all threads, for so many rows; requests a resume makes."""

    rows: int
    replicas: int
    shards: int
    plan_s: float
    save_s: float
    load_s: float
    plan_mib: float
    listing_s: float
    footers_s: float
    totals_s: float

    @property
    def listings(self) -> int:
        """LIST requests of a resume."""
        return math.ceil(self.shards / _KEYS_PER_LISTING)

    @property
    def requests_per_footer(self) -> int:
        """Of one part: its end."""
        return _REQUESTS_PER_FOOTER

    @property
    def footer_requests(self) -> int:
        """Further requests, in parallel, if all parts are there."""
        return self.shards * _REQUESTS_PER_FOOTER

    def per_million(self, seconds: float) -> float:
        """``seconds`` scaled to a million rows."""
        return seconds * _MILLION / self.rows


def measure(rows: int, replicas: int) -> DriverTimes:
    """Plan ``rows``, fill a local folder with a part per shard, and do what a resume does."""
    files = input_files(rows)
    plan, plan_s = _cpu(lambda: plan_of(files, replicas))
    text, save_s = _cpu(plan.to_json)
    _, load_s = _cpu(lambda: Plan.from_json(text))
    with tempfile.TemporaryDirectory() as folder:
        _commit_all(folder, plan)
        found, listing_s = _cpu(lambda: committed_shards(folder, plan))
        stats, footers_s = _cpu(lambda: list(read_stats(folder, sorted(found))))
        _, totals_s = _cpu(lambda: total(stats))
    return DriverTimes(
        rows=rows,
        replicas=replicas,
        shards=len(plan.shards),
        plan_s=plan_s,
        save_s=save_s,
        load_s=load_s,
        plan_mib=len(text) / _MIB,
        listing_s=listing_s,
        footers_s=footers_s,
        totals_s=totals_s,
    )


def _cpu(work: Callable[[], T]) -> tuple[T, float]:
    before = time.process_time()
    result = work()
    return result, time.process_time() - before


def _commit_all(folder: str, plan: Plan) -> None:
    """One real part, under the names of all."""
    first = plan.shards[0]
    to = Destination(folder, "run", "model")
    outcomes = [_completion(row) for row in range(first.rows)]
    commit_outcomes(to, first, outcomes, pa.table({}))
    for shard in plan.shards[1:]:
        os.link(Path(part_uri(folder, 0)), Path(part_uri(folder, shard.index)))


def _completion(row: int) -> Completion:
    return Completion(
        input_row=row,
        custom_id=f"row-{row}",
        sample_index=0,
        text=f"The answer to {row}.",
        finish_reason="stop",
        prompt_tokens=100 + row % 50,
        completion_tokens=1 + row % 300,
        cached_tokens=0,
        image_tokens=0,
        seed=row,
        latency_s=1.0,
    )
