"""What reading costs: bytes fetched of a file, counted, and shards cut by its row groups."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from pipeline import storage
from pipeline.parquet import ParquetRows, batches_that_fit
from pipeline.plan import Shard, make_plan
from pipeline.read import open_input, read_shard

ROWS = 400
ROW_BYTES = 100_000


class CountedFile(AbstractBufferedFile):
    """A file that fetches ranges, as an object store's, and counts their bytes."""

    fetched = 0
    requests = 0

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = Path(self.path).read_bytes()[start:end]
        CountedFile.fetched += len(data)
        CountedFile.requests += 1
        return data


class CountedFiles(AbstractFileSystem):
    """Local files that are read in ranges."""

    protocol = "counted"
    cachable = False

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        status = Path(self._strip_protocol(path)).stat()
        return {"name": path, "size": status.st_size, "type": "file", "mtime": status.st_mtime}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> CountedFile:
        options.pop("autocommit", None)
        return CountedFile(self, path, mode, **options)


@pytest.fixture
def fetched() -> type[CountedFile]:
    fsspec.register_implementation("counted", CountedFiles, clobber=True)
    CountedFile.fetched = CountedFile.requests = 0
    return CountedFile


def large_rows(path: Path, *, columns: int = 1) -> None:
    """``ROWS`` rows of ``ROW_BYTES`` in one row group, in pages of about 1 MiB."""
    dice = random.Random(7)
    wide = {
        f"c{number}": [dice.randbytes(ROW_BYTES // columns) for _ in range(ROWS)]
        for number in range(columns)
    }
    table = pa.table({"prompt": [f"p{row}" for row in range(ROWS)], **wide})
    pq.write_table(table, path, write_batch_size=8, data_page_size=2**20, use_dictionary=False)


@pytest.mark.parametrize("columns", [1, 4])
def test_the_first_shard_of_one_large_row_group_costs_its_pages_and_not_the_file(
    tmp_path: Path, fetched: type[CountedFile], columns: int
) -> None:
    large_rows(tmp_path / "a.parquet", columns=columns)
    found = open_input(f"{tmp_path}/a.parquet", renamed={}, carry=None)
    table = read_shard(Shard(0, f"counted://{tmp_path}/a.parquet", 0, 8), found.columns)
    assert table.column("prompt").to_pylist() == [f"p{row}" for row in range(8)]
    assert fetched.fetched < 20 * 2**20  # of 40 MB; some MiB ahead for each column


def test_going_on_through_a_large_row_group_fetches_nothing_twice(
    tmp_path: Path, fetched: type[CountedFile]
) -> None:
    large_rows(tmp_path / "a.parquet", columns=4)
    local = open_input(f"{tmp_path}/a.parquet", renamed={}, carry=None)
    uri = f"counted://{tmp_path}/a.parquet"
    shards = [Shard(0, uri, first, 40) for first in range(0, ROWS, 40)]
    with storage.open_input(uri, ahead=0) as handle:
        rows = ParquetRows(handle, local.columns.carried.names)
        tables = [rows.read(shard.first_row, shard.rows) for shard in shards]
    assert sum(table.num_rows for table in tables) == ROWS
    assert fetched.fetched < 1.1 * (tmp_path / "a.parquet").stat().st_size


def test_small_row_groups_are_fetched_a_few_at_a_time(
    tmp_path: Path, fetched: type[CountedFile]
) -> None:
    table = pa.table({"prompt": [random.Random(n).randbytes(10_000).hex() for n in range(800)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size > 7 * 2**20
    found = open_input(f"{tmp_path}/a.parquet", renamed={}, carry=None)
    read = read_shard(Shard(0, f"counted://{tmp_path}/a.parquet", 25, 5), found.columns)
    assert read.equals(table.slice(25, 5))
    assert fetched.fetched < 5 * 2**20
    fetched.fetched = fetched.requests = 0
    read = read_shard(Shard(0, f"counted://{tmp_path}/a.parquet", 0, 800), found.columns)
    assert read.equals(table)
    assert fetched.fetched < 1.1 * size
    assert fetched.requests < 10  # for 80 row groups


@pytest.mark.parametrize("heavy", [range(70, 80), range(100), range(99, 100), range(0)])
def test_batches_that_are_too_large_for_arrow_are_read_in_smaller_ones(heavy: range) -> None:
    """The reader fails as Arrow does: on a batch with more than two of the ``heavy`` rows."""
    rows = pa.RecordBatch.from_pydict({"n": list(range(100))})

    def read(size: int) -> Iterator[pa.RecordBatch]:
        for first in range(0, 100, size):
            if len(set(range(first, first + size)) & set(heavy)) > 2:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented")
            yield rows.slice(first, size)

    found = [n for batch in batches_that_fit(read, 64) for n in batch.column("n").to_pylist()]
    assert found == list(range(100))


def test_a_row_that_is_too_large_by_itself_is_an_error() -> None:
    def read(size: int) -> Iterator[pa.RecordBatch]:
        raise pa.ArrowNotImplementedError(f"Nested data conversions not implemented: {size}")

    with pytest.raises(pa.ArrowNotImplementedError, match=r"implemented: 1$"):
        list(batches_that_fit(read, 1000))


def test_a_file_that_is_sorted_by_size_is_cut_by_its_row_groups(tmp_path: Path) -> None:
    texts = [random.Random(n).randbytes(100 if n < 2000 else 50_000).hex() for n in range(2200)]
    table = pa.table({"prompt": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, use_dictionary=False)
    found = open_input(f"{tmp_path}/a.parquet", renamed={}, carry=None)
    plan = make_plan(found.files, shard_rows=512, shard_bytes=2**20, extents=found.extents)
    held = [
        sum(map(len, texts[shard.first_row : shard.first_row + shard.rows]))
        for shard in plan.shards
    ]
    assert sum(shard.rows for shard in plan.shards) == 2200
    assert max(held) <= 2**20
