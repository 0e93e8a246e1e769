"""Attempts: batch runs over the dataset's rows, then over those that gave no valid answer.

    _runs/attempt-0/            a run over the input itself
    _feed/attempt-k/            the rows of attempt k (a copy of what their prompts need)
    _feed/attempt-k/_feed.json  written last: that the feed is whole, and which run it is for
    _runs/attempt-k-<id>/       the run over it

In: run folders. Out: each row's state after all attempts, in the order of its file. A file is
merged from the attempts' parts shard by shard, so memory is bounded by the shard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.annotate.answer import Answer
from jobs.annotate.votes import Decision, Record, decide
from pipeline import storage
from pipeline.commit import part_number, part_uri
from pipeline.errors import AccountingError, StorageError
from pipeline.plan import InputFile, Plan, Shard

FIRST_RUN = "attempt-0"
"""Name of the folder of attempt 0."""
ID_COLUMN = "__custom_id"
ROW_COLUMN = "__row"
"""Of a feed: the row's id, and its number in the input's file."""
_COLUMNS = (
    *("custom_id", "sample_index", "status", "text", "error_code", "error_message", "attempts"),
    "input_row",
)
_MARKER = "_feed.json"


@dataclass(frozen=True)
class Feed:
    """The rows of one attempt, as its marker says."""

    number: int
    """Of the attempt; 0 is the input itself, without a feed."""
    run: str
    """Name of the run's folder."""
    files: Mapping[str, int]
    """Rows by path, relative to the feed's folder and to the input's alike."""

    @property
    def rows(self) -> int:
        """Rows of the attempt."""
        return sum(self.files.values())


def feed_folder(output_uri: str, number: int) -> str:
    """Where the feed of attempt ``number`` goes."""
    return storage.join(output_uri, "_feed", f"attempt-{number}")


def run_uri(output_uri: str, run: str) -> str:
    """The run folder of an attempt."""
    return storage.join(output_uri, "_runs", run)


def read_feed(output_uri: str, number: int) -> Feed | None:
    """The feed of attempt ``number``; None if there is no whole one.

    Raises:
        StorageError: its marker is damaged, or cannot be read.
    """
    uri = storage.join(feed_folder(output_uri, number), _MARKER)
    try:
        document = json.loads(storage.read_bytes(uri))
        return Feed(number, document["run"], document["files"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri} is damaged ({error}); start over with --new-run") from None


def mark_feed(output_uri: str, feed: Feed) -> None:
    """Write the marker of a feed whose files are all there."""
    uri = storage.join(feed_folder(output_uri, feed.number), _MARKER)
    document = {"run": feed.run, "files": dict(feed.files)}
    storage.put_bytes(uri, (json.dumps(document, indent=2) + "\n").encode())


def discard_feeds(output_uri: str) -> None:
    """Delete the markers of all feeds: their attempts count no more."""
    number = 1
    while read_feed(output_uri, number) is not None:
        number += 1
    for each in reversed(range(1, number)):  # the last first: no gap, should this be cut short
        storage.delete(storage.join(feed_folder(output_uri, each), _MARKER))


@dataclass(frozen=True)
class Attempt:
    """One attempt whose run is complete."""

    number: int
    run_uri: str
    plan: Plan
    versions: Mapping[int, str]
    """Of each shard's part, what changes when it does."""
    files: Mapping[str, str]
    """URI of a dataset file -> the file with its rows that this attempt ran."""

    @cached_property
    def _shards(self) -> Mapping[str, Sequence[Shard]]:
        by_file: dict[str, list[Shard]] = {}
        for shard in self.plan.shards:
            by_file.setdefault(shard.uri, []).append(shard)
        return by_file

    def shards(self, file: str) -> Sequence[Shard]:
        """The shards that hold rows of a dataset file, in order."""
        return self._shards.get(self.files.get(file, ""), ())

    def samples(self, file: str) -> Iterator[tuple[int, list[Record]]]:
        """Each row of a dataset file that this attempt ran: its number there, and its records.

        Raises:
            StorageError: a part cannot be read.
        """
        for shard in self.shards(file):
            uri = part_uri(self.run_uri, shard.index)
            place = ROW_COLUMN if self.number else "input_row"
            try:
                columns = [*_COLUMNS, *([ROW_COLUMN] if self.number else [])]
                table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=columns)
            except (FileNotFoundError, pa.ArrowException, OSError) as error:
                raise StorageError(
                    f"{uri} is gone or damaged ({error}); delete it and run the command again, "
                    "which makes its rows again"
                ) from None
            for row, records in groupby(table.to_pylist(), key=lambda record: record[place]):
                yield row, list(records)


def load_attempt(output_uri: str, feed: Feed, paths: Mapping[str, str]) -> Attempt:
    """An attempt whose run is complete.

    Args:
        output_uri: of the dataset.
        feed: its rows.
        paths: of each file of the input, its relative path.

    Raises:
        StorageError: the run cannot be read.
    """
    uri, folder = run_uri(output_uri, feed.run), feed_folder(output_uri, feed.number)
    files = {
        file: storage.absolute(storage.join(folder, path)) if feed.number else file
        for file, path in paths.items()
        if path in feed.files
    }
    try:
        plan = Plan.from_json(storage.read_bytes(storage.join(uri, "_plan.json")))
    except (FileNotFoundError, ValueError) as error:
        raise StorageError(f"{uri}/_plan.json is missing or damaged ({error})") from None
    parts = storage.list_files(storage.join(uri, "data"), suffixes=(".parquet",))
    numbered = ((part_number(part.uri), part.version) for part in parts)
    versions = {shard: version for shard, version in numbered if shard is not None}
    return Attempt(feed.number, uri, plan, versions, files)


@dataclass(frozen=True, slots=True)
class RowState:
    """One row after all attempts at it."""

    row: int
    custom_id: str
    decision: Decision
    """Of the last attempt."""
    tries: int
    """Attempts that had the row."""
    reached: int
    """Of them, those in which an engine was asked."""


def row_states(attempts: Sequence[Attempt], file: InputFile, answer: Answer) -> Iterator[RowState]:
    """The state of each row of a dataset file, in order.

    Raises:
        StorageError: a part cannot be read.
        AccountingError: a row is missing.
    """
    later = [_Ahead(attempt.samples(file.uri)) for attempt in attempts[1:]]
    expected = 0
    for row, samples in attempts[0].samples(file.uri):
        if row != expected:
            raise AccountingError(f"{file.uri}: row {expected} has no record in attempt 0")
        expected += 1
        history = [samples, *(found for each in later if (found := each.take(row)) is not None)]
        reached = sum(any(record["attempts"] for record in records) for records in history)
        decision = decide(history[-1], answer)
        yield RowState(row, samples[0]["custom_id"], decision, len(history), reached)
    if expected != file.rows:
        raise AccountingError(f"{file.uri}: {file.rows - expected} rows have no record")


class _Ahead:
    """Rows in order, of which the next is looked at."""

    def __init__(self, rows: Iterator[tuple[int, list[Record]]]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def take(self, row: int) -> list[Record] | None:
        """The records of ``row``, if it is the next one."""
        if self._next is None or self._next[0] != row:
            return None
        found = self._next[1]
        self._next = next(self._rows, None)
        return found
