"""duplicates: rows whose explicit ``custom_id`` an earlier row has: of the input, in JSONL of the
row's own file. Exact.

In: the input's files in plan order and the name of their id column (JSONL has one name for it).
Out: ``Duplicates``, saved with the run, so that a resume reads no ids. Of all ids only 64-bit
hashes are held (8 bytes a row); where one occurs twice, the ids are read again and those behind it
are compared, a bounded number at a time. An input with millions of repeated ids therefore costs
passes, not memory.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.jsonl import iterate_rows
from pipeline.openai_input import read_line
from pipeline.parquet import open_parquet
from pipeline.plan import FirstUse, InputFile, Shard
from pipeline.values import Unreadable, python_values

_THREADS = 4  # hashing takes turns: more would only hold more
_IDS_AT_A_TIME = 400_000
"""Different ids compared in one pass, held as strings: about 70 MB per thread at most."""
_BATCH_ROWS = 16_384
_READ_BUFFER = 2**20  # bytes; without one, a row group's whole column is fetched at once

Numbers = npt.NDArray[np.int64]
"""Hashes, file numbers, row numbers in a file, or rows counted through all files in plan order."""


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Which rows repeat a ``custom_id``, and where each was used first."""

    files: tuple[InputFile, ...]
    rows: Numbers
    """The repeating rows, ascending, counted through all files."""
    firsts: Numbers
    """For each of them, the first row with its id."""

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def none(cls, files: Sequence[InputFile]) -> Duplicates:
        """No row repeats an id."""
        return cls(tuple(files), np.empty(0, np.int64), np.empty(0, np.int64))

    def of(self, shard: Shard) -> dict[int, FirstUse]:
        """The repeating rows of one shard, by row number in the shard's file."""
        start = self._starts[self._numbers[shard.uri]]
        bounds = start + shard.first_row + np.array([0, shard.rows])
        low, high = np.searchsorted(self.rows, bounds)
        if low == high:
            return {}
        uses = zip(*_locate(self._starts, self.firsts[low:high]), strict=True)
        return {
            int(row - start): FirstUse(self.files[file].uri, int(first))
            for row, (file, first) in zip(self.rows[low:high], uses, strict=True)
        }

    def to_parquet(self) -> bytes:
        """As saved with the run: file and row of each repeating row, and of its id's first use."""
        uris = pa.array([file.uri for file in self.files], pa.string())
        input_files, input_rows = _locate(self._starts, self.rows)
        first_files, first_rows = _locate(self._starts, self.firsts)
        columns = {
            "input_file": pa.DictionaryArray.from_arrays(pa.array(input_files), uris),
            "input_row": pa.array(input_rows),
            "first_file": pa.DictionaryArray.from_arrays(pa.array(first_files), uris),
            "first_row": pa.array(first_rows),
        }
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes, files: Sequence[InputFile]) -> Duplicates:
        """The inverse of ``to_parquet``, given the files of the run's plan.

        Raises:
            ValueError, KeyError: not such a table, or one of other files.
        """
        table = pq.read_table(io.BytesIO(data))
        starts = _starts(files)
        numbers = _numbers(files)
        rows = starts[_file_numbers(table.column("input_file"), numbers)]
        firsts = starts[_file_numbers(table.column("first_file"), numbers)]
        return cls(
            tuple(files),
            rows + table.column("input_row").to_numpy(),
            firsts + table.column("first_row").to_numpy(),
        )

    @cached_property
    def _starts(self) -> Numbers:
        return _starts(self.files)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return _numbers(self.files)


def find_duplicates(
    files: Sequence[InputFile], column: str, *, ids_at_a_time: int = _IDS_AT_A_TIME
) -> Duplicates:
    """Rows of ``files`` whose value of ``column``, as ``str`` gives it, an earlier row has.

    In JSONL an id is unique within its file, as in OpenAI's Batch API, whose limit of 50,000 lines
    has people number each file anew; in Parquet within the input. Rows without a value, files
    without the column and values that are not UTF-8 have no id.

    Args:
        files: in the order that decides which use of an id is the first.
        column: the id column, by the input's own name.
        ids_at_a_time: different repeated ids compared in one pass over the column.

    Raises:
        StorageError: a file cannot be read, or has another number of rows than planned.
    """
    by_file = bool(files) and files[0].is_jsonl
    scopes = [[file] for file in files] if by_file else [files]
    starts = _starts(files) if by_file else [0]

    def look(scope: Sequence[InputFile]) -> list[tuple[Numbers, Numbers]]:
        return _repeating_within(scope, column, ids_at_a_time)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [
            (rows + start, firsts + start)
            for start, pairs in zip(starts, pool.map(look, scopes), strict=True)
            for rows, firsts in pairs
        ]
    rows = _concatenate([rows for rows, _ in found])
    firsts = _concatenate([firsts for _, firsts in found])
    order = np.argsort(rows)
    return Duplicates(tuple(files), rows[order], firsts[order])


def _repeating_within(
    files: Sequence[InputFile], column: str, ids_at_a_time: int
) -> list[tuple[Numbers, Numbers]]:
    """(repeating rows, first use of each), counted through ``files``."""
    repeated = _repeated_hashes(files, column)
    passes = -(-len(repeated) // ids_at_a_time)
    pieces = np.array_split(repeated, passes) if passes else []
    return [pair for hashes in pieces for pair in _compare(files, column, hashes)]


def _repeated_hashes(files: Sequence[InputFile], column: str) -> Numbers:
    """The hashes of ids that more than one row has, sorted (and, hardly ever, a collision's)."""
    hashes = np.empty(sum(file.rows for file in files), np.int64)
    places = np.split(hashes, _starts(files)[1:])  # views: threads fill them side by side
    filled = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda file, place: _hash_file(file, column, place), files, places)
        for place, count in zip(places, found, strict=True):
            hashes[filled : filled + count] = place[:count]
            filled += count
    hashes = hashes[:filled]
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _hash_file(file: InputFile, column: str, place: Numbers) -> int:
    """Fill the beginning of ``place`` with the hashes of a file's ids; how many there are."""
    filled = 0
    for _, ids in _read_ids(file, column):
        found = [hash(each) for each in ids if each is not None]
        place[filled : filled + len(found)] = found
        filled += len(found)
    return filled


def _compare(
    files: Sequence[InputFile], column: str, hashes: Numbers
) -> Iterator[tuple[Numbers, Numbers]]:
    """Per file, (repeating rows, first use of each) of the ids that have one of ``hashes``."""
    starts = _starts(files)
    seen: dict[str, int] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for at in range(0, len(files), _THREADS):  # few at a time: results are held
            group = slice(at, at + _THREADS)
            found = pool.map(lambda file: _candidates(file, column, hashes), files[group])
            for start, candidates in zip(starts[group], found, strict=True):
                yield _repeating(candidates, int(start), seen)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Rows of one file whose id may be a repeated one."""

    rows: Numbers
    codes: Numbers
    """Which of ``ids`` each row has."""
    ids: list[str]
    """Different ids, in the order of their first row here."""


def _candidates(file: InputFile, column: str, hashes: Numbers) -> _Candidates:
    rows, codes = array("q"), array("q")
    numbers: dict[str, int] = {}
    for first, ids in _read_ids(file, column):
        given = np.fromiter(map(hash, ids), np.int64, len(ids))
        nearest = np.minimum(np.searchsorted(hashes, given), len(hashes) - 1)
        for offset in np.flatnonzero(hashes[nearest] == given).tolist():
            if (each := ids[offset]) is not None:
                rows.append(first + offset)
                codes.append(numbers.setdefault(each, len(numbers)))
    return _Candidates(np.array(rows, np.int64), np.array(codes, np.int64), list(numbers))


def _repeating(
    candidates: _Candidates, start: int, seen: dict[str, int]
) -> tuple[Numbers, Numbers]:
    """(repeating rows, first use of each) of one file; enters its new ids into ``seen``."""
    rows = candidates.rows + start
    _, first_in_file = np.unique(candidates.codes, return_index=True)
    firsts = [
        seen.setdefault(each, int(row))
        for each, row in zip(candidates.ids, rows[first_in_file], strict=True)
    ]
    first_of_row = np.array(firsts, np.int64)[candidates.codes]
    again = first_of_row != rows
    return rows[again], first_of_row[again]


def _read_ids(file: InputFile, column: str) -> Iterator[tuple[int, list[str | None]]]:
    """Batches of a file's ids: number of the first row, then each row's id or None."""
    read = _read_line_ids(file) if file.is_jsonl else _read_column(file, column)
    try:
        yield from read
    except FileNotFoundError:
        raise StorageError(f"{file.uri}: is gone since it was listed; start again") from None
    except pa.ArrowException as error:
        raise StorageError(f"cannot read {column!r} of {file.uri}: {error}") from error


def _read_column(file: InputFile, column: str) -> Iterator[tuple[int, list[str | None]]]:
    first = 0
    with storage.open_input(file.uri) as handle:
        parquet = open_parquet(handle, buffer=_READ_BUFFER)
        _check_rows(file, parquet.metadata.num_rows)
        if column not in parquet.schema_arrow.names:
            return
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
            yield first, _as_text(batch.column(column))
            first += batch.num_rows


def _read_line_ids(file: InputFile) -> Iterator[tuple[int, list[str | None]]]:
    first = 0
    with storage.open_input(file.uri) as handle:
        rows = (line for _, line in iterate_rows(handle))
        while ids := [read_line(line).custom_id for line in islice(rows, _BATCH_ROWS)]:
            if first + len(ids) > file.rows:
                _check_rows(file, first + len(ids) + sum(1 for _ in rows))
            yield first, ids
            first += len(ids)
    _check_rows(file, first)


def _check_rows(file: InputFile, found: int) -> None:
    if found != file.rows:
        raise StorageError(
            f"{file.uri}: changed since it was listed: rows {file.rows} -> {found}; start again"
        )


def _as_text(values: pa.Array) -> list[str | None]:
    """Ids as prepare sees them: ``str`` of the Python value; None if there is none."""
    return [
        each if type(each) is str else None if _is_none(each) else str(each)
        for each in python_values(values)
    ]


def _is_none(value: object) -> bool:
    return value is None or isinstance(value, Unreadable)


def _starts(files: Sequence[InputFile]) -> Numbers:
    """The number of each file's first row, counted through all files."""
    return np.cumsum([0, *(file.rows for file in files)], dtype=np.int64)[:-1]


def _numbers(files: Sequence[InputFile]) -> dict[str, int]:
    return {file.uri: number for number, file in enumerate(files)}


def _locate(starts: Numbers, rows: Numbers) -> tuple[Numbers, Numbers]:
    """(file number, row number in that file) of rows counted through all files."""
    files = np.searchsorted(starts, rows, side="right") - 1
    return files, rows - starts[files]


def _file_numbers(column: pa.ChunkedArray, numbers: dict[str, int]) -> Numbers:
    """The numbers of a dictionary-encoded column of URIs."""
    return _concatenate(
        [
            np.array([numbers[uri] for uri in chunk.dictionary.to_pylist()], np.int64)[
                chunk.indices.to_numpy()
            ]
            for chunk in column.chunks
        ]
    )


def _concatenate(pieces: Sequence[Numbers]) -> Numbers:
    return np.concatenate([np.empty(0, np.int64), *pieces])
