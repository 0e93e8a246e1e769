"""journal: what a replica finished of an open shard, before the shard's part can be committed.

    _journal/<shard>/<when>-<attempt>-<number>.parquet     some finished records, one whole PUT each

In: outcomes as they finish. Out: on any later attempt at the shard, on any cluster, the outcomes
that need not be paid for again. A shard's journal vanishes once its part is committed. Attempts
never share a name, so late writes of one that was given up replace nothing: at worst they leave
objects beside a committed part, which nobody reads and the end of the run removes. Each object says
which run made it, and in which epoch: another run's do not count, nor do records retried since.
"""

from __future__ import annotations

import io
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.commit import Destination, is_any
from pipeline.plan import Shard
from pipeline.records import Outcome, SampleKey, read_records, record_table

log = logging.getLogger(__name__)

TRIAL_SUFFIX = ".json"
"""Of objects beside the entries that say which rows were alone in an engine (see ``suspects``)."""
_FOLDER = "_journal"
_SIGNATURE_KEY = b"maverick.journal"
_CLEARED_AT_A_TIME = 100
"""Objects between two looks at the lease, where one request deletes them all."""


class Journal:
    """One attempt's view of one shard's journal."""

    def __init__(self, to: Destination, shard: Shard) -> None:
        self.folder = storage.join(to.output_uri, _FOLDER, f"{shard.index:06d}")
        self.trials: list[str] = []
        """Objects that earlier attempts left as they ended; known once the journal is read."""
        self._shard = shard
        self._to = to
        self._attempt = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        self._written: list[str] = []
        self._found: list[str] = []

    def read(self) -> list[Outcome]:
        """What earlier attempts finished, each sample once (the first that finished).

        An object that is no journal entry is left out with a warning: its rows are made again.
        Those of another run, and records that were retried since, are left out as well.

        Raises:
            StorageError: the journal cannot be listed or read.
        """
        listed = storage.iterate_folder(self.folder, suffixes=(".parquet", TRIAL_SUFFIX))
        uris = sorted(entry.uri for entry in listed)
        self.trials = [uri for uri in uris if uri.endswith(TRIAL_SUFFIX)]
        self._found = [uri for uri in uris if not uri.endswith(TRIAL_SUFFIX)]
        rows = range(self._shard.first_row, self._shard.first_row + self._shard.rows)
        known: dict[SampleKey, Outcome] = {}
        for uri in self._found:
            for outcome in _read_entry(uri, self._to):
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
        self._write(f"{self._attempt}-{len(self._written):04d}.parquet", outcomes)

    def replace(
        self, outcomes: Sequence[Outcome], confirm: Callable[[], None] = lambda: None
    ) -> None:
        """Make ``outcomes`` all that the journal has; what it had goes once they are stored.

        Their name is read first, so that no late entry of an earlier attempt comes before them.
        ``confirm`` is called before each change, and raises if the run is another driver's.
        """
        self.read()
        if outcomes:
            confirm()
            self._write(f"{0:020d}-{uuid.uuid4().hex[:12]}.parquet", outcomes)
        confirm()
        storage.delete_all(self._found)
        self._found = []

    def clear(self) -> None:
        """Remove what was read and written here; the part holds it all now."""
        storage.delete_all([*self._found, *self._written])
        self._found, self._written = [], []

    def _write(self, name: str, outcomes: Sequence[Outcome]) -> None:
        uri = storage.join(self.folder, name)
        table = record_table(self._shard, outcomes, model=self._to.model_name)
        signature = json.dumps({"run": self._to.run_id, "epoch": self._to.epoch}).encode()
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), _SIGNATURE_KEY: signature}
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        storage.put_bytes(uri, sink.getvalue())
        self._written.append(uri)


def journaled_shards(output_uri: str) -> frozenset[int]:
    """Shards that have a journal, by listing them all once.

    Raises:
        StorageError: they cannot be listed.
    """
    entries = storage.iterate_folder(storage.join(output_uri, _FOLDER), suffixes=(".parquet",))
    folders = {storage.name(entry.uri.rpartition("/")[0]) for entry in entries}
    return frozenset(int(folder) for folder in folders if folder.isdecimal())


def clear_journals(output_uri: str, confirm: Callable[[], None] = lambda: None) -> None:
    """Remove every journal of a run whose parts are all committed, and the folders they leave.

    Not earlier: another attempt at the shard may be about to write into its folder. ``confirm`` is
    called before each deletion, and raises if the run is another driver's.
    """
    folder = storage.join(output_uri, _FOLDER)
    uris = [entry.uri for entry in storage.list_files(folder)]
    step = _CLEARED_AT_A_TIME if storage.deletes_at_once(output_uri) else 1
    for first in range(0, len(uris), step):
        confirm()
        storage.delete_all(uris[first : first + step])
    storage.remove_empty_folders(folder)


def _read_entry(uri: str, to: Destination) -> list[Outcome]:
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return []  # removed meanwhile: another attempt has committed the part
    try:
        table = pq.read_table(pa.BufferReader(content))
        epoch = _epoch(table.schema.metadata or {}, to)
        if epoch is None:
            log.warning("%s is of another run and is left out", uri)
            return []
        retried = to.retried_since(epoch)
        return [outcome for outcome in read_records(table) if not is_any(outcome, retried)]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:  # OSError: its pages
        log.warning("%s is not a journal entry and is left out: %s", uri, error)
        return []


def _epoch(metadata: Mapping[bytes, bytes], to: Destination) -> int | None:
    """When an entry was made; None if it is not the run's."""
    if _SIGNATURE_KEY not in metadata:
        return 0 if to.unsigned_journals else None
    signature = json.loads(metadata[_SIGNATURE_KEY])
    return int(signature["epoch"]) if signature["run"] == to.run_id else None
