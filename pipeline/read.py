"""read: find the input's files and load one shard's rows from object storage.

In: one or more input URIs, then a ``Shard``. Out: what the files hold, for the planner, then one
Arrow table per shard with just the columns asked for. All files are Parquet, or all are OpenAI
batch JSONL, by their suffix. Memory is bounded by the shard, not by the file's row groups; of JSONL
only the rows' offsets are held (8 bytes a row), and just a shard's bytes are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.arrow_types import coarser_unit, is_list, plain_type, united
from pipeline.errors import InputError, StorageError
from pipeline.fetch import input_root
from pipeline.hive import partition_values
from pipeline.input_files import Form, LeftOut, form_by_suffix, list_input, strange_content
from pipeline.jsonl import read_rows, row_offsets
from pipeline.near_misses import near_misses
from pipeline.openai_input import URL_COLUMN, read_line
from pipeline.parquet import ParquetRows, extents_of, open_parquet
from pipeline.plan import Extents, InputFile, Offsets, Shard
from pipeline.template import ROW_PREFIX
from pipeline.values import is_json

REQUEST_COLUMNS = ("custom_id", "prompt", "messages", "images", "sampling")
"""Our names of the columns a request is made of (contract)."""
_NOT_CARRIED = frozenset({"custom_id", "prompt", "messages", "images", "sampling"})
LINE_COLUMN = "line"
"""The one column of a JSONL row: its bytes."""
_EXTENSION = "ARROW:extension:"
"""Before the keys of a field's metadata that name its extension type."""
_FOOTER_THREADS = 16  # footers are small and far away: latency, not CPU
_SCAN_THREADS = 4  # each holds some chunks of a file, and finds line ends by turns
_MAGIC_BYTES = 8
"""Of a file's beginning: they tell what it is not."""


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_bytes(kind: pa.DataType) -> bool:
    plain = (pa.binary(), pa.large_binary(), pa.binary_view())
    return kind in plain or bool(pa.types.is_fixed_size_binary(kind))


def _is_list_of(kind: pa.DataType, is_item: Callable[[pa.DataType], bool]) -> bool:
    return is_list(kind) and (pa.types.is_null(kind.value_type) or is_item(kind.value_type))


def _is_object(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or is_json(kind)


def _is_image(kind: pa.DataType) -> bool:
    return _is_text(kind) or _is_bytes(kind) or pa.types.is_struct(kind)


_REQUEST_TYPES: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "custom_id": (lambda _: True, "anything"),
    "prompt": (lambda kind: _is_text(kind) or is_json(kind), "a string"),
    "messages": (
        lambda kind: _is_text(kind) or is_json(kind) or _is_list_of(kind, _is_object),
        "a list of structs, or a JSON string",
    ),
    "images": (
        lambda kind: _is_image(kind) or is_json(kind) or _is_list_of(kind, _is_image),
        "binary, a URI string, a struct<bytes, path>, or a list of those",
    ),
    "sampling": (
        lambda kind: _is_text(kind) or _is_object(kind),
        "a struct, or a JSON string",
    ),
}
"""What each request column may be, in any layout, and how to say so."""


@dataclass(frozen=True, slots=True)
class InputColumns:
    """Which of the input's columns the run reads, by the input's own names."""

    request: Mapping[str, str]
    """Our name -> theirs; each may be absent from some files."""
    carried: pa.Schema
    """Columns copied to the output; present, with one type, in every file or in its path."""

    @property
    def is_jsonl(self) -> bool:
        """Whether rows are lines of OpenAI batch JSONL."""
        return LINE_COLUMN in self.request


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """What a look at the input found, before any row is read."""

    files: tuple[InputFile, ...]
    columns: InputColumns
    roots: tuple[str, ...]
    """The folders of the URIs that were given; relative image URIs start at the first."""
    searched: tuple[str, ...]
    """Those of them that the next run looks through again: not the folders of single files."""
    offsets: Mapping[str, Offsets]
    """Where the rows start of each JSONL file that was scanned."""
    names: frozenset[str] = frozenset()
    """Columns that some Parquet file, or its path, has."""
    left_out: tuple[LeftOut, ...] = ()
    """Files at the input's URIs that are not read."""
    extents: Mapping[str, Extents] = field(default_factory=dict)
    """How large the row groups of each Parquet file are."""
    near_misses: tuple[str, ...] = ()
    """What to tell of columns that are only carried, and may be meant for the requests."""

    @property
    def is_jsonl(self) -> bool:
        """Whether the files are OpenAI batch JSONL."""
        return self.columns.is_jsonl

    def row_offsets(self) -> Mapping[str, Offsets]:
        """Where the rows start of every JSONL file; those not scanned yet are scanned.

        Raises:
            InputError: a file cannot be read, or is not the one that was looked at.
        """
        return {file.uri: self._offsets_of(file) for file in self.files if file.is_jsonl}

    def _offsets_of(self, file: InputFile) -> Offsets:
        if file.uri in self.offsets:
            return self.offsets[file.uri]
        found = _scan(storage.FileEntry(file.uri, file.size, file.version))[1]
        if len(found) != file.rows:
            raise InputError(f"{file.uri}: changed meanwhile: rows {file.rows} -> {len(found)}.")
        return found


def open_input(
    uris: str | Sequence[str],
    *,
    renamed: Mapping[str, str],
    carry: Sequence[str] | None,
    planned: Sequence[InputFile] = (),
    template: Sequence[str] | None = None,
) -> Input:
    """List the input, look into all files, and settle the columns.

    Args:
        uris: files, folders or globs; a file that several of them name counts once.
        renamed: our column name -> theirs, where they differ.
        carry: columns to copy to the output; None = all that are not part of the request.
        planned: files as a saved plan has them. A JSONL file that is still the same, by size and
            version, is not scanned again.
        template: columns that requests are made of, each in one of the files at least; None = the
            rows are requests.

    Raises:
        InputError: nothing there, neither Parquet nor JSONL, or both; unreadable, no prompt or
            messages column (or a template's), or files that disagree about a carried column; names
            the file.
    """
    given = [uris] if isinstance(uris, str) else list(uris)
    listing = list_input(given)
    listed = listing.by_uri
    found = {entry.uri: entry for entries in listed.values() for entry in entries}
    entries = [found[uri] for uri in sorted(found)]
    roots = {uri: input_root(uri, listed[uri][0].uri) for uri in given}
    folders = tuple(dict.fromkeys(roots.values()))
    single = {uri for uri in given if storage.absolute(uri).rstrip("/") == listed[uri][0].uri}
    searched = tuple(dict.fromkeys(roots[uri] for uri in given if uri not in single))
    if listing.form is Form.JSONL:
        columns = _jsonl_columns(entries[0].uri, renamed, carry, template)
        files, offsets = _look_at_lines(entries, planned)
        return Input(files, columns, folders, searched, offsets, left_out=listing.left_out)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(_footer, entries))
    partitions = {
        entry.uri: _partition(entry.uri, roots[uri]) for uri in given for entry in listed[uri]
    }
    schemas = {
        file.uri: _with_partition(schema, partitions[file.uri], renamed)
        for file, schema, _ in footers
    }
    files = tuple(file for file, _, _ in footers)
    extents = {file.uri: extents for file, _, extents in footers}
    held = {file.uri: schemas[file.uri] for file in files if file.rows}
    columns = _settle_columns(held or schemas, renamed, carry, template)
    names = frozenset(name for schema in schemas.values() for name in schema.names)
    near = () if carry is not None or template is not None else _near_misses(columns, names)
    return Input(files, columns, folders, searched, {}, names, listing.left_out, extents, near)


def _near_misses(columns: InputColumns, names: Collection[str]) -> tuple[str, ...]:
    present = {ours for ours, theirs in columns.request.items() if theirs in names}
    return tuple(near_misses(columns.carried.names, present))


def _jsonl_columns(
    uri: str,
    renamed: Mapping[str, str],
    carry: Sequence[str] | None,
    template: Sequence[str] | None,
) -> InputColumns:
    given = (("input.columns", renamed), ("output.carry", carry), ("input.template", template))
    for key, value in given:
        if value:
            raise InputError(f"{key}: is for Parquet; {uri} is JSONL, which has no columns.")
    return InputColumns({LINE_COLUMN: LINE_COLUMN}, pa.schema([(URL_COLUMN, pa.string())]))


def _look_at_lines(
    entries: Sequence[storage.FileEntry], planned: Sequence[InputFile]
) -> tuple[tuple[InputFile, ...], dict[str, Offsets]]:
    """The files, and the rows' offsets of those that had to be scanned."""
    saved = {(file.uri, file.size, file.version): file for file in planned}
    new = [entry for entry in entries if (entry.uri, entry.size, entry.version) not in saved]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        scanned = {file.uri: (file, offsets) for file, offsets in pool.map(_scan, new)}
    files = tuple(
        scanned[entry.uri][0]
        if entry.uri in scanned
        else saved[entry.uri, entry.size, entry.version]
        for entry in entries
    )
    return files, {uri: offsets for uri, (_, offsets) in scanned.items()}


def _scan(entry: storage.FileEntry) -> tuple[InputFile, Offsets]:
    try:
        with storage.open_input(entry.uri) as handle:
            strange = strange_content(handle.read(_MAGIC_BYTES))
            handle.seek(0)
            offsets = None if strange else row_offsets(handle)
    except (FileNotFoundError, StorageError) as error:
        raise InputError(f"{entry.uri}: cannot be read: {error}.") from None
    if offsets is None:
        raise InputError(f"{entry.uri}: {strange}.")
    form = _form_told(entry.uri, Form.JSONL)
    file = InputFile(entry.uri, entry.size, entry.version, len(offsets), entry.size, form)
    return file, offsets


def _form_told(uri: str, form: Form) -> str:
    return "" if form_by_suffix(uri) is form else form


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
        with _left_open.closed_on_error():
            return _read_planned_rows(shard, columns, planned)
    except FileNotFoundError:
        raise StorageError(f"{shard.uri}: is gone since the run was planned; put it back") from None
    except pa.ArrowException as error:
        raise StorageError(f"cannot read {shard.uri}: {error}") from error
    finally:
        if planned is not None:
            _check_unchanged(planned)  # of two errors, this one is the cause


def _check_unchanged(planned: InputFile) -> None:
    with _left_open.closed_on_error():
        _compare(planned)


def _compare(planned: InputFile) -> None:
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


def _read_planned_rows(shard: Shard, columns: InputColumns, planned: InputFile | None) -> pa.Table:
    if columns.is_jsonl:
        with storage.open_input(shard.uri) as handle:
            table = _line_table(read_rows(handle, shard.first_byte, shard.end_byte))
    else:
        table = _left_open.read(shard, columns, planned)
    if table.num_rows != shard.rows:
        raise StorageError(
            f"{shard.uri}: rows {shard.first_row}-{shard.first_row + shard.rows - 1} were planned, "
            f"{table.num_rows} of them are there; the file changed since"
        )
    return table


def _line_table(lines: list[bytes]) -> pa.Table:
    urls = [read_line(line).endpoint for line in lines]
    return pa.table(
        {LINE_COLUMN: pa.array(lines, pa.large_binary()), URL_COLUMN: pa.array(urls, pa.string())}
    )


class _LeftOpen:
    """The Parquet file that was read last, open where its shard ended.

    Rows of Parquet cannot be found without decoding those before them in their row group. A process
    is given shards in order, if not all of them: going on takes a group's rows once, where starting
    anew for each shard takes half of the group each time.
    """

    def __init__(self) -> None:
        self._streams: list[tuple[object, _Stream]] = []

    def read(self, shard: Shard, columns: InputColumns, planned: InputFile | None) -> pa.Table:
        """The shard's rows. Only a planned file, whose version is looked at anew, is left open."""
        key = (planned, columns)
        try:
            found, stream = self._streams.pop()  # by one thread alone
        except IndexError:
            found = None
        if found is None or planned is None or found != key:
            if found is not None:
                stream.close()
            stream = _stream(shard.uri, columns)
            next(stream)
        table = stream.send(shard)
        if planned is None:
            stream.close()
        else:
            self._streams = [(key, stream)]
        return table

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """After an error the file is opened anew: it may have been another one meanwhile."""
        try:
            yield
        except BaseException:
            while self._streams:
                self._streams.pop()[1].close()
            raise


_Stream = Generator[pa.Table, Shard, None]
_left_open = _LeftOpen()


def _stream(uri: str, columns: InputColumns) -> _Stream:
    """Tables of the shards of one file that are sent in; those in order are cheapest."""
    table = None
    with storage.open_input(uri, ahead=0) as handle:
        rows = ParquetRows(handle, {*columns.request.values(), *columns.carried.names})
        while True:
            shard = yield table
            table = _with_path_values(rows.read(shard.first_row, shard.rows), uri, columns)


def _with_path_values(table: pa.Table, uri: str, columns: InputColumns) -> pa.Table:
    """The carried columns that only the path has are added, and a template's."""
    values = partition_values(uri)
    read = [theirs for ours, theirs in columns.request.items() if ours.startswith(ROW_PREFIX)]
    wanted = [*columns.carried.names, *(name for name in read if name in values)]
    present = set(table.column_names)
    for name in dict.fromkeys(name for name in wanted if name not in present):
        column = pa.array([values[name]] * table.num_rows, pa.string())
        table = table.append_column(name, column)
    return table


def _partition(uri: str, root: str) -> list[str]:
    """Names of the hive partition columns (``date=2026-11-22/``) between ``root`` and the file."""
    return list(partition_values(uri.removeprefix(root)))


def _with_partition(
    schema: pa.Schema, keys: Sequence[str], renamed: Mapping[str, str]
) -> pa.Schema:
    """A file's columns and those its path adds: a column of the file comes first."""
    taken = {*schema.names, *(renamed.get(ours, ours) for ours in REQUEST_COLUMNS)}
    added = [pa.field(key, pa.string()) for key in keys if key not in taken]
    return pa.schema([*schema, *added])


def _footer(entry: storage.FileEntry) -> tuple[InputFile, pa.Schema, Extents]:
    try:
        with storage.open_input(entry.uri) as handle:
            parquet = open_parquet(handle)
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (FileNotFoundError, StorageError, pa.ArrowException) as error:
        what = _told_content(entry.uri) or f"is not a readable Parquet file: {error}"
        raise InputError(f"{entry.uri}: {what}.") from None
    if len(set(schema.names)) != len(schema.names):
        double = next(name for name in schema.names if schema.names.count(name) > 1)
        raise InputError(f"{entry.uri}: has two columns named {double!r}.")
    groups = range(metadata.num_row_groups)
    data_bytes = sum(metadata.row_group(group).total_byte_size for group in groups)
    extents = extents_of(metadata)
    form = _form_told(entry.uri, Form.PARQUET)
    file = InputFile(entry.uri, entry.size, entry.version, metadata.num_rows, data_bytes, form)
    return file, schema, extents


def _told_content(uri: str) -> str | None:
    """What a file is that is no Parquet; None if it looks like some, or cannot be read."""
    try:
        head = storage.read_bytes(uri, limit=_MAGIC_BYTES)
    except (FileNotFoundError, StorageError):
        return None
    if head.startswith(b"{"):
        return "holds JSON lines; let its name end in .jsonl"
    return strange_content(head)


def _settle_columns(
    schemas: Mapping[str, pa.Schema],
    renamed: Mapping[str, str],
    carry: Sequence[str] | None,
    template: Sequence[str] | None,
) -> InputColumns:
    known = REQUEST_COLUMNS if template is None else ("custom_id",)
    unknown = sorted(set(renamed) - set(known))
    if unknown:
        raise InputError(f"input.columns.{unknown[0]}: must be one of {', '.join(known)}.")
    request = {ours: renamed.get(ours, ours) for ours in known}
    for uri, schema in schemas.items():
        _check_request_columns(uri, schema, request, renamed)
    if template is not None:
        _check_template_columns(schemas, template)
        request |= {f"{ROW_PREFIX}{name}": name for name in template}
    first_uri, first = next(iter(schemas.items()))
    names = _carried(first, request) if carry is None else list(dict.fromkeys(carry))
    for uri, schema in schemas.items():
        extra = [] if carry is not None else sorted(set(_carried(schema, request)) - set(names))
        if extra:
            raise InputError(
                f"{uri}: has a column {extra[0]!r} that {first_uri} lacks; set output.carry to "
                "columns that every file has."
            )
    carried = pa.schema([_carried_field(column, schemas) for column in names])
    return InputColumns(request, carried)


def _carried_field(column: str, schemas: Mapping[str, pa.Schema]) -> pa.Field:
    """One field that holds the values of all files; nullable, as another file may hold nulls."""
    fields: dict[tuple[pa.DataType, bytes], str] = {}
    for uri, schema in schemas.items():
        if column not in schema.names:
            raise InputError(
                f"{uri}: has no column {column!r} to carry; set output.carry to columns that "
                "every file has."
            )
        field = schema.field(column)
        fields.setdefault((field.type, _extension(field)), uri)
    (kind, extension), first_uri = next(iter(fields.items()))
    kind = plain_type(first := kind)
    for (other, _), uri in fields.items():
        wider = united(kind, other)
        if wider is None:
            raise InputError(
                f"{uri}: column {column!r} is {other}, but {first} in {first_uri}; no type holds "
                "the values of both as they are: cast one of them, or leave the column out of "
                "output.carry."
            )
        kind = wider
    _check_units(column, kind, schemas)
    is_one = len({each for _, each in fields}) == 1
    metadata = json.loads(extension) if is_one else None
    return pa.field(column, kind, nullable=True, metadata=metadata or None)


def _extension(field: pa.Field) -> bytes:
    """What names the extension type of a field, where this process does not know it."""
    metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    named = {key: value for key, value in metadata.items() if key.startswith(_EXTENSION)}
    return json.dumps(named).encode()


def _check_units(column: str, kind: pa.DataType, schemas: Mapping[str, pa.Schema]) -> None:
    """Refuse a file whose times may lie outside of what the finer unit of another file holds."""
    for uri, schema in schemas.items():
        found = schema.field(column).type
        factor = coarser_unit(found, kind)
        if factor > 1 and not _within(uri, column, (2**63 - 1) // factor):
            raise InputError(
                f"{uri}: column {column!r} is {found}, and {kind} in another file, which may not "
                f"hold its values; cast one of them, or leave the column out of output.carry."
            )


def _within(uri: str, column: str, limit: int) -> bool:
    """Whether a file's statistics say that no value is beyond ``limit``, on either side."""
    with storage.open_input(uri) as handle:
        metadata = pq.read_metadata(handle)
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(n) for group in groups for n in range(group.num_columns))
    found = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]
    return all(each is not None and _are_within(each, limit) for each in found)


def _are_within(found: pq.Statistics, limit: int) -> bool:
    if found.num_values == 0:  # all are null
        return True
    bounds = (found.min_raw, found.max_raw) if found.has_min_max else ()
    return len(bounds) > 0 and all(isinstance(n, int) and abs(n) <= limit for n in bounds)


def _carried(schema: pa.Schema, request: Mapping[str, str]) -> list[str]:
    consumed = {request[ours] for ours in _NOT_CARRIED if ours in request}
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
    asks = [request[ours] for ours in ("prompt", "messages") if ours in request]
    if asks and not any(name in schema.names for name in asks):
        raise InputError(
            f"{uri}: has neither a column 'prompt' nor 'messages'; its columns are "
            f"{', '.join(schema.names)}. Map them with input.columns."
        )
    for ours, theirs in request.items():
        if theirs in schema.names and not _may_be(ours, schema.field(theirs).type):
            raise InputError(
                f"{uri}: column {theirs!r} is {schema.field(theirs).type}; {ours} must be "
                f"{_REQUEST_TYPES[ours][1]}."
            )


def _check_template_columns(schemas: Mapping[str, pa.Schema], template: Sequence[str]) -> None:
    names = sorted({name for schema in schemas.values() for name in schema.names})
    for column in template:
        if column not in names:
            close = get_close_matches(column, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(
                f"the template reads a column {column!r} that no input file has; {hint}"
                f"There are {', '.join(names)}."
            )


def _may_be(ours: str, kind: pa.DataType) -> bool:
    """Whether some value of type ``kind`` is a good one for the request column ``ours``."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_null(plain) or _REQUEST_TYPES[ours][0](plain)
