"""parquet: rows of one Parquet file, a row group at a time, and how large its parts are.

In: an open file. Out: tables of ranges of rows; bytes by row, for the planner. A small row group
(``_WHOLE_BYTES``) is fetched at once, its columns side by side, with others like it. A larger one
is streamed page by page (a page is the least that can be read: pyarrow's own hold 1,024 rows, other
writers' some 1 MiB), so that a file of one row group, as pandas writes it, costs a shard its own
bytes and not the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import Extents

_MAX_BATCH_ROWS = 1024
_BATCH_BYTES = 32 * 2**20
"""Of rows that are decoded at a time, by their group's average."""
_WHOLE_BYTES = 32 * 2**20
"""Of the wanted columns of one row group, as stored."""
_FEWER = 8
"""By so much a batch shrinks that was too large."""
_TOGETHER_BYTES = 4 * 2**20
"""Of small row groups that are fetched at once: each request takes its time."""
_BUFFERED_BYTES = 32 * 2**20
"""Read ahead by all columns of a streamed row group together."""
_BUFFER_BYTES = (64 * 2**10, 4 * 2**20)
"""Least and most that one column reads at a time."""


def open_parquet(
    source: Any, *, buffer: int = 0, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """A Parquet file of the input; every reader of it sees the same types.

    Old times of Spark and Hive (INT96) are taken in microseconds: in nanoseconds, years before 1677
    and after 2262, which stand for "always" in many tables, would silently become others.

    Args:
        source: what to read.
        buffer: bytes that each column reads at a time; 0: a row group's columns at once.
        metadata: its footer, if it was read before.
    """
    return pq.ParquetFile(
        source,
        metadata=metadata,
        buffer_size=buffer,
        pre_buffer=not buffer,
        coerce_int96_timestamp_unit="us",
    )


class ParquetRows:
    """The wanted rows of one file, streaming through the row groups that hold them."""

    def __init__(self, handle: IO[bytes], wanted: Collection[str]) -> None:
        """Read the footer.

        Args:
            handle: the file; ranges of it are read as they are needed.
            wanted: columns to read; those the file lacks are left out. If it has none of them, its
                first one is read, so that its rows are counted.
        """
        shared = pa.PythonFile(handle, mode="r")  # one lock for both ways to read
        self._whole = open_parquet(shared)
        self._metadata = self._whole.metadata
        schema = self._whole.schema_arrow
        self._columns = sorted(set(wanted) & set(schema.names)) or schema.names[:1]
        least, most = _BUFFER_BYTES
        buffer = min(most, max(least, _BUFFERED_BYTES // max(1, len(self._columns))))
        self._paged = open_parquet(shared, buffer=buffer, metadata=self._metadata)
        self._schema = pa.schema([schema.field(column) for column in self._columns])
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        """What is left of the batch that was read last."""
        self._next = 0
        """The row that comes next."""
        self._group_end = 0
        """The row at which the row group ends that ``_next`` is in."""

    def read(self, first_row: int, rows: int) -> pa.Table:
        """``rows`` rows from ``first_row`` on; fewer if the file ends before."""
        if not self._next <= first_row < self._group_end:
            group, self._next, self._group_end = _group_at(self._metadata, first_row)
            self._batch, self._batches = None, self._read_groups(group, rows)
        kept: list[pa.RecordBatch] = []
        end = first_row + rows
        while self._next < end:
            batch = next(self._batches, None) if self._batch is None else self._batch
            if batch is None:
                break
            skip = min(max(0, first_row - self._next), batch.num_rows)
            used = min(batch.num_rows, end - self._next)
            if used > skip:
                kept.append(batch.slice(skip, used - skip).select(self._columns))
            self._batch = batch.slice(used) if used < batch.num_rows else None
            self._next += used
        self._group_end = max(self._group_end, _group_at(self._metadata, self._next)[2])
        return pa.Table.from_batches(kept, schema=self._schema)

    def _read_groups(self, first: int, rows: int) -> Iterator[pa.RecordBatch]:
        """Batches from the row group ``first`` on. What is asked for at once is fetched at once, so
        it is one group, or some small ones."""
        for numbers in self._portions(first):
            groups = [self._metadata.row_group(number) for number in numbers]
            stored = sum(map(self._stored_bytes, groups))
            by_size = [
                _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
                for group in groups
                if group.num_rows
            ]
            file = self._whole if stored <= _WHOLE_BYTES else self._paged
            read = partial(file.iter_batches, row_groups=numbers, columns=self._columns)
            yield from batches_that_fit(read, max(1, min(_MAX_BATCH_ROWS, rows, *by_size)))

    def _portions(self, first: int) -> Iterator[list[int]]:
        portion: list[int] = []
        held = 0
        for number in range(first, self._metadata.num_row_groups):
            size = self._stored_bytes(self._metadata.row_group(number))
            if portion and held + size > _TOGETHER_BYTES:
                yield portion
                portion, held = [], 0
            portion.append(number)
            held += size
        if portion:
            yield portion

    def _stored_bytes(self, group: pq.RowGroupMetaData) -> int:
        chunks = (group.column(number) for number in range(group.num_columns))
        return sum(
            chunk.total_compressed_size
            for chunk in chunks
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in self._columns)
        )


def batches_that_fit(
    read: Callable[[int], Iterator[pa.RecordBatch]], rows: int
) -> Iterator[pa.RecordBatch]:
    """What ``read`` gives in batches of ``rows``, or of fewer if those are too large.

    Arrow cannot build nested columns (messages, say) of more than 2 GiB of text in one batch; rows
    far above their group's average come to that. Begun anew, as it does not go on after an error.

    Raises:
        pyarrow.ArrowNotImplementedError: one row is too large by itself.
    """
    given = 0
    while True:
        seen = 0
        try:
            for batch in read(rows):
                seen += batch.num_rows
                if seen > given:
                    fresh = batch.slice(max(0, batch.num_rows - (seen - given)))
                    given = seen
                    yield fresh
            return
        except pa.ArrowNotImplementedError:
            if rows == 1:
                raise
            rows = max(1, rows // _FEWER)


def extents_of(metadata: pq.FileMetaData) -> Extents:
    """How many bytes, decompressed, lie before the end of each row group."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    held = [group for group in groups if group.num_rows]
    rows = np.cumsum([0, *(group.num_rows for group in held)], dtype=np.float64)
    sizes = np.cumsum([0, *(max(1, group.total_byte_size) for group in held)], dtype=np.float64)
    return Extents(rows, sizes)


def _group_at(metadata: pq.FileMetaData, row: int) -> tuple[int, int, int]:
    """The row group that holds ``row``, its first row, and the one after its last."""
    start = end = 0
    for group in range(metadata.num_row_groups):
        start, end = end, end + metadata.row_group(group).num_rows
        if row < end:
            return group, start, end
    return metadata.num_row_groups, end, end
