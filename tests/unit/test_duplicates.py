"""Duplicates: exactly the later uses of an explicit id, over all files and types of column."""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.duplicates import Duplicates, find_duplicates
from pipeline.errors import StorageError
from pipeline.plan import FirstUse, InputFile, Shard, make_plan


def store(folder: Path, *columns: pa.Array | None, row_group_size: int = 1000) -> list[InputFile]:
    """One file per column, in the order of their names; None is a file without the column."""
    files = []
    for number, column in enumerate(columns):
        path = folder / f"{number:03d}.parquet"
        table = pa.table({"prompt": ["?"]} if column is None else {"id": column})
        pq.write_table(table, path, row_group_size=row_group_size)
        size = path.stat().st_size
        files.append(InputFile(f"file://{path}", size, "v1", table.num_rows, size))
    return files


def found(duplicates: Duplicates) -> dict[tuple[int, int], tuple[int, int]]:
    """(file, row) of each repeating row -> (file, row) of the first use, by asking file by file."""
    numbers = {file.uri: number for number, file in enumerate(duplicates.files)}
    return {
        (number, row): (numbers[use.uri], use.row)
        for number, file in enumerate(duplicates.files)
        for row, use in duplicates.of(Shard(0, file.uri, 0, file.rows)).items()
    }


def expected(columns: Sequence[Sequence[object]]) -> dict[tuple[int, int], tuple[int, int]]:
    seen: dict[str, tuple[int, int]] = {}
    repeating = {}
    for number, column in enumerate(columns):
        for row, value in enumerate(column):
            if value is not None:
                first = seen.setdefault(str(value), (number, row))
                if first != (number, row):
                    repeating[number, row] = first
    return repeating


@pytest.mark.parametrize("seed", range(10))
def test_every_later_use_is_found_with_its_first_use(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    columns = [
        [dice.choice([None, f"id-{dice.randrange(300)}"]) for _ in range(dice.choice([0, 1, 400]))]
        for _ in range(dice.randint(1, 12))
    ]
    arrays = [pa.array(column, pa.string()) for column in columns]
    files = store(tmp_path, *arrays, row_group_size=dice.choice([1, 7, 1000]))
    duplicates = find_duplicates(files, "id")
    assert found(duplicates) == expected(columns)
    assert len(duplicates) == len(expected(columns))


@pytest.mark.parametrize("ids_at_a_time", [1, 3, 50])
def test_many_repeated_ids_are_compared_in_passes(tmp_path: Path, ids_at_a_time: int) -> None:
    columns = [[f"id-{number % 20}" for number in range(rows)] for rows in (30, 7, 0, 45)]
    files = store(tmp_path, *(pa.array(column, pa.string()) for column in columns))
    duplicates = find_duplicates(files, "id", ids_at_a_time=ids_at_a_time)
    assert found(duplicates) == expected(columns)


def test_a_column_longer_than_a_batch_is_numbered_through(tmp_path: Path) -> None:
    ids = [f"id-{number % 30_011}" for number in range(70_000)]
    assert found(find_duplicates(store(tmp_path, pa.array(ids)), "id")) == expected([ids])


def test_ids_without_repetition_cost_one_pass_and_give_nothing(tmp_path: Path) -> None:
    duplicates = find_duplicates(store(tmp_path, pa.array(["a", "b"]), pa.array(["c"])), "id")
    assert len(duplicates) == 0
    assert found(duplicates) == {}


def test_rows_and_files_without_an_id_are_never_duplicates(tmp_path: Path) -> None:
    files = store(tmp_path, None, pa.array([None, None, "a"]), None, pa.nulls(3), pa.array(["a"]))
    assert found(find_duplicates(files, "id")) == {(4, 0): (1, 2)}


@pytest.mark.parametrize(
    "other",
    [
        pa.array([7, 8]),
        pa.array([7, 8], pa.uint8()),
        pa.array(["7", "8"], pa.large_string()),
        pa.array(["7", "8"], pa.string_view()),
        pa.array(["7", "8"]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_ids_of_any_type_are_compared_as_the_strings_they_become(
    tmp_path: Path, other: pa.Array
) -> None:
    files = store(tmp_path, pa.array(["8", "x"]), other)
    assert found(find_duplicates(files, "id")) == {(1, 1): (0, 0)}


def test_floats_and_bytes_are_compared_as_python_writes_them(tmp_path: Path) -> None:
    files = store(tmp_path, pa.array([1.0, 2.5]), pa.array(["1.0", "1", "b'x'"]), pa.array([b"x"]))
    assert found(find_duplicates(files, "id")) == {(1, 0): (0, 0), (2, 0): (1, 2)}


def test_ids_that_are_not_utf8_are_passed_over(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff\xfe", b"\xff\xfe", b"a"], pa.binary())
    broken = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2])
    assert found(find_duplicates(store(tmp_path, broken), "id")) == {(0, 3): (0, 0)}


def test_one_id_everywhere_leaves_its_first_row_alone(tmp_path: Path) -> None:
    columns = [["x"] * 50] * 10
    files = store(tmp_path, *(pa.array(column) for column in columns))
    assert found(find_duplicates(files, "id")) == expected(columns)


def test_a_shard_gets_its_own_rows_by_number_in_the_file(tmp_path: Path) -> None:
    ids = [pa.array(["a", "b", "c"]), pa.array(["x", "b", "y", "a", "z", "c"])]
    files = store(tmp_path, *ids)
    duplicates = find_duplicates(files, "id")
    first, second = files[0].uri, files[1].uri
    assert duplicates.of(Shard(0, first, 0, 3)) == {}
    assert duplicates.of(Shard(1, second, 2, 2)) == {3: FirstUse(first, 0)}
    assert duplicates.of(Shard(2, second, 4, 2)) == {5: FirstUse(first, 2)}
    plan = make_plan(files, shard_rows=1, shard_bytes=2**20)
    assert sum(len(duplicates.of(shard)) for shard in plan.shards) == 3


def test_saved_duplicates_come_back_and_can_be_read_by_anyone(tmp_path: Path) -> None:
    files = store(tmp_path, pa.array(["a", "b"]), None, pa.array(["b", "a", "a"]))
    duplicates = find_duplicates(files, "id")
    saved = duplicates.to_parquet()
    assert found(Duplicates.from_parquet(saved, files)) == found(duplicates)
    (tmp_path / "d.parquet").write_bytes(saved)
    rows = pq.read_table(tmp_path / "d.parquet").to_pylist()
    assert rows[0] == {
        "input_file": files[2].uri,
        "input_row": 0,
        "first_file": files[0].uri,
        "first_row": 1,
    }
    assert found(Duplicates.from_parquet(Duplicates.none(files).to_parquet(), files)) == {}


def test_saved_duplicates_of_other_files_are_refused(tmp_path: Path) -> None:
    files = store(tmp_path, pa.array(["a", "a"]))
    saved = find_duplicates(files, "id").to_parquet()
    with pytest.raises(KeyError):
        Duplicates.from_parquet(saved, [InputFile("file:///else.parquet", 1, "v", 2, 1)])


def test_a_file_that_cannot_be_read_as_listed_is_named(tmp_path: Path) -> None:
    (file,) = store(tmp_path, pa.array(["a", "b"]))
    grown = InputFile(file.uri, file.size, file.version, 3, file.data_bytes)
    with pytest.raises(StorageError, match=r"000\.parquet: changed since .* rows 3 -> 2"):
        find_duplicates([grown], "id")
    Path(file.uri.removeprefix("file://")).unlink()
    with pytest.raises(StorageError, match=r"000\.parquet: is gone"):
        find_duplicates([file], "id")


_MEASURE = """
import json, re, sys
from pathlib import Path
from pipeline.duplicates import find_duplicates
from pipeline.plan import InputFile

def peak():  # not getrusage's: that one starts with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

files = [InputFile(*file) for file in json.load(sys.stdin)]
before = peak()
found = find_duplicates(files, "id")
print(json.dumps({"found": len(found), "extra": peak() - before}))
"""


def test_memory_is_a_few_bytes_per_row(tmp_path: Path) -> None:
    rows = 200_000
    ids = [pa.array([f"request-{f}-{i:040d}" for i in range(rows)]) for f in range(9)]
    files = store(tmp_path, *ids, ids[0].slice(0, 100))
    listing = json.dumps(
        [[file.uri, file.size, file.version, file.rows, file.data_bytes] for file in files]
    )
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], input=listing, capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["found"] == 100
    assert measured["extra"] < 130  # MB; the ids as Python strings alone would be 100 MB


def test_ids_of_batch_lines_are_unique_within_their_file_and_bad_lines_have_none(
    tmp_path: Path,
) -> None:
    ids: list[list[object]] = [["a", "b", "a", None, 5], ["b", "a", "c", 5, "é", "a"], ["é", ""]]
    files = []
    for number, column in enumerate(ids):
        path = tmp_path / f"{number}.jsonl"
        lines = [json.dumps({"custom_id": each}).encode() for each in column]
        path.write_bytes(b"\n".join([b"\xef\xbb\xbf", *lines, b'["a"]', b"a\xff", b""]))
        rows = len(column) + 2
        files.append(InputFile(f"file://{path}", path.stat().st_size, "v1", rows, 1))
    assert found(find_duplicates(files, "custom_id")) == {(0, 2): (0, 0), (1, 5): (1, 1)}
    assert found(find_duplicates(files[1:], "custom_id")) == {(0, 5): (0, 1)}


@pytest.mark.parametrize("rows", [2, 4])
def test_a_jsonl_file_with_other_rows_than_listed_is_an_error(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"custom_id": "a"}\n' * 3)
    file = InputFile(f"file://{path}", 1, "v1", rows, 1)
    with pytest.raises(StorageError, match=rf"a\.jsonl: changed .* rows {rows} -> 3"):
        find_duplicates([file], "custom_id")
