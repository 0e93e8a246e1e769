"""Attempts' records become the dataset, file by file; rows without a valid answer, a feed.

The attempts' runs are written here as replicas would; tests/integration/test_annotate.py has real
ones.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs.annotate.answer import settle_answer
from jobs.annotate.attempts import (
    Attempt,
    Feed,
    discard_feeds,
    feed_folder,
    load_attempt,
    mark_feed,
    read_feed,
    row_states,
    run_uri,
)
from jobs.annotate.config import AnswerSection, TaskSection
from jobs.annotate.dataset import (
    Assembly,
    Counts,
    assemble,
    check_only_ours,
    discard_dataset,
    look,
    name_columns,
)
from jobs.annotate.feed import Dataset, relative_paths, write_feed
from pipeline import storage
from pipeline.commit import Destination, commit_outcomes
from pipeline.errors import AccountingError, ErrorCode, RunMismatchError, StorageError
from pipeline.plan import make_plan
from pipeline.read import open_input
from pipeline.records import Completion, Failure, Outcome
from pipeline.template import RequestTemplate

ANSWER = settle_answer(
    AnswerSection.model_validate(
        {"schema": {"type": "object", "properties": {"kind": {"type": "string"}}}}
    )
)
TASK = TaskSection.model_validate(
    {
        "prompt": "{{ text }}",
        "images": ["photo"],
        "retries": 1,
        "answer": {"schema": {"type": "object", "properties": {"kind": {"type": "string"}}}},
    }
)
SHARD_ROWS = 8
Make = Callable[[str, int], list[Outcome]]
"""Path and row number in a run's file -> the row's outcomes."""


def completion(row: int, text: str, code: ErrorCode | None = None, sample: int = 0) -> Completion:
    return Completion(
        row, f"id-{row}", sample, text, "stop", 5, 3, 0, 0, 1, 0.1, code=code, message=code
    )


def good(row: int, kind: str, sample: int = 0) -> Completion:
    return completion(row, json.dumps({"kind": kind}), sample=sample)


def bad(row: int) -> Completion:
    return completion(row, "{", ErrorCode.LENGTH)


def nothing() -> None:
    pass


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two partitions of 30 and 20 rows, of columns of their own."""
    for day, rows in (("d=1", 30), ("d=2", 20)):
        (tmp_path / "in" / day).mkdir(parents=True)
        table = pa.table(
            {
                "text": [f"{day} {row}" for row in range(rows)],
                "photo": [None if row % 2 else [f"{row}.png"] for row in range(rows)],
                "Kind": pa.array(range(rows), pa.int16()),
            }
        )
        pq.write_table(table, tmp_path / "in" / day / "a.parquet", row_group_size=11)
    found = open_input(str(tmp_path / "in"), renamed={}, carry=[], template=TASK.columns)
    uris = [file.uri for file in found.files]
    return Dataset(
        found.files, relative_paths(uris, found.roots), found.roots[0], found.names, has_key=False
    )


@pytest.fixture
def output(tmp_path: Path) -> str:
    return f"file://{tmp_path}/out"


def run(dataset: Dataset, output: str, feed: Feed, make: Make) -> Attempt:
    """An attempt's complete run."""
    source = feed_folder(output, feed.number) if feed.number else dataset.root
    carry = ["__row"] if feed.number else []
    found = open_input(source, renamed={}, carry=carry, template=TASK.columns)
    plan = make_plan(found.files, shard_rows=SHARD_ROWS, shard_bytes=2**20)
    uri = run_uri(output, feed.run)
    storage.put_bytes(storage.join(uri, "_plan.json"), plan.to_json().encode())
    for shard in plan.shards:
        table = pq.read_table(shard.uri.removeprefix("file://"), columns=carry, partitioning=None)
        carried = table.slice(shard.first_row, shard.rows) if carry else pa.table({})
        rows = range(shard.first_row, shard.first_row + shard.rows)
        outcomes = [outcome for row in rows for outcome in make(shard.uri, row)]
        commit_outcomes(Destination(uri, "r", "m"), shard, outcomes, carried)
    return load_attempt(output, feed, dataset.paths)


def first(dataset: Dataset, output: str, make: Make) -> Attempt:
    rows = {dataset.paths[file.uri]: file.rows for file in dataset.files}
    return run(dataset, output, Feed(0, "attempt-0", rows), make)


def second(dataset: Dataset, output: str, attempts: Sequence[Attempt], make: Make) -> Attempt:
    feed = write_feed(output, 1, dataset, attempts, ANSWER, TASK)
    return run(dataset, output, feed, make)


def every_seventh_fails(uri: str, row: int) -> list[Outcome]:
    if row == 13:
        return [Failure(row, f"id-{row}", ErrorCode.IMAGE_INVALID, "no image", 1)]
    return [bad(row) if row % 7 == 3 else good(row, f"first {row}")]


def assembly(output: str, dataset: Dataset, attempts: Sequence[Attempt]) -> Assembly:
    columns = name_columns(ANSWER, sorted(dataset.names), "annotation_")
    return Assembly(output, dataset, attempts, ANSWER, columns, None)


def write(made: Assembly, confirm: Callable[[], None] = nothing) -> list[Counts]:
    """What a start does; the counts of each file."""
    return list(assemble(made, look(made), confirm).values())


def forbidden() -> None:
    raise AssertionError("nothing was to be written")


def test_a_feed_holds_the_rows_that_failed_by_their_answer_and_no_others(
    dataset: Dataset, output: str
) -> None:
    attempt = first(dataset, output, every_seventh_fails)
    feed = write_feed(output, 1, dataset, [attempt], ANSWER, TASK)
    assert feed.files == {"d=1/a.parquet": 4, "d=2/a.parquet": 3}
    table = pq.read_table(
        f"{feed_folder(output, 1)}/d=1/a.parquet".removeprefix("file://"), partitioning=None
    )
    assert table.column("__row").to_pylist() == [3, 10, 17, 24]
    assert table.column("__custom_id").to_pylist()[0] == "d=1/a.parquet:3"
    assert table.column("text").to_pylist() == ["d=1 3", "d=1 10", "d=1 17", "d=1 24"]
    assert table.column("photo").to_pylist()[1] == [f"{dataset.root}/10.png"]
    assert "Kind" not in table.column_names


def test_a_feed_that_was_cut_short_is_written_anew_and_counts_once_it_is_marked(
    dataset: Dataset, output: str
) -> None:
    attempt = first(dataset, output, every_seventh_fails)
    storage.put_bytes(storage.join(feed_folder(output, 1), "d=9", "b.parquet"), b"left")
    feed = write_feed(output, 1, dataset, [attempt], ANSWER, TASK)
    assert len(storage.list_files(feed_folder(output, 1))) == 2
    assert read_feed(output, 1) is None
    mark_feed(output, feed)
    assert read_feed(output, 1) == feed
    discard_feeds(output)
    assert read_feed(output, 1) is None


def test_the_dataset_has_every_row_in_order_with_the_last_attempt_s_answer(
    dataset: Dataset, output: str
) -> None:
    attempts = [first(dataset, output, every_seventh_fails)]

    def mend(uri: str, row: int) -> list[Outcome]:
        return [good(row, "second") if row else bad(row)]

    attempts.append(second(dataset, output, attempts, mend))
    made = assembly(output, dataset, attempts)
    counts = Counts.total(write(made))
    assert counts.rows == {"succeeded": 46, "errored": 4}
    assert counts.errors == {"length": 2, "image_invalid": 2}
    assert (counts.retried, counts.mended) == (7, 5)

    table = ds.dataset(f"{output}/data", partitioning="hive").to_table()
    assert table.num_rows == 50
    for day, rows in ((1, 30), (2, 20)):
        part = table.filter(ds.field("d") == day)
        assert part.column("input_row").to_pylist() == list(range(rows))
        assert part.column("Kind").to_pylist() == list(range(rows))
        kinds = part.column("annotation_kind").to_pylist()  # kind would clash with Kind
        assert kinds[3] is None
        assert part.column("error_code").to_pylist()[3] == "length"
        assert part.column("attempts").to_pylist()[3] == 2
        assert (kinds[10], part.column("error_code").to_pylist()[10]) == ("second", None)
        assert (kinds[12], part.column("attempts").to_pylist()[12]) == ("first 12", 1)
        assert part.column("error_message").to_pylist()[13] == "no image"
        assert part.column("attempts").to_pylist()[13] == 0
    assert table.schema.field("Kind").type == pa.int16()


def test_a_row_that_failed_again_is_tried_no_more_than_asked(dataset: Dataset, output: str) -> None:
    attempts = [first(dataset, output, every_seventh_fails)]
    attempts.append(second(dataset, output, attempts, lambda uri, row: [bad(row)]))
    assert write_feed(output, 2, dataset, attempts, ANSWER, TASK).files == {}
    more = TASK.model_copy(update={"retries": 2})
    assert write_feed(output, 2, dataset, attempts, ANSWER, more).rows == 7


def test_samples_vote(dataset: Dataset, output: str) -> None:
    def vote(uri: str, row: int) -> list[Outcome]:
        return [good(row, "a"), good(row, "b" if row else "a", 1), good(row, "b", 2)]

    attempts = [first(dataset, output, vote)]
    counts = Counts.total(write(assembly(output, dataset, attempts)))
    table = ds.dataset(f"{output}/data").to_table()
    assert table.column("annotation_kind").to_pylist()[:2] == ["a", "b"]
    assert set(table.column("votes").to_pylist()) == {3}
    assert set(table.column("agreement").to_pylist()) == {2 / 3}
    assert (round(counts.agreement, 6), counts.unanimous) == (round(50 * 2 / 3, 6), 0)


def test_only_files_of_which_something_changed_are_made_anew(dataset: Dataset, output: str) -> None:
    attempts = [first(dataset, output, every_seventh_fails)]
    made = assembly(output, dataset, attempts)
    counts = write(made)
    assert write(made, forbidden) == counts
    changed = replace(attempts[0], versions={**attempts[0].versions, 0: "another"})
    written: list[str] = []
    again = write(replace(made, attempts=[changed]), lambda: written.append("a file"))
    assert again == counts
    assert written == ["a file"]


def test_a_file_that_changed_meanwhile_is_not_annotated(dataset: Dataset, output: str) -> None:
    attempts = [first(dataset, output, every_seventh_fails)]
    path = Path(dataset.files[1].uri.removeprefix("file://"))
    pq.write_table(pq.read_table(path, partitioning=None).slice(0, 20), path)
    with pytest.raises(StorageError, match=r"d=2/a\.parquet: changed since"):
        write(assembly(output, dataset, attempts))
    assert not storage.exists(f"{output}/data/d=2/a.parquet")


def test_a_file_without_rows_becomes_one_without_rows(dataset: Dataset, output: str) -> None:
    path = Path(dataset.root.removeprefix("file://")) / "d=1" / "b.parquet"
    pq.write_table(pq.read_table(path.with_name("a.parquet"), partitioning=None).slice(0, 0), path)
    found = open_input(dataset.root, renamed={}, carry=[], template=TASK.columns)
    paths = relative_paths([file.uri for file in found.files], found.roots)
    more = replace(dataset, files=found.files, paths=paths)
    write(assembly(output, more, [first(more, output, every_seventh_fails)]))
    table = pq.read_table(f"{output}/data/d=1/b.parquet".removeprefix("file://"), partitioning=None)
    assert (table.num_rows, table.column_names[:4]) == (
        0,
        ["text", "photo", "Kind", "annotation_kind"],
    )


def test_a_missing_record_is_an_error_and_writes_no_file(dataset: Dataset, output: str) -> None:
    attempt = first(dataset, output, every_seventh_fails)
    longer = replace(dataset.files[0], rows=31)
    with pytest.raises(AccountingError, match="1 rows have no record"):
        list(row_states([attempt], longer, ANSWER))


def test_a_folder_with_other_files_is_refused_and_discarding_leaves_them(
    dataset: Dataset, output: str
) -> None:
    attempts = [first(dataset, output, every_seventh_fails)]
    write(assembly(output, dataset, attempts))
    check_only_ours(output)
    storage.put_bytes(f"{output}/data/mine.parquet", b"x")
    with pytest.raises(RunMismatchError, match=r"mine\.parquet"):
        check_only_ours(output)
    discard_dataset(output)
    assert [entry.uri for entry in storage.list_files(f"{output}/data")] == [
        f"{output}/data/mine.parquet"
    ]


def test_only_wanted_columns_are_copied(dataset: Dataset, output: str) -> None:
    attempts = [first(dataset, output, every_seventh_fails)]
    columns = name_columns(ANSWER, ["text"], "annotation_")
    write(Assembly(output, dataset, attempts, ANSWER, columns, ["text"]))
    names = pq.read_schema(f"{output}/data/d=1/a.parquet".removeprefix("file://")).names
    assert names[:3] == ["text", "kind", "error_code"]
    none = Assembly(output, dataset, attempts, ANSWER, columns, [])
    assert Counts.total(write(none)).rows["succeeded"] == 41
    assert ds.dataset(f"{output}/data").to_table().num_rows == 50


@pytest.mark.parametrize(
    ("uris", "roots", "paths"),
    [
        (["file:///d/x=1/a", "file:///d/b"], ["file:///d"], ["x=1/a", "b"]),
        (["s3://b/1/a", "s3://b/2/a"], ["s3://b/1", "s3://b/2"], ["1/a", "2/a"]),
        (["s3://b/1/a", "s3://c/a"], ["s3://b/1", "s3://c"], ["b/1/a", "c/a"]),
        (["file:///a", "s3://c/a"], ["file://", "s3://c"], ["file/a", "s3/c/a"]),
    ],
)
def test_files_keep_their_paths_below_what_they_share(
    uris: list[str], roots: list[str], paths: list[str]
) -> None:
    assert list(relative_paths(uris, roots).values()) == paths


def test_names_that_clash_get_the_prefix_as_often_as_it_takes() -> None:
    columns = name_columns(ANSWER, ["KIND", "a_kind", "votes"], "a_")
    assert columns.answer == {"kind": "a_a_kind"}
    assert columns.ours["votes"] == "a_votes"
    assert columns.ours["agreement"] == "agreement"


def test_a_template_that_reads_a_column_of_no_file_is_refused(dataset: Dataset) -> None:
    template = RequestTemplate(prompt="{{ txet }}")
    with pytest.raises(Exception, match="did you mean 'text'"):
        open_input(dataset.root, renamed={}, carry=[], template=template.columns)


def test_a_template_reads_partition_columns(dataset: Dataset) -> None:
    found = open_input(dataset.root, renamed={}, carry=[], template=["d", "text"])
    assert found.columns.request == {
        "custom_id": "custom_id",
        "row.d": "d",
        "row.text": "text",
    }
    assert found.names == {"text", "photo", "Kind", "d"}
