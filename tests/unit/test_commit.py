"""Committing: whole parts under planned names, stats that a listing and footers can rebuild."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import (
    Attempt,
    Destination,
    PartStats,
    commit_outcomes,
    commit_part,
    committed_shards,
    committed_stats,
    part_uri,
    read_part,
    read_stats,
    read_stored_part,
    summarize,
)
from pipeline.errors import AccountingError, ErrorCode, LeaseLostError, StorageError
from pipeline.pace import Pace
from pipeline.plan import InputFile, Shard, make_plan
from pipeline.records import OUTPUT_SCHEMA, Completion, Failure, Outcome, Status, part_table
from pipeline.sampling import Sampling

FILE = InputFile("s3://b/a.parquet", 1, "v", 100, 100)
PLAN = make_plan([FILE], shard_rows=40, shard_bytes=10**6)
SHARD = Shard(0, FILE.uri, 0, 3)
RUN = "run-1"
CARRIED = pa.table({"l": range(3)})
OUTCOMES: list[Outcome] = [
    Completion(0, "a", 0, "x", "stop", 10, 3, 2, 7, 1, 0.1),
    Completion(0, "a", 1, "y", "length", 10, 64, 0, 7, 2, 0.1),
    Completion(1, "b", 0, "", "stop", 5, 0, 0, 0, 3, 0.1),
    Failure(1, "b", ErrorCode.ENGINE_REJECTED, "m", seed=4, sample_index=1),
    Failure(2, "c", ErrorCode.IMAGE_INVALID, "m", seed=5),
]
CUT = Completion(0, "a", 0, "{", "length", 10, 3, 0, 0, 1, 0.1, code=ErrorCode.LENGTH, message="m")


def destination(folder: Path) -> Destination:
    return Destination(f"file://{folder}", RUN, "m")


def table(shard: Shard, outcomes: list[Outcome]) -> pa.Table:
    return part_table(shard, outcomes, pa.table({"l": range(shard.rows)}), model="m")


def test_no_part_lacks_a_sample_of_a_row_that_has_a_completion(tmp_path: Path) -> None:
    to = destination(tmp_path)
    asked = Sampling(n=2).as_json
    row = replace(OUTCOMES[2], sampling=asked)
    whole = [*OUTCOMES[:2], row, replace(OUTCOMES[3], sampling=asked), OUTCOMES[4]]
    with pytest.raises(AccountingError, match="row 1 has 1 of 2 samples"):
        commit_outcomes(to, SHARD, [*whole[:3], whole[4]], CARRIED)
    with pytest.raises(AccountingError, match="row 0 has 2 of 3 samples"):
        commit_outcomes(to, SHARD, whole, CARRIED, samples={0: 3})
    stats = commit_outcomes(to, SHARD, [*whole[:3], whole[4]], CARRIED, samples={1: 1})
    assert (stats.records, committed_shards(to.output_uri, PLAN)) == (4, {0})


def test_stats_count_rows_once_and_sum_over_records() -> None:
    stats = summarize(SHARD, OUTCOMES, 1.0, RUN)
    assert stats.rows == {"succeeded": 1, "errored": 2, "expired": 0}
    assert stats.records == 5
    assert stats.tokens == {"prompt": 25, "completion": 67, "cached": 2, "image": 14}
    assert stats.errors == {"engine_rejected": 1, "image_invalid": 1}
    assert stats.finish_reasons == {"stop": 2, "length": 1}
    assert stats.lengths == {"0": 1, "2": 1, "7": 1}


def test_a_completion_with_a_fault_errs_and_its_tokens_count() -> None:
    stats = summarize(SHARD, [CUT], 1.0, RUN)
    assert stats.rows == {"succeeded": 0, "errored": 1, "expired": 0}
    assert (stats.errors, stats.tokens["completion"]) == ({"length": 1}, 3)


def test_a_committed_part_tells_its_stats_by_its_footer(tmp_path: Path) -> None:
    attempt = Attempt("r", "p", "node", 1, 1.5, 2.5)
    outcomes = [*OUTCOMES[:-1], replace(OUTCOMES[-1], finished_at=7.5)]
    stats = summarize(SHARD, outcomes, 1.0, RUN, attempt=attempt)
    commit_part(destination(tmp_path), table(SHARD, OUTCOMES), SHARD, stats)
    assert list(read_stats(f"file://{tmp_path}", [0])) == [stats]
    assert pq.read_schema(tmp_path / "data" / "part-000000.parquet").names == [
        *OUTPUT_SCHEMA.names,
        "l",
    ]


def test_stats_tell_latencies_prompts_examples_and_what_was_made() -> None:
    faulty = [
        Failure(row, f"id-{row}", ErrorCode.TIMEOUT, "m" * 9_000, 1, finished_at=9.5)
        for row in (9, 8, 7, 6)
    ]
    shard = replace(SHARD, rows=10)
    stats = summarize(shard, [*OUTCOMES, *faulty], 1.0, RUN, known=[(0, 0), (2, 0)])
    assert stats.latencies == {"-26": 3}
    assert stats.prompt_lengths == {"4": 1, "3": 1}
    assert [example.input_row for example in stats.examples["timeout"]] == [6, 7]
    assert stats.examples["timeout"][0].input_file == FILE.uri
    assert len(stats.examples["timeout"][0].message) <= 400
    assert (stats.taken_over, stats.made_tokens) == (2, 64)
    assert stats.pace == Pace(1, 9, (0,), (4,), (0,))


def test_examples_hold_no_secret() -> None:
    leaky = Failure(0, "hf_0123456789abcdefgh", ErrorCode.TIMEOUT, "https://u:pw@h/x?sig=abc", 1)
    (example,) = summarize(SHARD, [leaky], 1.0, RUN).examples["timeout"]
    assert (example.custom_id, example.message) == ("***", "https://***@h/x?***")


def test_stats_of_an_earlier_version_are_read_without_what_they_lack() -> None:
    stored = json.loads(summarize(SHARD, OUTCOMES, 1.0, RUN).to_json())
    for name in ("latencies", "prompt_lengths", "examples", "pace", "attempt", "committed_at"):
        del stored[name]
    stats = PartStats.from_json(json.dumps(stored))
    assert (stats.rows["errored"], stats.attempt, stats.pace) == (2, None, Pace())


def texts(folder: Path) -> list[str | None]:
    found: list[str | None] = pq.read_table(folder / "data").column("text").to_pylist()
    return found


def test_a_row_is_errored_if_a_sample_is_and_else_expired_if_one_is() -> None:
    late = Failure(0, "a", ErrorCode.BATCH_EXPIRED, "m", 1, 2, status=Status.EXPIRED)
    also = Failure(1, "b", ErrorCode.BATCH_EXPIRED, "m", 1, 2, status=Status.EXPIRED)
    stats = summarize(SHARD, [*OUTCOMES, late, also], 1.0, RUN)
    assert stats.rows == {"succeeded": 0, "errored": 2, "expired": 1}


def test_of_two_attempts_at_a_shard_the_first_counts(tmp_path: Path) -> None:
    first = summarize(SHARD, OUTCOMES, 1.0, RUN)
    commit_part(destination(tmp_path), table(SHARD, OUTCOMES), SHARD, first)
    late = [replace(o, text="late") if isinstance(o, Completion) else o for o in OUTCOMES]
    stats = summarize(SHARD, late, 99.0, RUN)
    assert commit_part(destination(tmp_path), table(SHARD, late), SHARD, stats) == first
    assert "late" not in texts(tmp_path)
    assert committed_shards(f"file://{tmp_path}", PLAN) == {0}


def with_text(text: str) -> list[Outcome]:
    return [replace(o, text=text) if isinstance(o, Completion) else o for o in OUTCOMES]


def commit(to: Destination, text: str) -> PartStats:
    return commit_outcomes(to, SHARD, with_text(text), CARRIED)


def test_a_part_of_another_run_gives_way(tmp_path: Path) -> None:
    ours = destination(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"id": RUN}))
    commit(replace(ours, run_id="run-0"), "theirs")
    stats = commit(ours, "ours")
    assert stats.run == RUN
    assert "theirs" not in texts(tmp_path)
    assert committed_stats(ours, SHARD) == stats


def test_a_late_part_of_a_discarded_run_does_not_replace_that_of_the_new_run(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"id": RUN}))
    ours = commit(destination(tmp_path), "ours")
    with pytest.raises(LeaseLostError, match=r"run\.json is no longer of run run-0"):
        commit(replace(destination(tmp_path), run_id="run-0"), "late")
    assert "late" not in texts(tmp_path)
    assert committed_stats(destination(tmp_path), SHARD) == ours


def test_no_part_is_replaced_while_a_run_is_being_discarded(tmp_path: Path) -> None:
    commit(destination(tmp_path), "ours")
    with pytest.raises(LeaseLostError):
        commit(replace(destination(tmp_path), run_id="run-0"), "late")
    assert "late" not in texts(tmp_path)


def test_a_part_from_before_a_retry_gives_way_if_it_has_what_was_retried(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"id": RUN}))
    before = destination(tmp_path)
    after = replace(before, retries=(frozenset({"image_invalid"}),))
    commit(before, "late")
    assert committed_stats(after, SHARD) is None
    stats = commit(after, "again")
    assert (stats.epoch, committed_stats(after, SHARD)) == (1, stats)
    assert commit(before, "later") == stats
    assert not {"late", "later"} & set(texts(tmp_path))


def test_a_part_from_before_a_retry_stays_if_it_has_nothing_that_was_retried(
    tmp_path: Path,
) -> None:
    stats = commit(destination(tmp_path), "first")
    after = replace(destination(tmp_path), retries=(frozenset({"expired", "timeout"}),))
    assert committed_stats(after, SHARD) == stats == commit(after, "again")


def test_a_committed_shard_is_known_to_its_own_run_only(tmp_path: Path) -> None:
    to = Destination(f"file://{tmp_path}", RUN, "m")
    assert committed_stats(to, SHARD) is None
    stats = commit_outcomes(to, SHARD, OUTCOMES, pa.table({"l": range(3)}))
    assert committed_stats(to, SHARD) == stats
    assert committed_stats(replace(to, run_id="run-2"), SHARD) is None


@pytest.mark.parametrize("rows", [2, 4])
def test_a_part_without_exactly_its_rows_is_never_written(tmp_path: Path, rows: int) -> None:
    shard = replace(SHARD, rows=rows)
    part = table(SHARD, OUTCOMES)
    with pytest.raises(AccountingError, match="nothing was written"):
        commit_part(destination(tmp_path), part, shard, summarize(SHARD, OUTCOMES, 1.0, RUN))
    assert list(tmp_path.iterdir()) == []


def test_a_strange_part_is_named_instead_of_counted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-999999.parquet").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"part-999999\.parquet is no part of this run"):
        committed_shards(f"file://{tmp_path}", PLAN)


def test_a_part_that_another_program_wrote_is_named(tmp_path: Path) -> None:
    uri = part_uri(f"file://{tmp_path}", 0)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"x": [1]}), uri.removeprefix("file://"))
    with pytest.raises(StorageError, match="not written by this program"):
        list(read_stats(f"file://{tmp_path}", [0]))


@pytest.mark.parametrize("size", [0, 3, 11, 700])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path, size: int) -> None:
    commit_outcomes(Destination(f"file://{tmp_path}", RUN, "m"), SHARD, OUTCOMES, CARRIED)
    path = tmp_path / "data" / "part-000000.parquet"
    path.write_bytes(path.read_bytes()[:size])
    remedy = r"part-000000\.parquet is damaged .*delete it and run the command again"
    with pytest.raises(StorageError, match=remedy):
        list(read_stats(f"file://{tmp_path}", [0]))
    with pytest.raises(StorageError, match=remedy):
        read_part(f"file://{tmp_path}", 0)


def test_a_part_whose_pages_are_damaged_is_named_with_the_remedy(tmp_path: Path) -> None:
    commit_outcomes(Destination(f"file://{tmp_path}", RUN, "m"), SHARD, OUTCOMES, CARRIED)
    path = tmp_path / "data" / "part-000000.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(StorageError, match=r"part-000000\.parquet is damaged"):
        read_part(f"file://{tmp_path}", 0)


def test_a_part_whose_footer_is_damaged_is_named_with_the_remedy(tmp_path: Path) -> None:
    commit_outcomes(Destination(f"file://{tmp_path}", RUN, "m"), SHARD, OUTCOMES, CARRIED)
    path = tmp_path / "data" / "part-000000.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-300] + bytes(292) + content[-8:])
    with pytest.raises(StorageError, match=r"damaged .*delete it and run the command again"):
        list(read_stats(f"file://{tmp_path}", [0]))


def test_a_part_with_stats_of_another_form_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    part = pa.table({"x": [1]}).replace_schema_metadata({"maverick.part": '{"rowz": 1}'})
    pq.write_table(part, tmp_path / "data" / "part-000000.parquet")
    with pytest.raises(StorageError, match=r"damaged .*delete it and run the command again"):
        list(read_stats(f"file://{tmp_path}", [0]))


@pytest.mark.parametrize("rows", [0, 3])
def test_the_footer_has_the_checksum_of_all_that_stands_before_it(
    tmp_path: Path, rows: int
) -> None:
    to = Destination(f"file://{tmp_path}", RUN, "m")
    outcomes = OUTCOMES if rows else []
    commit_outcomes(to, replace(SHARD, rows=rows), outcomes, CARRIED.slice(0, rows))
    content = (tmp_path / "data" / "part-000000.parquet").read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    found = read_stored_part(f"file://{tmp_path}", 0)
    assert found.checksum == hashlib.sha256(content[: -8 - footer]).hexdigest()
    assert found.found_checksum == found.checksum
    assert found.table.num_rows == len(outcomes)


def test_a_part_that_is_gone_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=r"part-000000\.parquet is gone .* run the command again"
    ):
        list(read_stats(f"file://{tmp_path}", [0]))
    with pytest.raises(StorageError, match=r"part-000000\.parquet is gone"):
        read_part(f"file://{tmp_path}", 0)
