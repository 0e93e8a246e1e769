"""Reading: any range of rows of any layout of row groups; inputs that cannot be read are named."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, StorageError
from pipeline.plan import Shard
from pipeline.read import open_input, read_shard


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


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"prompt": ["other"] * 10, "n": list(range(10))}, r"version .* -> "),
        (numbered(10), r"\(version [\d.]+ -> 1\.0\)"),
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
        ({"a.txt": None}, {}, None, "found 1 files, none of them ending in .parquet"),
        ({"a.parquet": None}, {}, None, r"a\.parquet: is not a readable Parquet file"),
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
    files: dict[str, dict[str, object] | None],
    renamed: dict[str, str],
    carry: list[str] | None,
    message: str,
) -> None:
    for name, columns in files.items():
        if columns is None:
            (tmp_path / name).write_bytes(b"this is not parquet")
        else:
            write(tmp_path / name, columns)
    with pytest.raises(InputError, match=message):
        open_input(str(tmp_path), renamed=renamed, carry=carry)
