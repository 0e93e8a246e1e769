"""read: find the input's files and load one shard's rows from object storage.

In: an input URI, then a ``Shard``. Out: footers for the planner, then one Arrow table per shard
with just the columns asked for. Memory is bounded by the shard, not by the file's row groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import InputError, StorageError
from pipeline.plan import InputFile, Shard

REQUEST_COLUMNS = ("custom_id", "prompt", "messages", "images", "sampling")
"""Our names of the columns a request is made of (contract)."""
_NOT_CARRIED = frozenset({"custom_id", "prompt", "messages", "images", "sampling"})
_SUFFIXES = (".parquet", ".pq")
_FOOTER_THREADS = 16  # footers are small and far away: latency, not CPU
_MAX_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class InputColumns:
    """Which of the input's columns the run reads, by the input's own names."""

    request: Mapping[str, str]
    """Our name -> theirs; each may be absent from some files."""
    carried: pa.Schema
    """Columns copied to the output; present, with one type, in every file."""


@dataclass(frozen=True, slots=True)
class Input:
    """What a look at the input found, before any row is read."""

    files: tuple[InputFile, ...]
    columns: InputColumns


def open_input(uri: str, *, renamed: Mapping[str, str], carry: Sequence[str] | None) -> Input:
    """List the input, read all footers, and settle the columns.

    Raises:
        InputError: nothing there, not Parquet, unreadable, no prompt or messages column, or files
            that disagree about a carried column; the message names the file.
    """
    storage.check_reachable(uri)
    try:
        entries = storage.list_files(uri)
    except (FileNotFoundError, StorageError) as error:
        raise InputError(f"input.uri {uri} cannot be listed: {error}.") from None
    found = [entry for entry in entries if entry.uri.endswith(_SUFFIXES)]
    if not found and not entries:
        raise InputError(f"input.uri {uri}: there is no file.")
    if not found:
        raise InputError(
            f"input.uri {uri}: found {len(entries)} files, none of them ending in .parquet."
        )
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(_footer, found))
    files = tuple(file for file, _ in footers)
    schemas = {file.uri: schema for file, schema in footers}
    return Input(files, _settle_columns(schemas, renamed, carry))


def read_shard(
    shard: Shard, columns: InputColumns, *, planned: InputFile | None = None
) -> pa.Table:
    """The rows of ``shard``: those request and carried columns that the file has, by their names.

    Args:
        shard: which rows of which file.
        columns: what to read.
        planned: the file as planned. It is asked for anew after the rows were read, so that rows
            of another version are never returned.

    Raises:
        StorageError: the file cannot be read, changed since it was planned, or has fewer rows.
    """
    try:
        return _read_planned_rows(shard, columns)
    except FileNotFoundError:
        raise StorageError(f"{shard.uri}: is gone since the run was planned; put it back") from None
    except pa.ArrowException as error:
        raise StorageError(f"cannot read {shard.uri}: {error}") from error
    finally:
        if planned is not None:
            _check_unchanged(planned)  # of two errors, this one is the cause


def _check_unchanged(planned: InputFile) -> None:
    try:
        size, version = storage.version(planned.uri)
    except FileNotFoundError:
        raise StorageError(
            f"{planned.uri}: is gone since the run was planned; put it back"
        ) from None
    if (size, version) != (planned.size, planned.version):
        what = planned.changes(replace(planned, size=size, version=version))
        raise StorageError(
            f"{planned.uri}: changed since the run was planned ({what}); put the old file back, "
            "or start over with --new-run"
        )


def _read_planned_rows(shard: Shard, columns: InputColumns) -> pa.Table:
    with storage.open_input(shard.uri) as handle:
        file = pq.ParquetFile(handle)
        present = set(file.schema_arrow.names)
        request = {ours: theirs for ours, theirs in columns.request.items() if theirs in present}
        wanted = sorted({*request.values(), *columns.carried.names})
        table = _read_rows(file, shard, wanted)
    if table.num_rows != shard.rows:
        raise StorageError(
            f"{shard.uri}: rows {shard.first_row}-{shard.first_row + shard.rows - 1} were planned, "
            f"{table.num_rows} of them are there; the file changed since"
        )
    return table


def _footer(entry: storage.FileEntry) -> tuple[InputFile, pa.Schema]:
    try:
        with storage.open_input(entry.uri) as handle:
            metadata = pq.read_metadata(handle)
            schema = metadata.schema.to_arrow_schema()
    except (FileNotFoundError, StorageError, pa.ArrowException) as error:
        raise InputError(f"{entry.uri}: is not a readable Parquet file: {error}.") from None
    if len(set(schema.names)) != len(schema.names):
        double = next(name for name in schema.names if schema.names.count(name) > 1)
        raise InputError(f"{entry.uri}: has two columns named {double!r}.")
    groups = range(metadata.num_row_groups)
    data_bytes = sum(metadata.row_group(group).total_byte_size for group in groups)
    file = InputFile(entry.uri, entry.size, entry.version, metadata.num_rows, data_bytes)
    return file, schema


def _settle_columns(
    schemas: Mapping[str, pa.Schema], renamed: Mapping[str, str], carry: Sequence[str] | None
) -> InputColumns:
    unknown = sorted(set(renamed) - set(REQUEST_COLUMNS))
    if unknown:
        raise InputError(
            f"input.columns.{unknown[0]}: must be one of {', '.join(REQUEST_COLUMNS)}."
        )
    request = {ours: renamed.get(ours, ours) for ours in REQUEST_COLUMNS}
    for uri, schema in schemas.items():
        _check_request_columns(uri, schema, request, renamed)
    first_uri, first = next(iter(schemas.items()))
    names = _carried(first, request) if carry is None else list(dict.fromkeys(carry))
    for uri, schema in schemas.items():
        extra = [] if carry is not None else sorted(set(_carried(schema, request)) - set(names))
        if extra:
            raise InputError(
                f"{uri}: has a column {extra[0]!r} that {first_uri} lacks; set output.carry to "
                "columns that every file has."
            )
        for column in names:
            _check_carried(uri, schema, first_uri, first, column)
    carried = pa.schema([_carried_field(first.field(column)) for column in names])
    return InputColumns(request, carried)


def _carried_field(field: pa.Field) -> pa.Field:
    """Nullable, as another file may hold nulls; views as plain arrays, which ``take`` can do."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    return pa.field(field.name, plain.get(field.type, field.type), nullable=True)


def _carried(schema: pa.Schema, request: Mapping[str, str]) -> list[str]:
    consumed = {request[ours] for ours in _NOT_CARRIED}
    return [column for column in schema.names if column not in consumed]


def _check_request_columns(
    uri: str, schema: pa.Schema, request: Mapping[str, str], renamed: Mapping[str, str]
) -> None:
    for ours in renamed:
        if request[ours] not in schema.names:
            raise InputError(
                f"{uri}: has no column {request[ours]!r} (input.columns.{ours}); "
                f"its columns are {', '.join(schema.names)}."
            )
    if request["prompt"] not in schema.names and request["messages"] not in schema.names:
        raise InputError(
            f"{uri}: has neither a column 'prompt' nor 'messages'; its columns are "
            f"{', '.join(schema.names)}. Map them with input.columns."
        )


def _check_carried(
    uri: str, schema: pa.Schema, first_uri: str, first: pa.Schema, column: str
) -> None:
    if column not in first.names or column not in schema.names:
        missing = first_uri if column not in first.names else uri
        raise InputError(
            f"{missing}: has no column {column!r} to carry; set output.carry to columns that "
            "every file has."
        )
    if schema.field(column).type != first.field(column).type:
        raise InputError(
            f"{uri}: column {column!r} is {schema.field(column).type}, but "
            f"{first.field(column).type} in {first_uri}; carried columns need one type."
        )


def _read_rows(file: pq.ParquetFile, shard: Shard, columns: list[str]) -> pa.Table:
    """Rows [first_row, first_row + rows), streaming through the row groups that hold them."""
    groups, skip = _covering_groups(file.metadata, shard)
    schema = pa.schema([file.schema_arrow.field(column) for column in columns])
    batches: list[pa.RecordBatch] = []
    left = shard.rows
    size = min(_MAX_BATCH_ROWS, max(1, shard.rows))
    for batch in file.iter_batches(batch_size=size, row_groups=groups, columns=columns):
        if left <= 0:
            break
        kept = batch.slice(skip, left)
        skip = max(0, skip - batch.num_rows)
        left -= kept.num_rows
        batches.append(kept)
    return pa.Table.from_batches(
        [batch.select(columns) for batch in batches if batch.num_rows], schema=schema
    )


def _covering_groups(metadata: pq.FileMetaData, shard: Shard) -> tuple[list[int], int]:
    """Row groups that overlap the shard, and the rows to skip in the first of them."""
    groups: list[int] = []
    skip = 0
    start = 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        if end > shard.first_row and start < shard.first_row + shard.rows:
            if not groups:
                skip = shard.first_row - start
            groups.append(group)
        start = end
    return groups, skip
