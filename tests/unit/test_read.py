"""Reading: any range of rows of any layout of row groups; inputs that cannot be read are named."""

import json
import os
import random
import re
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, StorageError
from pipeline.hive import partition_values
from pipeline.plan import InputFile, Shard, make_plan
from pipeline.read import Input, open_input, read_shard


def write(path: Path, columns: dict[str, object], *, row_group_size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def numbered(rows: int) -> dict[str, object]:
    return {"prompt": [f"p{i}" for i in range(rows)], "n": list(range(rows))}


@pytest.mark.parametrize("row_group_size", [1, 7, 50, 100, 1000])
@pytest.mark.parametrize(("first", "rows"), [(0, 100), (0, 1), (99, 1), (13, 50), (50, 50)])
def test_a_shard_is_exactly_its_rows(
    tmp_path: Path, row_group_size: int, first: int, rows: int
) -> None:
    path = write(tmp_path / "a.parquet", numbered(100), row_group_size=row_group_size)
    found = open_input(str(tmp_path), renamed={}, carry=None)
    table = read_shard(Shard(0, f"file://{path}", first, rows), found.columns)
    assert table.column("n").to_pylist() == list(range(first, first + rows))
    assert table.column("prompt").to_pylist() == [f"p{i}" for i in range(first, first + rows)]


def test_a_file_that_shrank_since_planning_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbered(10))
    found = open_input(str(tmp_path), renamed={}, carry=None)
    with pytest.raises(StorageError, match=r"a\.parquet: rows 5-14 were planned, 5 of them"):
        read_shard(Shard(0, f"file://{path}", 5, 10), found.columns)


def test_rows_of_the_planned_version_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", numbered(10))
    found = open_input(str(tmp_path), renamed={}, carry=None)
    (file,) = found.files
    table = read_shard(Shard(0, file.uri, 5, 5), found.columns, planned=file)
    assert table.column("n").to_pylist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("row_group_size", [1, 7, 50, 100])
def test_shards_of_files_left_open_are_exactly_their_rows_in_any_order(
    tmp_path: Path, row_group_size: int
) -> None:
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / name, numbered(100), row_group_size=row_group_size)
    found = open_input(str(tmp_path), renamed={}, carry=None)
    shards = [(file, first, 9) for file in found.files for first in range(0, 91, 9)]
    shuffled = random.Random(7).sample(shards, len(shards))
    for file, first, rows in [*shards, *shards[::2], *shuffled]:
        table = read_shard(Shard(0, file.uri, first, rows), found.columns, planned=file)
        assert table.column("n").to_pylist() == list(range(first, first + rows))


def test_rows_read_while_the_file_was_another_one_are_not_gone_on_with(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbered(100))
    (file,) = (found := open_input(str(tmp_path), renamed={}, carry=None)).files

    def read(first: int) -> list[int]:
        table = read_shard(Shard(0, file.uri, first, 10), found.columns, planned=file)
        numbers: list[int] = table.column("n").to_pylist()
        return numbers

    assert read(0) == list(range(10))
    planned, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.unlink()
    write(path, {"prompt": ["x"] * 100, "n": [0] * 100})
    with pytest.raises(StorageError, match="changed since the run was planned"):
        read(10)
    with pytest.raises(StorageError, match="changed since the run was planned"):
        read(0)
    path.write_bytes(planned)
    os.utime(path, ns=times)
    assert read(10) == list(range(10, 20))
    path.unlink()
    with pytest.raises(StorageError, match="is gone since the run was planned"):
        read(20)


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"prompt": ["other"] * 10, "n": list(range(10))}, r"version .* -> "),
        (numbered(10), r"\(version 20\S+ -> 1970-01-01T\S+\)"),
        (numbered(9), r"size \d+ -> \d+, version .* -> "),
        ({"something": ["else"]}, r"size \d+ -> \d+, version .* -> "),
    ],
)
def test_a_file_that_changed_since_planning_is_never_read_as_the_planned_one(
    tmp_path: Path, columns: dict[str, object], what: str
) -> None:
    path = write(tmp_path / "a.parquet", numbered(10))
    found = open_input(str(tmp_path), renamed={}, carry=None)
    write(path, columns)
    os.utime(path, (1, 1))
    (file,) = found.files
    with pytest.raises(StorageError, match=rf"a\.parquet: changed since .*{what}.*--new-run"):
        read_shard(Shard(0, file.uri, 0, 9), found.columns, planned=file)


def test_a_file_that_is_gone_since_planning_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbered(10))
    found = open_input(str(tmp_path), renamed={}, carry=None)
    path.unlink()
    (file,) = found.files
    for planned in (file, None):
        with pytest.raises(StorageError, match=r"a\.parquet: is gone since"):
            read_shard(Shard(0, file.uri, 0, 10), found.columns, planned=planned)


def test_a_damaged_file_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbered(1000))
    found = open_input(str(tmp_path), renamed={}, carry=None)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"cannot read .*a\.parquet"):
        read_shard(Shard(0, f"file://{path}", 0, 1000), found.columns)


def test_everything_but_the_request_is_carried_by_default(tmp_path: Path) -> None:
    columns = {"custom_id": ["a"], "prompt": ["p"], "sampling": ["{}"], "label": [1], "x": [0.5]}
    write(tmp_path / "a.parquet", columns)
    assert open_input(str(tmp_path), renamed={}, carry=None).columns.carried.names == ["label", "x"]
    assert open_input(str(tmp_path), renamed={}, carry=[]).columns.carried.names == []


def test_renamed_columns_are_read_and_not_carried(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"question": ["q"], "id": ["a"], "label": ["l"]})
    found = open_input(str(tmp_path), renamed={"prompt": "question", "custom_id": "id"}, carry=None)
    assert found.columns.request["prompt"] == "question"
    assert found.columns.carried.names == ["label"]


def test_carried_columns_are_nullable_and_plain(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            pa.field("k", pa.int64(), nullable=False),
            ("v", pa.string_view()),
        ]
    )
    table = pa.table({"prompt": ["p"], "k": [1], "v": ["x"]}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    carried = open_input(str(tmp_path), renamed={}, carry=None).columns.carried
    assert carried.field("k").nullable
    assert carried.field("v").type == pa.string()


def test_images_may_have_another_type_in_each_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"prompt": ["p"], "images": [[b"x"]]})
    write(tmp_path / "b.parquet", {"prompt": ["p"], "images": [["x.png"]]})
    assert len(open_input(str(tmp_path), renamed={}, carry=None).files) == 2


@pytest.mark.parametrize(
    ("files", "renamed", "carry", "message"),
    [
        ({}, {}, None, "there is no file"),
        ({"a.txt": None}, {}, None, "found 1 files, none of which can be read: 1 file left"),
        ({"a.parquet": None}, {}, None, r"a\.parquet: is not a readable Parquet file"),
        ({"a.parquet": b""}, {}, None, r"a\.parquet: is not a readable Parquet file.* 0 bytes"),
        (
            {"a.parquet": {"prompt": ["x"]}, "b/c.jsonl": b"{}"},
            {},
            None,
            r"b/c\.jsonl is JSONL, but .*a\.parquet is Parquet",
        ),
        ({"a.jsonl": b"{}"}, {"prompt": "q"}, None, r"input\.columns: .*a\.jsonl is JSONL"),
        ({"a.jsonl": b"{}"}, {}, ["label"], r"output\.carry: .*a\.jsonl is JSONL"),
        ({"a.parquet": {"text": ["x"]}}, {}, None, r"a\.parquet: has neither .* are text\."),
        ({"a.parquet": {"prompt": ["x"]}}, {"prompt": "q"}, None, "no column 'q'"),
        ({"a.parquet": {"prompt": ["x"]}}, {"promt": "q"}, None, r"input\.columns\.promt"),
        ({"a.parquet": {"prompt": ["x"]}}, {}, ["label"], r"a\.parquet: has no column 'label'"),
        (
            {"a.parquet": {"prompt": ["x"], "l": [1]}, "b.parquet": {"prompt": ["x"], "l": ["1"]}},
            {},
            None,
            r"b\.parquet: column 'l' is string, but int64 in .*a\.parquet",
        ),
        (
            {"a.parquet": {"prompt": ["x"], "l": [1]}, "b.parquet": {"prompt": ["x"]}},
            {},
            None,
            r"b\.parquet: has no column 'l' to carry",
        ),
        (
            {"a.parquet": {"prompt": ["x"]}, "b.parquet": {"prompt": ["x"], "l": [1]}},
            {},
            None,
            r"b\.parquet: has a column 'l' that .*a\.parquet lacks",
        ),
    ],
)
def test_an_input_that_cannot_be_read_is_named(
    tmp_path: Path,
    files: dict[str, dict[str, object] | bytes | None],
    renamed: dict[str, str],
    carry: list[str] | None,
    message: str,
) -> None:
    for name, columns in files.items():
        if columns is None or isinstance(columns, bytes):
            content = b"this is not parquet" if columns is None else columns
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        else:
            write(tmp_path / name, columns)
    with pytest.raises(InputError, match=message):
        open_input(str(tmp_path), renamed=renamed, carry=carry)


def write_lines(path: Path, rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dice = random.Random(rows)
    lines = (
        json.dumps({"custom_id": f"{path.name}-{row}", "pad": "x" * dice.randrange(300)})
        for row in range(rows)
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def settled(uri: str | list[str], planned: tuple[InputFile, ...] = ()) -> Input:
    return open_input(uri, renamed={}, carry=None, planned=planned)


def test_shards_of_jsonl_hold_exactly_their_lines(tmp_path: Path) -> None:
    for name, rows in (("a.jsonl", 100), ("b.jsonl", 0), ("sub/c.jsonl", 37)):
        write_lines(tmp_path / name, rows)
    found = settled(str(tmp_path))
    assert [file.rows for file in found.files] == [100, 0, 37]
    plan = make_plan(found.files, shard_rows=9, shard_bytes=1000, offsets=found.row_offsets())
    lines: dict[str, list[bytes]] = {file.uri: [] for file in found.files}
    for shard in plan.shards:
        table = read_shard(shard, found.columns, planned=None)
        assert table.num_rows == shard.rows
        lines[shard.uri] += table.column("line").to_pylist()
    for uri, expected in lines.items():
        assert expected == Path(uri.removeprefix("file://")).read_bytes().splitlines()


def test_a_line_carries_the_endpoint_it_names(tmp_path: Path) -> None:
    lines = ['{"url": "/v1/completions"}', '{"url": "/v1/x"}', "?", '{"url": 5}', "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = settled(str(tmp_path / "a.jsonl"))
    table = read_shard(Shard(0, found.files[0].uri, 0, 5, 0, 1000), found.columns)
    assert found.columns.carried.names == ["url"]
    assert table.column("url").to_pylist() == ["/v1/completions", None, None, None, None]


def test_a_jsonl_file_that_is_as_planned_is_not_scanned_again(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 10)
    other = write_lines(tmp_path / "b.jsonl", 10)
    first = settled(str(tmp_path))
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"\n", b" "))  # one row now, for whoever looks
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    write_lines(other, 11)
    again = settled(str(tmp_path), first.files)
    assert [file.rows for file in again.files] == [10, 11]
    assert list(again.offsets) == [f"file://{other}"]
    assert settled(str(tmp_path)).files[0].rows == 1


def test_offsets_that_a_resume_did_without_are_found_when_they_are_needed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 10)
    first = settled(str(tmp_path))
    again = settled(str(tmp_path), first.files)
    assert list(again.row_offsets()) == list(first.row_offsets())
    assert (
        again.row_offsets()[f"file://{path}"].tolist() == first.offsets[f"file://{path}"].tolist()
    )
    path.write_text("{}")
    with pytest.raises(InputError, match=r"a\.jsonl: changed meanwhile: rows 10 -> 1"):
        again.row_offsets()


def test_a_jsonl_file_that_changed_since_planning_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 10)
    found = settled(str(tmp_path))
    (file,) = found.files
    path.write_bytes(path.read_bytes() + b"{}")
    with pytest.raises(StorageError, match=r"a\.jsonl: changed since .*\(size"):
        read_shard(Shard(0, file.uri, 0, 10, 0, file.size), found.columns, planned=file)
    path.write_bytes(b"{}")
    with pytest.raises(StorageError, match=r"rows 0-9 were planned, 1 of them are there"):
        read_shard(Shard(0, file.uri, 0, 10, 0, file.size), found.columns)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_jsonl_without_rows_is_an_empty_input(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    found = settled(str(tmp_path))
    plan = make_plan(found.files, shard_rows=9, shard_bytes=9, offsets=found.row_offsets())
    assert (plan.rows, len(plan.shards)) == (0, 1)
    assert read_shard(plan.shards[0], found.columns).num_rows == 0


def test_a_list_of_files_folders_and_globs_counts_each_file_once(tmp_path: Path) -> None:
    for name in ("one/a.parquet", "one/b.parquet", "two/c.parquet", "two/d.parquet"):
        write(tmp_path / name, {"prompt": ["p"]})
    given = [f"{tmp_path}/two/d.parquet", f"{tmp_path}/one", f"{tmp_path}/one/*.parquet"]
    found = settled(given)
    assert [file.uri.removeprefix(f"file://{tmp_path}/") for file in found.files] == [
        "one/a.parquet",
        "one/b.parquet",
        "two/d.parquet",
    ]
    assert found.roots == (f"file://{tmp_path}/two", f"file://{tmp_path}/one")


def test_a_member_of_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"prompt": ["p"]})
    with pytest.raises(InputError, match=r"b\.parquet: there is no file"):
        settled([f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"])


def test_hive_partitions_are_carried_as_strings(tmp_path: Path) -> None:
    for day in ("2026-11-21", "2026-11-22"):
        for hour in ("7", "a%20b", "__HIVE_DEFAULT_PARTITION__"):
            write(tmp_path / f"date={day}/hour={hour}/part.parquet", numbered(3))
    found = settled(str(tmp_path))
    assert found.columns.carried.field("date").type == pa.string()
    assert found.columns.carried.names == ["n", "date", "hour"]
    read = [
        read_shard(Shard(0, file.uri, 1, 2), found.columns).select(["n", "date", "hour"])
        for file in found.files
    ]
    assert [table.slice(1).to_pylist() for table in read] == [
        [{"n": 2, "date": day, "hour": hour}]
        for day in ("2026-11-21", "2026-11-22")
        for hour in ("7", None, "a b")
    ]


def partitions(path: str) -> dict[str, str | None]:
    return partition_values(f"s3://b/{path}/part.parquet")


def test_percent_encoded_partitions_are_read_as_they_were_before_encoding(tmp_path: Path) -> None:
    table = "(SELECT '?' AS prompt, 'x/y' AS \"größe\", 'a b=%' AS \"user id\", NULL AS \"nö\")"
    options = 'FORMAT parquet, PARTITION_BY ("größe", "user id", "nö")'
    duckdb.sql(f"COPY {table} TO '{tmp_path}/in' ({options})")
    found = settled(f"{tmp_path}/in")
    assert "%C3%B6" in found.files[0].uri
    assert found.columns.carried.names == ["größe", "user id", "nö"]
    (row,) = read_shard(Shard(0, found.files[0].uri, 0, 1), found.columns).to_pylist()
    assert row == {"prompt": "?", "größe": "x/y", "user id": "a b=%", "nö": None}


def test_partition_folders_are_decoded_once_and_never_to_something_that_is_no_text() -> None:
    assert partitions("a=1/b=x%3Dy/größe=z") == {"a": "1", "b": "x=y", "größe": "z"}
    assert partitions("a=100%/b=%zz/c=%2541") == {"a": "100%", "b": "%zz", "c": "%41"}
    assert partitions("a=%FF/b=/c=__HIVE_DEFAULT_PARTITION__") == {"a": "%FF", "b": "", "c": None}
    assert partitions("=1/x/a=1/a=2") == {"a": "2"}


def test_a_column_of_the_file_comes_before_its_partition(tmp_path: Path) -> None:
    write(tmp_path / "date=1/a.parquet", {"prompt": ["p"], "date": [7]})
    found = settled(str(tmp_path))
    assert found.columns.carried.field("date").type == pa.int64()
    table = read_shard(Shard(0, found.files[0].uri, 0, 1), found.columns)
    assert table.column("date").to_pylist() == [7]


def test_partitions_count_below_the_input_only_and_in_every_file(tmp_path: Path) -> None:
    write(tmp_path / "run=5/date=1/a.parquet", {"prompt": ["p"]})
    assert settled(f"{tmp_path}/run=5").columns.carried.names == ["date"]
    assert settled(f"{tmp_path}/run=*/date=1/a.parquet").columns.carried.names == ["run", "date"]
    assert settled(f"{tmp_path}/run=5/date=1/a.parquet").columns.carried.names == []
    write(tmp_path / "run=5/b.parquet", {"prompt": ["p"]})
    with pytest.raises(InputError, match=r"a\.parquet: has a column 'date' that .*/b\.parquet"):
        settled(f"{tmp_path}/run=5")


def test_a_partition_named_like_a_request_column_is_none(tmp_path: Path) -> None:
    write(tmp_path / "prompt=1/a.parquet", {"messages": ["[]"]})
    assert settled(str(tmp_path)).columns.carried.names == []


@pytest.mark.parametrize(
    ("columns", "renamed", "words"),
    [
        (["image"], {}, ["'image' is only carried, .* input.columns: {images: image}"]),
        (["Image-URLs"], {}, ["'Image-URLs' .* {images: Image-URLs}"]),
        (["image"], {"images": "image"}, []),
        (["image", "images"], {}, []),
        (["sampling_params"], {}, ["'sampling_params' .* {sampling: sampling_params}"]),
        (["tools"], {}, ["'tools' is only carried; request parameters are read from 'sampling'"]),
        (["max_tokens", "sampling"], {}, ["'max_tokens' is only carried"]),
        (["Custom ID", "conversations"], {}, ["{custom_id: Custom ID}", "{messages: conv"]),
        (["system"], {}, ["'system' is only carried; put it into messages"]),
        (["id", "label", "n", "text", "custom_id"], {}, []),
    ],
)
def test_columns_that_nearly_match_are_told_with_the_remedy(
    tmp_path: Path, columns: list[str], renamed: dict[str, str], words: list[str]
) -> None:
    write(tmp_path / "a.parquet", {name: ["{}"] for name in ("prompt", *columns)})
    told = open_input(str(tmp_path), renamed=renamed, carry=None).near_misses
    assert len(told) == len(words)
    for sentence, each in zip(told, words, strict=True):
        assert re.search(each, sentence)
    assert open_input(str(tmp_path), renamed=renamed, carry=columns).near_misses == ()


def test_the_folder_of_a_single_file_is_not_searched(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / folder / "x.parquet")
    file, folder, glob = f"{tmp_path}/a/x.parquet", f"{tmp_path}/b", f"{tmp_path}/b/*.parquet"
    for uris, searched in (([file], []), ([file, folder], ["b"]), ([glob], ["b"])):
        found = open_input(uris, renamed={}, carry=None)
        assert found.searched == tuple(f"file://{tmp_path}/{name}" for name in searched)
