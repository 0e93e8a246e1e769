"""plan: input files -> shards. Pure and deterministic; saved with the run and reused on resume.

In: what the input's files hold (of JSONL, also where each row starts). Out: ``Plan``, the list of
shards. A shard is a range of rows of one file: one read task, one block, one output part, one
commit. Shards are capped in rows and bytes, and cut for the replicas that work on them, so that
these finish together: a short input into as many equal shards for each as it takes at once, a long
one into shards that shrink towards its end.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

OPEN_SHARDS = 16
"""Shards a replica works on at a time: while the last rows of some end, others fill the window.
With fewer, a few long rows in each leave the engine empty; with more, the end of a run is bound to
replicas too early (docs/simulation.md)."""
_TAIL_SHARDS = 4
"""A shard is at most a quarter of one replica's share of the rows still to plan (guided
self-scheduling), so those that are done early take more of the small ones: docs/simulation.md."""
_MIN_ROWS = 32
"""No shard is cut below this for the tail's sake: each costs a PUT and a footer, and all that a
replica has open must still fill its engine."""
_ROUNDING = 1e-6
"""Of a row: what interpolation may lose."""
_SECONDS = re.compile(r"\d{1,11}\.\d+")
"""A version that is a modification time: seconds since 1970. ETags have no point."""

Offsets = npt.NDArray[np.int64]
"""Where each row of a JSONL file starts, in bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """How large the parts of one Parquet file are: within each, rows are taken to be alike."""

    rows: npt.NDArray[np.float64]
    """Rows before each part, and all rows; ascending, from 0."""
    data_bytes: npt.NDArray[np.float64]
    """Bytes before each part, and all bytes; ascending, from 0."""

    def rows_within(self, size: int, first: int) -> int:
        """How many rows from ``first`` on fit into ``size`` bytes."""
        start = np.interp(first, self.rows, self.data_bytes)
        end = np.interp(start + size, self.data_bytes, self.rows)
        return int(end + _ROUNDING) - first


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as its footer, or a scan of its lines, describes it."""

    uri: str
    size: int
    """Bytes stored."""
    version: str
    """ETag or modification time."""
    rows: int
    data_bytes: int
    """Bytes of all columns, decompressed, by the footer; of JSONL, the file's."""
    form: str = ""
    """``parquet`` or ``jsonl`` if the content told; empty if the suffix does."""

    @property
    def is_jsonl(self) -> bool:
        """Whether it is OpenAI batch JSONL."""
        return self.form == "jsonl" if self.form else self.uri.lower().endswith(".jsonl")

    def changes(self, found: InputFile) -> str:
        """What ``found``, the same file asked for anew, has otherwise; empty if nothing."""
        pairs = (
            ("size", self.size, found.size),
            ("rows", self.rows, found.rows),
            ("version", _readable(self.version), _readable(found.version)),
        )
        return ", ".join(f"{key} {old} -> {new}" for key, old, new in pairs if old != new)


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of rows of one file."""

    index: int
    uri: str
    first_row: int
    rows: int
    first_byte: int = 0
    """Where its first row starts in a JSONL file; 0 in Parquet, as ``end_byte``."""
    end_byte: int = 0
    """Where the row after its last one starts, or the file ends."""


@dataclass(frozen=True, slots=True)
class FirstUse:
    """The row that used a ``custom_id`` first."""

    uri: str
    row: int
    """Row number in that file, from 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole run, cut into shards that cover every row of every file exactly once."""

    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """Input rows."""
        return sum(file.rows for file in self.files)

    def to_json(self) -> str:
        """The plan as saved with the run; shards as [file number, first row, rows], of JSONL
        files with [first byte, end byte] behind."""
        numbers = {file.uri: number for number, file in enumerate(self.files)}
        return json.dumps(
            {
                "files": [asdict(file) for file in self.files],
                "shards": [[numbers[s.uri], s.first_row, s.rows, *_span(s)] for s in self.shards],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The inverse of ``to_json``.

        Raises:
            ValueError: ``text`` is no plan, or one that does not cover its files.
        """
        document = json.loads(text)
        if not isinstance(document, dict) or not {"files", "shards"} <= document.keys():
            raise ValueError("not an object with files and shards")
        try:
            files = tuple(InputFile(**file) for file in document["files"])
            shards = tuple(
                Shard(index, files[number].uri, first_row, rows, *span)
                for index, (number, first_row, rows, *span) in enumerate(document["shards"])
            )
        except (TypeError, IndexError) as error:
            raise ValueError(f"files or shards of another form: {error}") from None
        _check_covered(files, shards)
        return cls(files, shards)


def _readable(version: str) -> str:
    """A modification time as a time; an ETag as it is."""
    if not _SECONDS.fullmatch(version):
        return version
    return datetime.fromtimestamp(float(version), UTC).isoformat()


def fingerprint(files: Sequence[InputFile]) -> str:
    """SHA-256 over the input files: name, size, version and rows."""
    listing = json.dumps([asdict(file) for file in files], sort_keys=True)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def make_plan(
    files: Sequence[InputFile],
    *,
    shard_rows: int,
    shard_bytes: int,
    replicas: int = 1,
    offsets: Mapping[str, Offsets] | None = None,
    extents: Mapping[str, Extents] | None = None,
) -> Plan:
    """Cut ``files``, in the order given, into shards.

    An input without rows becomes one empty shard, so that the output is a readable, empty table.

    Args:
        files: the input.
        shard_rows: most rows in a shard.
        shard_bytes: most bytes in a shard: exactly of JSONL, of Parquet by the average of a row
            group's rows. A row that is larger is a shard by itself.
        replicas: how many will work on it. What all of them take at once is cut into
            ``OPEN_SHARDS`` equal shards for each; of more rows, each shard towards the end is a
            share of the rest.
        offsets: of each JSONL file, where its rows start.
        extents: of each Parquet file, how large its row groups are; without, all are alike.
    """
    cut = _cut(files, shard_rows, shard_bytes, replicas, offsets or {}, extents or {})
    shards = list(cut)
    if not shards and files:
        shards = [Shard(0, files[0].uri, 0, 0)]
    return Plan(tuple(files), tuple(shards))


def _check_covered(files: Sequence[InputFile], shards: Sequence[Shard]) -> None:
    """Refuse shards that are not, in order, each row of each file once."""
    if not shards:
        raise ValueError("no shards")
    covered = dict.fromkeys((file.uri for file in files), 0)
    for shard in shards:
        if shard.first_row != covered[shard.uri]:
            raise ValueError(f"shard {shard.index} does not start where the one before it ends")
        covered[shard.uri] += shard.rows
    for file in files:
        if covered[file.uri] != file.rows:
            raise ValueError(f"{covered[file.uri]} of {file.rows} rows of {file.uri} in shards")


def _span(shard: Shard) -> tuple[int, ...]:
    return (shard.first_byte, shard.end_byte) if shard.end_byte else ()


def _cut(
    files: Sequence[InputFile],
    shard_rows: int,
    shard_bytes: int,
    replicas: int,
    offsets: Mapping[str, Offsets],
    extents: Mapping[str, Extents],
) -> Iterator[Shard]:
    index = 0
    left = sum(file.rows for file in files)
    at_once = replicas * OPEN_SHARDS
    equal = max(_MIN_ROWS, math.ceil(left / at_once)) if left <= at_once * shard_rows else None
    for file in files:
        starts = offsets.get(file.uri)
        bounds = None if starts is None else np.append(starts, file.size)
        first = 0
        while first < file.rows:
            rest = file.rows - first
            quarter = max(_MIN_ROWS, left // (_TAIL_SHARDS * replicas))
            by_share = _even(rest, equal) if equal else quarter
            by_bytes = _rows_within(shard_bytes, file, first, bounds, extents.get(file.uri))
            rows = min(shard_rows, by_bytes, by_share, rest)
            span = () if bounds is None else (int(bounds[first]), int(bounds[first + rows]))
            yield Shard(index, file.uri, first, rows, *span)
            index += 1
            first += rows
            left -= rows


def _even(rows: int, most: int) -> int:
    """The first of the fewest parts of at most ``most`` that ``rows`` fall into evenly."""
    return math.ceil(rows / math.ceil(rows / most))


def _rows_within(
    size: int, file: InputFile, first: int, bounds: Offsets | None, extents: Extents | None
) -> int:
    """How many rows from ``first`` on fit into ``size`` bytes, at least one."""
    if bounds is not None:
        return max(1, int(np.searchsorted(bounds, bounds[first] + size, side="right")) - 1 - first)
    if extents is not None:
        return max(1, extents.rows_within(size, first))
    return max(1, size // max(1, file.data_bytes // file.rows))
