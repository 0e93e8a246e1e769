"""Surveys: which rows are picked, and what they say of the whole input."""

import time
from collections import Counter

import numpy as np
import pytest

from pipeline.count import Example, ShardCounts
from pipeline.lengths import Caps, Given, Kind
from pipeline.plan import InputFile, Shard, make_plan
from pipeline.survey import Pick, Survey, pick_all, pick_evenly

KIND = Kind(False, 7, 5)


def shards(*rows: int) -> list[Shard]:
    return [Shard(index, "f", 0, count) for index, count in enumerate(rows)]


def counts(pick: Pick, tokens: float, *, bad: int = 0) -> ShardCounts:
    """A shard whose rows have ``tokens`` prompt tokens each."""
    total = round(tokens * pick.rows)
    example = Example("id", "f", 0, "broken")
    return ShardCounts(
        pick.shard.index,
        pick.rows,
        samples=pick.rows,
        tokens={"prompt": total, "most": 100 * pick.rows},
        errors={"image_invalid": bad} if bad else {},
        examples={"image_invalid": example} if bad else {},
        cells={(KIND, 100): pick.rows},
    )


def test_all_rows_are_exact_and_empty_shards_are_left_out() -> None:
    picks = pick_all(shards(3, 0, 5))
    survey = Survey(picks, 8, Given(10))
    for pick in picks:
        survey.add(counts(pick, 2, bad=1))
    assert [pick.shard.index for pick in picks] == [0, 2]
    assert survey.exact
    assert (survey.total("prompt").value, survey.total("bad").value) == (16, 2)
    assert survey.total("prompt").low == survey.total("prompt").high == 16
    assert survey.completion().value == 80


def test_of_ten_million_rows_a_sample_is_picked_evenly_and_at_once() -> None:
    files = [InputFile(f"f{i}", 1, "v", 100_000, 10**9) for i in range(100)]
    plan = make_plan(files, shard_rows=512, shard_bytes=2**40)
    started = time.process_time()
    picks = pick_evenly(plan.shards, 2000)
    assert time.process_time() - started < 5
    assert 2000 <= sum(pick.rows for pick in picks) <= 2100
    by_file = Counter(pick.shard.uri for pick in picks)
    assert len(picks) == 32
    assert max(by_file.values()) == 1, "spread over the files"
    assert picks == pick_evenly(plan.shards, 2000)


def test_a_sample_as_large_as_the_input_is_the_input() -> None:
    assert pick_evenly(shards(3, 5), 8) == pick_all(shards(3, 5))
    assert pick_evenly([], 8) == []


@pytest.mark.parametrize("rows", [1, 7, 100, 640, 999])
def test_a_sample_never_asks_for_more_than_a_shard_has(rows: int) -> None:
    picks = pick_evenly(shards(700, 32, 200, 1, 67), rows)
    assert all(0 < pick.rows <= pick.shard.rows for pick in picks)
    assert len({pick.shard.index for pick in picks}) == len(picks)
    assert sum(pick.rows for pick in picks) >= min(rows, 900)


def test_a_sample_is_scaled_up_without_bias_and_its_range_holds_the_truth() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    errors = []
    for _ in range(60):
        all_shards = shards(*rng.integers(32, 512, 400))
        per_row = rng.lognormal(4, 0.7, 400)
        truth = sum(s.rows * t for s, t in zip(all_shards, per_row, strict=True))
        picks = pick_evenly(all_shards, 3000)
        survey = Survey(picks, sum(s.rows for s in all_shards), Caps())
        for pick in picks:
            survey.add(counts(pick, per_row[pick.shard.index]))
        found = survey.total("prompt")
        inside += found.low <= truth <= found.high
        errors.append(found.value / truth - 1)
    assert abs(np.mean(errors)) < 0.04
    assert inside >= 50, "a 95 % range"


def test_no_bad_row_in_a_sample_is_no_proof_that_there_is_none() -> None:
    picks = pick_evenly(shards(*[500] * 100), 1000)
    survey = Survey(picks, 50_000, Caps())
    for pick in picks:
        survey.add(counts(pick, 1))
    found = survey.total("bad")
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(50_000 * 3 / survey.seen_rows)


def test_bad_rows_keep_one_example_a_code() -> None:
    picks = pick_all(shards(10, 10))
    survey = Survey(picks, 20, Caps())
    for pick in picks:
        survey.add(counts(pick, 1, bad=2))
    assert survey.errors == {"image_invalid": 4}
    assert survey.examples["image_invalid"].message == "broken"


def test_an_input_without_rows_has_nothing() -> None:
    survey = Survey([], 0, Caps())
    assert survey.exact
    assert survey.total("prompt").value == survey.completion().value == 0


def test_a_large_shard_counts_by_its_rows() -> None:
    large_and_small = shards(9_000, *[100] * 10)
    picks = pick_evenly(large_and_small, 320)
    survey = Survey(picks, 10_000, Caps())
    for pick in picks:
        survey.add(counts(pick, 50 if pick.shard.index == 0 else 10))
    assert max(pick.picks for pick in picks) > 20
    assert survey.total("prompt").value == pytest.approx(9_000 * 50 + 1_000 * 10, rel=0.03)
