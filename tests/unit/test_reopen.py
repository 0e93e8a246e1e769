"""Reopening: the asked records are to be done again, all others are kept, whatever happens."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.commit import Destination, commit_outcomes, committed_shards
from pipeline.errors import ConfigError, ErrorCode, LeaseLostError
from pipeline.journal import Journal
from pipeline.plan import InputFile, Shard, make_plan
from pipeline.records import Completion, Failure, Outcome, SampleKey, Status
from pipeline.reopen import parse_retry, reopen

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
    assert reopen(to, PLAN, ALL, parse_retry(words)) == len(reopened)
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
    assert reopen(to, PLAN, ALL, {"engine_fatal"}) == 0
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
    untouched = stored(tmp_path / "_journal" / "000001")
    assert reopen(to, PLAN, [], parse_retry(words)) == len(reopened)
    assert journaled(to, first) == {(10, 0), (11, 0), (12, 1), (13, 0)} - reopened
    kept = {outcome.key: outcome for outcome in Journal(to, first).read()}
    assert kept[10, 0] == completion(10)
    assert stored(tmp_path / "_journal" / "000001") == untouched


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("confirmed", [0, 1])
def test_a_driver_that_was_relieved_takes_nothing_out_of_a_journal(
    tmp_path: Path, confirmed: int
) -> None:
    to = Destination(f"file://{tmp_path}", "run-1", "m")
    first = PLAN.shards[0]
    Journal(to, first).append([completion(10), failure(11, ErrorCode.TIMEOUT)])
    before = stored(tmp_path / "_journal" / "000000")
    answers = iter([True] * confirmed)

    def relieved() -> None:
        if not next(answers, False):
            raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        reopen(to, PLAN, [], {"timeout"}, relieved)
    after = stored(tmp_path / "_journal" / "000000")
    assert before.items() <= after.items()
    assert len(after) == len(before) + confirmed
    assert journaled(to, first) == {(10, 0), (11, 0)}


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
