"""Reopening: the asked records are to be done again, all others are kept, whatever happens."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.commit import Destination, commit_outcomes, committed_shards
from pipeline.errors import ConfigError, ErrorCode, LeaseLostError
from pipeline.journal import Journal
from pipeline.plan import InputFile, Shard, make_plan
from pipeline.records import Completion, Failure, Outcome, SampleKey, Status
from pipeline.reopen import Reopened, matches_any, parse_retry, reopen

FILE = InputFile("s3://b/a.parquet", 1, "v", 100, 100)
PLAN = make_plan([FILE], shard_rows=50, shard_bytes=10**6)
ALL = range(len(PLAN.shards))


def completion(row: int, sample: int = 0) -> Completion:
    return Completion(row, f"r{row}", sample, f"text {row}", "stop", 10, 3, 2, 7, 1, 0.25)


def failure(row: int, code: ErrorCode, sample: int = 0) -> Failure:
    status = Status.EXPIRED if code is ErrorCode.BATCH_EXPIRED else Status.ERRORED
    return Failure(row, f"r{row}", code, "m", seed=5, sample_index=sample, status=status)


@pytest.fixture
def to(tmp_path: Path) -> Destination:
    """Two committed parts: one with failures of three kinds, one without."""
    to = Destination(f"file://{tmp_path}", "run-1", "m")
    bad: dict[SampleKey, Outcome] = {
        (1, 0): failure(1, ErrorCode.TIMEOUT),
        (2, 0): failure(2, ErrorCode.IMAGE_INVALID),
        (3, 1): failure(3, ErrorCode.BATCH_EXPIRED, sample=1),
    }
    for shard in PLAN.shards:
        rows = range(shard.first_row, shard.first_row + shard.rows)
        keys = [(row, 0) for row in rows] + ([(3, 1)] if shard.index == 0 else [])
        outcomes = [bad.get(key, completion(*key)) for key in keys]
        commit_outcomes(to, shard, outcomes, pa.table({"l": list(rows)}))
    return to


def journaled(to: Destination, shard: Shard) -> set[SampleKey]:
    return {outcome.key for outcome in Journal(to, shard).read()}


@pytest.mark.parametrize(
    ("words", "reopened"),
    [
        ("expired", {(3, 1)}),
        ("errored", {(1, 0), (2, 0)}),
        ("timeout", {(1, 0)}),
        ("expired, errored", {(1, 0), (2, 0), (3, 1)}),
    ],
)
def test_just_the_asked_records_are_open_again(
    to: Destination, words: str, reopened: set[SampleKey]
) -> None:
    first, *others = PLAN.shards
    assert reopen(to, PLAN, ALL, parse_retry(words)) == Reopened(len(reopened), frozenset({0}))
    assert committed_shards(to.output_uri, PLAN) == {shard.index for shard in others}
    everything = {*((row, 0) for row in range(first.rows)), (3, 1)}
    assert journaled(to, first) == everything - reopened
    assert all(journaled(to, shard) == set() for shard in others)


def test_kept_records_are_as_they_were(to: Destination) -> None:
    reopen(to, PLAN, ALL, {"errored"})
    kept = {outcome.key: outcome for outcome in Journal(to, PLAN.shards[0]).read()}
    assert kept[0, 0] == completion(0)
    assert kept[3, 1] == failure(3, ErrorCode.BATCH_EXPIRED, sample=1)


def test_nothing_matches_and_nothing_is_touched(to: Destination) -> None:
    assert not matches_any(to, ALL, {"engine_fatal"})
    assert reopen(to, PLAN, ALL, {"engine_fatal"}) == Reopened(0, frozenset())
    assert committed_shards(to.output_uri, PLAN) == {shard.index for shard in PLAN.shards}


def test_what_a_broken_off_attempt_had_journaled_does_not_come_back(to: Destination) -> None:
    first = PLAN.shards[0]
    Journal(to, first).append([failure(1, ErrorCode.TIMEOUT)])
    reopen(to, PLAN, ALL, {"timeout"})
    assert (1, 0) not in journaled(to, first)


def test_reopening_again_after_a_crash_in_between_gives_the_same(to: Destination) -> None:
    first = PLAN.shards[0]
    Journal(to, first).replace([completion(0)])  # died before the part was deleted
    reopen(to, PLAN, ALL, {"timeout"})
    assert len(journaled(to, first)) == first.rows


@pytest.mark.parametrize(
    ("words", "reopened"),
    [("timeout", {(11, 0)}), ("expired", {(12, 1)}), ("errored", {(11, 0), (13, 0)})],
)
def test_records_in_journals_of_open_shards_are_done_again_too(
    tmp_path: Path, words: str, reopened: set[SampleKey]
) -> None:
    to = Destination(f"file://{tmp_path}", "run-1", "m")
    first, second, *_ = PLAN.shards
    journal = Journal(to, first)
    journal.append([completion(10), failure(11, ErrorCode.TIMEOUT)])
    journal.append([failure(12, ErrorCode.BATCH_EXPIRED, sample=1)])
    journal.append([failure(13, ErrorCode.ENGINE_FATAL)])
    Journal(to, second).append([completion(second.first_row)])
    what = parse_retry(words)
    assert reopen(to, PLAN, [], what) == Reopened(len(reopened), frozenset())
    again = replace(to, retries=(what,))
    assert journaled(again, first) == {(10, 0), (11, 0), (12, 1), (13, 0)} - reopened
    kept = {outcome.key: outcome for outcome in Journal(again, first).read()}
    assert kept[10, 0] == completion(10)
    assert journaled(again, second) == {(second.first_row, 0)}


def test_an_attempt_from_before_the_retry_brings_no_retried_record_back(to: Destination) -> None:
    first = PLAN.shards[0]
    late = Journal(to, first)
    reopen(to, PLAN, ALL, {"timeout"})
    again = replace(to, retries=(frozenset({"timeout"}),))
    other = replace(completion(0), text="another")
    late.append([failure(1, ErrorCode.TIMEOUT), other, completion(60)])
    Journal(again, first).append([failure(2, ErrorCode.TIMEOUT)])
    found = {outcome.key: outcome for outcome in Journal(again, first).read()}
    assert (1, 0) not in found
    assert found[0, 0] == completion(0)
    assert found[2, 0] == failure(2, ErrorCode.IMAGE_INVALID)


def test_an_error_after_a_retry_counts_until_the_next(to: Destination) -> None:
    first = PLAN.shards[0]
    reopen(to, PLAN, ALL, {"timeout"})
    again = replace(to, retries=(frozenset({"timeout"}),))
    Journal(again, first).append([failure(1, ErrorCode.TIMEOUT)])
    assert (1, 0) in journaled(again, first)
    thrice = replace(
        again, retries=(*again.retries, frozenset({"expired"}), frozenset({"errored"}))
    )
    assert (1, 0) not in journaled(thrice, first)


def test_a_driver_that_was_relieved_deletes_no_part(to: Destination) -> None:
    def relieved() -> None:
        raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        reopen(to, PLAN, ALL, {"errored"}, relieved)
    assert committed_shards(to.output_uri, PLAN) == {shard.index for shard in PLAN.shards}


@pytest.mark.parametrize("words", ["", "failed", "succeeded", "errored,nonsense"])
def test_other_words_are_refused_with_the_valid_ones(words: str) -> None:
    with pytest.raises(ConfigError, match=r"--retry.*expired.*engine_fatal"):
        parse_retry(words)
