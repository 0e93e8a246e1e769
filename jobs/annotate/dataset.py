"""dataset: the input's rows with their answers, one file per file of the input, under its path.

    data/<path>        the input's columns (``output.carry``), then the answer's, then ours
    _dataset.json      the files, written before them

In: the input and the attempts. Out: whole objects, rows in the input's order, partition folders
kept. A file's footer says what it was made of, so a second start makes only those anew of which
something changed: the input file, a part, or how the answer becomes columns.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.annotate.answer import Answer
from jobs.annotate.attempts import Attempt, RowState, row_states
from jobs.annotate.feed import Dataset
from jobs.annotate.tables import (
    Stopped,
    batches,
    check_unchanged,
    each_file,
    reading,
    writing,
)
from pipeline import storage
from pipeline.errors import RunMismatchError, StorageError
from pipeline.plan import InputFile
from pipeline.records import Status
from pipeline.redact import redacted_text

log = logging.getLogger(__name__)

_FORM = 1
"""Of the files: another number makes all of them anew."""
_FOOTER_KEY = "maverick.annotated"
_LISTING = "_dataset.json"
_STALE_METADATA = b"huggingface"  # lists the columns there were
OUR_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("error_code", pa.string()),
    ("error_message", pa.string()),
    ("votes", pa.int32()),
    ("agreement", pa.float64()),
    ("attempts", pa.int32()),
    ("input_file", pa.string()),
    ("input_row", pa.int64()),
)


@dataclass
class Counts:
    """What one file, or all, came to."""

    rows: dict[str, int] = field(default_factory=dict)
    """By status."""
    errors: dict[str, int] = field(default_factory=dict)
    """Rows by error code."""
    agreement: float = 0.0
    """Summed over the rows that have an answer."""
    unanimous: int = 0
    """Rows whose valid samples all agree."""
    retried: int = 0
    """Rows with more than one attempt."""
    mended: int = 0
    """Of them, those with an answer."""

    def add(self, state: RowState) -> None:
        """Count a row."""
        decision = state.decision
        status, code = str(decision.status), decision.code and str(decision.code)
        self.rows[status] = self.rows.get(status, 0) + 1
        if code is not None:
            self.errors[code] = self.errors.get(code, 0) + 1
        self.agreement += decision.agreement or 0.0
        self.unanimous += decision.agreement == 1.0
        self.retried += state.tries > 1
        self.mended += state.tries > 1 and decision.answer is not None

    @classmethod
    def total(cls, counts: Sequence[Counts]) -> Counts:
        """The sum."""
        rows: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        for each in counts:
            rows.update(each.rows)
            errors.update(each.errors)
        return cls(
            dict(rows),
            dict(errors),
            sum(each.agreement for each in counts),
            sum(each.unanimous for each in counts),
            sum(each.retried for each in counts),
            sum(each.mended for each in counts),
        )


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are added."""

    answer: Mapping[str, str]
    """By field of the answer."""
    ours: Mapping[str, str]
    """By name in ``OUR_FIELDS``."""


def name_columns(answer: Answer, taken: Sequence[str], prefix: str) -> Columns:
    """Names that no column of the input has, whatever their case: clashes get the prefix."""
    used = {name.casefold() for name in taken}

    def free(name: str) -> str:
        while name.casefold() in used:
            name = f"{prefix}{name}"
        used.add(name.casefold())
        return name

    answers = {name: free(name) for name in answer.fields}
    return Columns(answers, {name: free(name) for name, _ in OUR_FIELDS})


@dataclass(frozen=True)
class Assembly:
    """How the dataset is put together."""

    output_uri: str
    dataset: Dataset
    attempts: Sequence[Attempt]
    answer: Answer
    columns: Columns
    carry: Sequence[str] | None
    """Input columns to copy; None = all."""

    def target(self, file: InputFile) -> str:
        """Where the annotated file goes."""
        return storage.join(self.output_uri, "data", self.dataset.paths[file.uri])

    def fingerprint(self, file: InputFile) -> str:
        """Of all that the annotated file is made of."""
        parts = [
            (attempt.number, attempt.run_uri, shard.index, attempt.versions.get(shard.index))
            for attempt in self.attempts
            for shard in attempt.shards(file.uri)
        ]
        model = self.answer.model and f"{self.answer.model.__module__}:{self.answer.model.__name__}"
        how = [self.answer.schema, model, asdict(self.columns), self.carry]
        what = json.dumps([_FORM, asdict(file), how, parts], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()


def look(assembly: Assembly) -> dict[InputFile, Counts | None]:
    """The counts of each file that is there and made of what there is now; None: it is to make.

    Raises:
        StorageError: a file cannot be read.
    """
    files = assembly.dataset.files
    return dict(zip(files, each_file(files, lambda f, _: _made(assembly, f)), strict=True))


def assemble(
    assembly: Assembly, found: Mapping[InputFile, Counts | None], confirm: Callable[[], None]
) -> dict[InputFile, Counts]:
    """Write the files that ``look`` did not find; returns the counts of all.

    Args:
        assembly: of the dataset.
        found: what ``look`` says.
        confirm: called before each file appears; raises if the dataset is another driver's.

    Raises:
        StorageError: something cannot be read or written.
        AccountingError: a row has no record.
    """
    missing = [file for file, counts in found.items() if counts is None]
    if missing:
        _write_listing(assembly)
        log.info("writing %d of %d annotated files", len(missing), len(found))
    made = each_file(missing, lambda file, stopped: _write(assembly, file, confirm, stopped))
    new = dict(zip(missing, made, strict=True))
    return {file: counts or new[file] for file, counts in found.items()}


def discard_dataset(output_uri: str) -> None:
    """Delete the files of the listing; whatever else is there stays."""
    listed = _listing(output_uri)
    storage.delete_all([storage.join(output_uri, "data", path) for path in sorted(listed)])
    storage.delete(storage.join(output_uri, _LISTING))


def check_only_ours(output_uri: str) -> None:
    """Refuse an output folder whose ``data/`` holds what this job did not write.

    Raises:
        RunMismatchError: naming a file.
    """
    folder = storage.join(output_uri, "data")
    ours = {storage.join(folder, path) for path in _listing(output_uri)}
    for entry in storage.list_files(folder, suffixes=(".parquet", ".pq")):
        if entry.uri not in ours:
            raise RunMismatchError(
                f"{entry.uri} is no file of an annotated dataset; move it away, or give another "
                "output.uri."
            )


def _listing(output_uri: str) -> set[str]:
    try:
        return set(json.loads(storage.read_bytes(storage.join(output_uri, _LISTING))))
    except FileNotFoundError:
        return set()
    except ValueError as error:
        uri = storage.join(output_uri, _LISTING)
        raise StorageError(f"{uri} is damaged ({error}); delete it, and data/ with it") from None


def _write_listing(assembly: Assembly) -> None:
    paths = sorted(assembly.dataset.paths.values())
    uri = storage.join(assembly.output_uri, _LISTING)
    storage.put_bytes(uri, (json.dumps(paths, indent=1) + "\n").encode())


def _made(assembly: Assembly, file: InputFile) -> Counts | None:
    """The counts of a file that is there and made of what there is now; else None."""
    try:
        with storage.open_input(assembly.target(file)) as handle:
            metadata = pq.read_metadata(handle).metadata or {}
        document = json.loads(metadata.get(_FOOTER_KEY.encode(), b"{}"))
    except (FileNotFoundError, pa.ArrowException, ValueError):
        return None
    if document.get("fingerprint") != assembly.fingerprint(file):
        return None
    return Counts(**document["counts"])


def _write(
    assembly: Assembly, file: InputFile, confirm: Callable[[], None], stopped: Stopped
) -> Counts:
    counts = Counts()
    states = row_states(assembly.attempts, file, assembly.answer)
    with reading(file) as parquet:
        schema, copied = _schema(assembly, parquet.schema_arrow)
        with writing(assembly.target(file), schema) as writer:
            for table in batches(parquet, copied):
                stopped.check()
                found = list(islice(states, table.num_rows))
                for state in found:
                    counts.add(state)
                writer.write(_annotated(assembly, file, table, found, schema))
            next(states, None)  # ends with the check that no row is left
            writer.flush()
            note = {"fingerprint": assembly.fingerprint(file), "counts": asdict(counts)}
            writer.note({_FOOTER_KEY: json.dumps(note)})
            check_unchanged(file)
            confirm()
    return counts


def _schema(assembly: Assembly, present: pa.Schema) -> tuple[pa.Schema, list[str]]:
    """The annotated file's schema, and which columns are copied."""
    carry = assembly.carry
    copied = [name for name in present.names if carry is None or name in carry]
    answer = [
        each.with_name(assembly.columns.answer[each.name]) for each in assembly.answer.arrow_fields
    ]
    ours = [pa.field(assembly.columns.ours[name], kind) for name, kind in OUR_FIELDS]
    metadata = {k: v for k, v in (present.metadata or {}).items() if k != _STALE_METADATA}
    return pa.schema([*map(present.field, copied), *answer, *ours], metadata or None), copied


def _annotated(
    assembly: Assembly,
    file: InputFile,
    table: pa.Table,
    states: Sequence[RowState],
    schema: pa.Schema,
) -> pa.Table:
    added = list(_added(assembly, file, states))
    first = len(schema) - len(added)
    arrays = [pa.array(values, schema.field(first + i).type) for i, values in enumerate(added)]
    return pa.table([*table.columns, *arrays], schema=schema)


def _added(
    assembly: Assembly, file: InputFile, states: Sequence[RowState]
) -> Iterator[list[object]]:
    decisions = [state.decision for state in states]
    for name in assembly.answer.fields:
        yield [decision.answer and decision.answer[name] for decision in decisions]
    yield [decision.code for decision in decisions]
    yield [decision.message and redacted_text(decision.message) for decision in decisions]
    yield [decision.votes for decision in decisions]
    yield [decision.agreement for decision in decisions]
    yield [state.reached for state in states]
    yield [file.uri] * len(states)
    yield [state.row for state in states]


def count_rows(counts: Counts) -> dict[str, int]:
    """Rows by each status of the contract."""
    return {str(status): counts.rows.get(status, 0) for status in Status}
