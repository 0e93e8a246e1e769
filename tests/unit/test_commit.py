"""Committing: whole parts under planned names, stats that a listing and footers can rebuild."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import (
    Destination,
    commit_outcomes,
    commit_part,
    committed_shards,
    committed_stats,
    part_uri,
    read_part,
    read_stats,
    summarize,
)
from pipeline.errors import AccountingError, ErrorCode, StorageError
from pipeline.plan import InputFile, Shard, make_plan
from pipeline.records import OUTPUT_SCHEMA, Completion, Failure, Outcome, Status, part_table

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


def table(shard: Shard, outcomes: list[Outcome]) -> pa.Table:
    return part_table(shard, outcomes, pa.table({"l": range(shard.rows)}), model="m")


def test_stats_count_rows_once_and_sum_over_records() -> None:
    stats = summarize(0, OUTCOMES, 1.0, RUN)
    assert stats.rows == {"succeeded": 1, "errored": 2, "expired": 0}
    assert stats.records == 5
    assert stats.tokens == {"prompt": 25, "completion": 67, "cached": 2, "image": 14}
    assert stats.errors == {"engine_rejected": 1, "image_invalid": 1}
    assert stats.finish_reasons == {"stop": 2, "length": 1}
    assert stats.lengths == {"0": 1, "2": 1, "7": 1}


def test_a_completion_with_a_fault_errs_and_its_tokens_count() -> None:
    stats = summarize(0, [CUT], 1.0, RUN)
    assert stats.rows == {"succeeded": 0, "errored": 1, "expired": 0}
    assert (stats.errors, stats.tokens["completion"]) == ({"length": 1}, 3)


def test_a_committed_part_tells_its_stats_by_its_footer(tmp_path: Path) -> None:
    stats = summarize(0, OUTCOMES, 1.0, RUN)
    commit_part(f"file://{tmp_path}", table(SHARD, OUTCOMES), SHARD, stats)
    assert read_stats(f"file://{tmp_path}", [0]) == [stats]
    assert pq.read_schema(tmp_path / "data" / "part-000000.parquet").names == [
        *OUTPUT_SCHEMA.names,
        "l",
    ]


def texts(folder: Path) -> list[str | None]:
    found: list[str | None] = pq.read_table(folder / "data").column("text").to_pylist()
    return found


def test_a_row_is_errored_if_a_sample_is_and_else_expired_if_one_is() -> None:
    late = Failure(0, "a", ErrorCode.BATCH_EXPIRED, "m", 1, 2, status=Status.EXPIRED)
    also = Failure(1, "b", ErrorCode.BATCH_EXPIRED, "m", 1, 2, status=Status.EXPIRED)
    stats = summarize(0, [*OUTCOMES, late, also], 1.0, RUN)
    assert stats.rows == {"succeeded": 0, "errored": 2, "expired": 1}


def test_of_two_attempts_at_a_shard_the_first_counts(tmp_path: Path) -> None:
    first = summarize(0, OUTCOMES, 1.0, RUN)
    commit_part(f"file://{tmp_path}", table(SHARD, OUTCOMES), SHARD, first)
    late = [replace(o, text="late") if isinstance(o, Completion) else o for o in OUTCOMES]
    stats = summarize(0, late, 99.0, RUN)
    assert commit_part(f"file://{tmp_path}", table(SHARD, late), SHARD, stats) == first
    assert "late" not in texts(tmp_path)
    assert committed_shards(f"file://{tmp_path}", PLAN) == {0}


def test_a_part_of_another_run_gives_way(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}"
    commit_part(uri, table(SHARD, OUTCOMES), SHARD, summarize(0, OUTCOMES, 1.0, "run-0"))
    ours = [replace(o, text="ours") if isinstance(o, Completion) else o for o in OUTCOMES]
    stats = summarize(0, ours, 1.0, RUN)
    assert commit_part(uri, table(SHARD, ours), SHARD, stats) == stats
    assert "ours" in texts(tmp_path)


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
        commit_part(f"file://{tmp_path}", part, shard, summarize(0, OUTCOMES, 1.0, RUN))
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
        read_stats(f"file://{tmp_path}", [0])


@pytest.mark.parametrize("size", [0, 3, 11, 700])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path, size: int) -> None:
    commit_outcomes(Destination(f"file://{tmp_path}", RUN, "m"), SHARD, OUTCOMES, CARRIED)
    path = tmp_path / "data" / "part-000000.parquet"
    path.write_bytes(path.read_bytes()[:size])
    remedy = r"part-000000\.parquet is damaged .*delete it and run the command again"
    with pytest.raises(StorageError, match=remedy):
        read_stats(f"file://{tmp_path}", [0])
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
        read_stats(f"file://{tmp_path}", [0])


def test_a_part_with_stats_of_another_form_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    part = pa.table({"x": [1]}).replace_schema_metadata({"maverick.part": '{"rowz": 1}'})
    pq.write_table(part, tmp_path / "data" / "part-000000.parquet")
    with pytest.raises(StorageError, match=r"damaged .*delete it and run the command again"):
        read_stats(f"file://{tmp_path}", [0])
