"""Parquet files as streams: batches in, row groups out, neither ever whole in memory."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.parquet import open_parquet
from pipeline.plan import InputFile

T = TypeVar("T")

_THREADS = 8  # files at a time: most of it is waiting, and Arrow's own work
_BATCH_ROWS = 1024
_BATCH_BYTES = 8 * 2**20
"""Of a batch, by the average row of the file."""
_GROUP_ROWS = 65_536
_GROUP_BYTES = 64 * 2**20
"""A row group is written once it has this much: images make rows heavy."""


class Stopped:
    """Whether work on files is to be given up."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def tell(self) -> None:
        """Let it be given up."""
        self._event.set()

    def check(self) -> None:
        """Give up if told so.

        Raises:
            StorageError: another file failed, or a signal came; the cause is raised beside it.
        """
        if self._event.is_set():
            raise StorageError("given up, as another file failed or a signal came")


def each_file(files: Sequence[InputFile], work: Callable[[InputFile, Stopped], T]) -> list[T]:
    """``work`` on several files at a time; if one fails, or a signal comes, all give up."""
    stopped = Stopped()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            return list(pool.map(lambda file: work(file, stopped), files))
        except BaseException:
            stopped.tell()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Sink(io.RawIOBase):
    """What Arrow writes to, over a function that appends."""

    def __init__(self, append: Callable[[bytes], object]) -> None:
        self._append = append
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        content = bytes(data)  # type: ignore[call-overload]
        self._append(content)
        self._size += len(content)
        return len(content)

    def tell(self) -> int:
        return self._size


class Writer:
    """Gathers tables into row groups."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(table)
        rows = sum(each.num_rows for each in self._waiting)
        if rows >= _GROUP_ROWS or sum(each.nbytes for each in self._waiting) >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """End the row group."""
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=_GROUP_ROWS)
            self._waiting = []

    def note(self, values: Mapping[str, str]) -> None:
        """Put texts into the footer."""
        self._writer.add_key_value_metadata(values)


@contextmanager
def writing(uri: str, schema: pa.Schema) -> Iterator[Writer]:
    """A Parquet object at ``uri`` that appears, whole, once the block ends well.

    Raises:
        StorageError: it cannot be written.
    """
    with (
        storage.open_output(uri) as append,
        pq.ParquetWriter(_Sink(append), schema, compression="zstd") as parquet,
    ):
        writer = Writer(parquet)
        yield writer
        writer.flush()


@contextmanager
def reading(file: InputFile) -> Iterator[pq.ParquetFile]:
    """An open file of the input.

    Raises:
        StorageError: it cannot be read, or is not the planned one; names it. Rows read later may
            be another's: ``check_unchanged`` tells.
    """
    try:
        check_unchanged(file)
        with storage.open_input(file.uri) as handle, open_parquet(handle) as parquet:
            yield parquet
    except FileNotFoundError:
        raise StorageError(f"{file.uri}: is gone since the run was planned; put it back") from None
    except pa.ArrowException as error:
        raise StorageError(f"cannot read {file.uri}: {error}") from error


def check_unchanged(file: InputFile) -> None:
    """Refuse another version of a file than the planned one.

    Raises:
        FileNotFoundError, StorageError: it is gone, or another.
    """
    if storage.version(file.uri) != (file.size, file.version):
        raise StorageError(
            f"{file.uri}: changed since the run was planned; put the old file back, or start over "
            "with --new-run"
        )


def batches(
    parquet: pq.ParquetFile, columns: Sequence[str], groups: Sequence[int] | None = None
) -> Iterator[pa.Table]:
    """The rows of some columns, of all row groups or of ``groups``, some at a time."""
    metadata = parquet.metadata
    chosen = list(range(metadata.num_row_groups)) if groups is None else list(groups)
    sizes = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    average = sum(group.total_byte_size for group in sizes) // max(1, metadata.num_rows)
    size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, average)))
    read = list(columns) or parquet.schema_arrow.names[:1]  # without columns there are no rows
    for group in chosen:  # of all that are asked for at once, the bytes are fetched at once
        for batch in parquet.iter_batches(size, row_groups=[group], columns=read):
            yield pa.Table.from_batches([batch]).select(columns)
