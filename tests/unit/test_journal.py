"""The journal: what was finished survives attempts, once each, until the part is committed."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.commit import Destination
from pipeline.errors import ErrorCode, LeaseLostError
from pipeline.journal import Journal, clear_journals
from pipeline.plan import Shard
from pipeline.records import OUTPUT_SCHEMA, Completion, Failure, Outcome, Status

SHARD = Shard(7, "s3://b/a.parquet", 100, 50)


def completion(row: int, sample: int = 0, text: str = "x") -> Completion:
    return Completion(row, f"r{row}", sample, text, "stop", 10, 3, 2, 7, 2**62, 0.25, attempts=3)


@pytest.fixture
def to(tmp_path: Path) -> Destination:
    return Destination(f"file://{tmp_path}", "run-1", "m")


def objects(to: Destination) -> list[Path]:
    folder = Path(to.output_uri.removeprefix("file://")) / "_journal" / "000007"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_later_attempt_finds_every_record_as_it_was(to: Destination) -> None:
    outcomes: list[Outcome] = [
        completion(100),
        completion(101, sample=1, text="grüße 🎈\n"),
        Failure(102, "c", ErrorCode.TIMEOUT, "m", seed=5, sample_index=2, attempts=1),
        Failure(103, "d", ErrorCode.BATCH_EXPIRED, "m", seed=5, status=Status.EXPIRED),
    ]
    journal = Journal(to, SHARD)
    journal.append(outcomes[:1])
    journal.append(outcomes[1:])
    assert sorted(Journal(to, SHARD).read(), key=lambda o: o.key) == outcomes


def test_a_fresh_shard_has_nothing_and_an_empty_batch_writes_nothing(to: Destination) -> None:
    journal = Journal(to, SHARD)
    assert journal.read() == []
    journal.append([])
    assert objects(to) == []


def test_attempts_never_overwrite_each_other_and_a_sample_counts_once(to: Destination) -> None:
    first, second = Journal(to, SHARD), Journal(to, SHARD)
    first.append([completion(100, text="first")])
    second.append([completion(100, text="second"), completion(101)])
    assert len(objects(to)) == 2
    found = {outcome.key: outcome for outcome in Journal(to, SHARD).read()}
    assert sorted(found) == [(100, 0), (101, 0)]
    assert found[100, 0] == completion(100, text="first")


def test_clearing_removes_what_was_found_and_written_and_nothing_else(to: Destination) -> None:
    Journal(to, SHARD).append([completion(100)])
    other = Journal(to, replace(SHARD, index=8))
    other.append([completion(100)])
    journal = Journal(to, SHARD)
    journal.read()
    journal.append([completion(101)])
    journal.clear()
    assert objects(to) == []
    assert Journal(to, replace(SHARD, index=8)).read() == [completion(100)]


def test_records_of_rows_that_are_not_the_shards_are_left_out(to: Destination) -> None:
    Journal(to, SHARD).append([completion(99), completion(149), completion(150)])
    assert [outcome.input_row for outcome in Journal(to, SHARD).read()] == [149]


def test_an_object_that_is_no_entry_is_left_out_with_a_warning(
    to: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(to, SHARD).append([completion(100)])
    (objects(to)[0].parent / "9-damaged.parquet").write_bytes(b"PAR1 not really")
    assert Journal(to, SHARD).read() == [completion(100)]
    assert "9-damaged.parquet is not a journal entry" in caplog.text


def test_an_entry_whose_pages_are_damaged_is_left_out_with_a_warning(
    to: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(to, SHARD).append([completion(100)])
    (path,) = objects(to)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    assert Journal(to, SHARD).read() == []
    assert "is not a journal entry" in caplog.text


def test_replacing_leaves_exactly_what_is_given(to: Destination) -> None:
    Journal(to, SHARD).append([completion(100), completion(101)])
    Journal(to, SHARD).replace([completion(102)])
    assert Journal(to, SHARD).read() == [completion(102)]


def test_a_replacement_that_is_cut_short_loses_no_record(to: Destination) -> None:
    Journal(to, SHARD).append([completion(100), completion(101)])
    answers = iter([True])

    def relieved() -> None:
        if not next(answers, False):
            raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        Journal(to, SHARD).replace([completion(101)], relieved)
    found = Journal(to, SHARD).read()
    assert sorted(outcome.key for outcome in found) == [(100, 0), (101, 0)]


def test_entries_have_the_outputs_columns(to: Destination) -> None:
    Journal(to, SHARD).append([completion(100)])
    assert pq.read_schema(objects(to)[0]) == OUTPUT_SCHEMA


def test_the_end_of_a_run_removes_every_journal(to: Destination) -> None:
    for index in range(3):
        Journal(to, replace(SHARD, index=index)).append([completion(100)])
    clear_journals(to.output_uri)
    assert not list(Path(to.output_uri.removeprefix("file://")).iterdir())


def test_what_is_not_a_journals_stays_with_its_folder(to: Destination) -> None:
    Journal(to, SHARD).append([completion(100)])
    folder = Path(to.output_uri.removeprefix("file://"))
    (folder / "data").mkdir()
    clear_journals(to.output_uri)
    assert [path.name for path in folder.iterdir()] == ["data"]
    clear_journals(to.output_uri)


def test_a_late_attempt_can_write_after_another_cleared_the_shards_journal(
    to: Destination,
) -> None:
    late = Journal(to, SHARD)
    journal = Journal(to, SHARD)
    journal.append([completion(100)])
    journal.clear()
    late.append([completion(101)])
    assert Journal(to, SHARD).read() == [completion(101)]


def test_entries_of_another_run_do_not_count(to: Destination) -> None:
    discarded = Journal(replace(to, run_id="run-0"), SHARD)
    Journal(to, SHARD).append([completion(100)])
    discarded.append([completion(101, text="another model's")])
    assert Journal(to, SHARD).read() == [completion(100)]


@pytest.mark.parametrize("unsigned_journals", [True, False])
def test_entries_without_a_run_count_in_runs_that_an_earlier_version_began(
    to: Destination, unsigned_journals: bool
) -> None:
    Journal(to, SHARD).append([completion(100), Failure(101, "c", ErrorCode.TIMEOUT, "m", seed=5)])
    (path,) = objects(to)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    to = replace(to, unsigned_journals=unsigned_journals, retries=(frozenset({"timeout"}),))
    assert Journal(to, SHARD).read() == ([completion(100)] if unsigned_journals else [])


def test_the_removal_of_all_journals_stops_when_the_run_is_anothers(to: Destination) -> None:
    for index in range(3):
        Journal(to, replace(SHARD, index=index)).append([completion(100)])
    answers = iter([True])

    def relieved() -> None:
        if not next(answers, False):
            raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        clear_journals(to.output_uri, relieved)
    assert len(list(Path(to.output_uri.removeprefix("file://")).rglob("*.parquet"))) == 2
