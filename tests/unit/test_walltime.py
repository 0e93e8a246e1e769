"""Wall time: cases worked out by hand."""

from datetime import date

import pytest

from pipeline.plan import Shard
from pipeline.profile import Rates
from pipeline.walltime import wall_time

RATES = Rates(
    basis="estimate",
    prompt_tokens_per_s=1000,
    completion_tokens_per_s=100,
    load_s=60,
    hardware="h",
    source="s",
    as_of=date(2026, 11, 22),
)


def shards(*rows: int) -> list[Shard]:
    return [Shard(index, "f", 0, count) for index, count in enumerate(rows)]


def test_one_replica_loads_then_reads_and_writes_all_tokens() -> None:
    found = wall_time(RATES, 1, shards(500, 500), prompt_tokens=50_000, completion_tokens=20_000)
    assert (found.load_s, found.work_s, found.tail_s) == (60, 50 + 200, 0)
    assert found.total_s == 310


def test_replicas_share_the_work_and_wait_for_the_last_shard() -> None:
    found = wall_time(
        RATES, 2, shards(600, 350, 50), prompt_tokens=50_000, completion_tokens=20_000
    )
    assert found.work_s == 125
    assert found.tail_s == pytest.approx(250 * 50 / 1000)


def test_more_replicas_than_shards_do_not_help() -> None:
    few = wall_time(RATES, 2, shards(9, 9), prompt_tokens=0, completion_tokens=1000)
    many = wall_time(RATES, 64, shards(9, 9), prompt_tokens=0, completion_tokens=1000)
    assert few == many


def test_no_rows_take_no_time() -> None:
    assert wall_time(RATES, 4, shards(0), prompt_tokens=0, completion_tokens=0).total_s == 0
