"""journal: what a replica finished of an open shard, before the shard's part can be committed.

    _journal/<shard>/<when>-<attempt>-<number>.parquet     some finished records, one whole PUT each

In: outcomes as they finish. Out: on any later attempt at the shard, on any cluster, the outcomes
that need not be paid for again. A shard's journal vanishes once its part is committed. Attempts
never share a name, so late writes of one that was given up replace nothing: at worst they leave
objects beside a committed part, which nobody reads and the end of the run removes.
"""

from __future__ import annotations

import io
import logging
import time
import uuid
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.commit import Destination
from pipeline.plan import Shard
from pipeline.records import Outcome, SampleKey, read_records, record_table

log = logging.getLogger(__name__)

_FOLDER = "_journal"


class Journal:
    """One attempt's view of one shard's journal."""

    def __init__(self, to: Destination, shard: Shard) -> None:
        self._folder = storage.join(to.output_uri, _FOLDER, f"{shard.index:06d}")
        self._shard = shard
        self._model = to.model_name
        self._attempt = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        self._written: list[str] = []
        self._found: list[str] = []

    def read(self) -> list[Outcome]:
        """What earlier attempts finished, each sample once (the first that finished).

        An object that is no journal entry is left out with a warning: its rows are made again.

        Raises:
            StorageError: the journal cannot be listed or read.
        """
        entries = storage.list_files(self._folder, suffixes=(".parquet",))
        self._found = [entry.uri for entry in entries]
        rows = range(self._shard.first_row, self._shard.first_row + self._shard.rows)
        known: dict[SampleKey, Outcome] = {}
        for uri in self._found:
            for outcome in _read_entry(uri):
                if outcome.input_row in rows:
                    known.setdefault(outcome.key, outcome)
        return list(known.values())

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Write ``outcomes`` as one more object; they survive whatever happens next.

        Raises:
            StorageError: the object could not be written and confirmed.
        """
        if not outcomes:
            return
        name = f"{self._attempt}-{len(self._written):04d}.parquet"
        uri = storage.join(self._folder, name)
        sink = io.BytesIO()
        table = record_table(self._shard, outcomes, model=self._model)
        pq.write_table(table, sink, compression="zstd")
        storage.put_bytes(uri, sink.getvalue())
        self._written.append(uri)

    def replace(
        self, outcomes: Sequence[Outcome], confirm: Callable[[], None] = lambda: None
    ) -> None:
        """Make ``outcomes`` all that the journal has; what it had goes once they are stored.

        ``confirm`` is called before each change, and raises if the run is another driver's.
        """
        self.read()
        self._replace_found(outcomes, confirm)

    def drop(
        self, matches: Callable[[Outcome], bool], confirm: Callable[[], None] = lambda: None
    ) -> int:
        """Take the outcomes that match out of the journal, as ``replace`` does; how many it were.

        Raises:
            StorageError: the journal cannot be read or written.
        """
        found = self.read()
        kept = [outcome for outcome in found if not matches(outcome)]
        if len(kept) < len(found):
            self._replace_found(kept, confirm)
        return len(found) - len(kept)

    def clear(self) -> None:
        """Remove what was read and written here; the part holds it all now."""
        storage.delete_all([*self._found, *self._written])
        self._found, self._written = [], []

    def _replace_found(self, outcomes: Sequence[Outcome], confirm: Callable[[], None]) -> None:
        confirm()
        self.append(outcomes)
        confirm()
        storage.delete_all(self._found)
        self._found = []


def journaled_shards(output_uri: str) -> frozenset[int]:
    """Shards that have a journal, by listing them all once.

    Raises:
        StorageError: they cannot be listed.
    """
    entries = storage.list_files(storage.join(output_uri, _FOLDER), suffixes=(".parquet",))
    folders = {storage.name(entry.uri.rpartition("/")[0]) for entry in entries}
    return frozenset(int(folder) for folder in folders if folder.isdecimal())


def clear_journals(output_uri: str) -> None:
    """Remove every journal of a run whose parts are all committed, and the folders they leave.

    Not earlier: another attempt at the shard may be about to write into its folder.
    """
    folder = storage.join(output_uri, _FOLDER)
    storage.delete_all([entry.uri for entry in storage.list_files(folder)])
    storage.remove_empty_folders(folder)


def _read_entry(uri: str) -> list[Outcome]:
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return []  # removed meanwhile: another attempt has committed the part
    try:
        return read_records(pq.read_table(pa.BufferReader(content)))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:  # OSError: its pages
        log.warning("%s is not a journal entry and is left out: %s", uri, error)
        return []
