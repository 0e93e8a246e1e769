"""The index of runs: one small object per run, beside the run folders.

    s3://batch/runs/2026-11-22/...          a run
    s3://batch/runs/_index/2026-11-22.json  what came of it

In: an entry, written by the run's driver when a start begins and when it ends. Out: all entries of
a folder, by one listing and one small read each. Drivers share no object, so none waits for
another. An entry is news, not truth: the run folder is. It outlives its folder, so that a run whose
objects were removed is still known; whoever wants it gone removes the entry as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.report import RunStatus

log = logging.getLogger(__name__)

FOLDER = "_index"
_SUFFIX = ".json"
_THREADS = 32


class IndexEntry(BaseModel):
    """What one run came to, as far as its driver could tell."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    run: str
    """URI of the run folder, as its driver knew it."""
    id: str
    name: str
    """The config's."""
    profile: str
    model: str
    state: str
    """``running``, or the status that the last start ended with."""
    exit_code: int | None
    """Of the last start; null while it goes on, and for ever if its driver was killed."""
    error: str | None
    rows: dict[str, int]
    """total, succeeded, errored, expired, cancelled."""
    rows_done: int
    tokens: dict[str, int]
    errors: dict[str, int]
    """Records by error code."""
    starts: int
    began_at: str
    """The first start; by its driver's clock, as all times."""
    ended_at: str | None
    """The last one."""
    seconds: float
    """All starts together."""

    @property
    def finished(self) -> bool:
        """Whether every row had its record, and the last start had ended."""
        ended = sum(count for state, count in self.rows.items() if state != "total")
        over = self.state in (RunStatus.COMPLETE, RunStatus.OVER_ERROR_RATE)
        return over and ended == self.rows.get("total")


def index_uri(run_uri: str) -> str | None:
    """Where the entry of a run goes; None if the run folder is a bucket by itself."""
    parent = storage.parent(run_uri)
    return parent and storage.join(parent, FOLDER, storage.name(run_uri) + _SUFFIX)


def read_index(folder: str) -> Mapping[str, IndexEntry]:
    """The entries of the runs in ``folder``, by the names of their folders.

    An entry that cannot be understood is left out, with a warning.

    Raises:
        StorageError: they cannot be listed or read.
    """
    try:
        uris = storage.list_folder(storage.join(folder, FOLDER))
    except FileNotFoundError:
        return {}
    uris = [uri for uri in uris if uri.endswith(_SUFFIX)]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(_read, uris))
    names = [storage.name(uri).removesuffix(_SUFFIX) for uri in uris]
    return {name: entry for name, entry in zip(names, entries, strict=True) if entry is not None}


def _read(uri: str) -> IndexEntry | None:
    try:
        return IndexEntry.model_validate_json(storage.read_bytes(uri))
    except FileNotFoundError:  # removed since it was listed
        return None
    except ValidationError as error:
        log.warning("%s is no index entry of this version: %s", uri, error.errors()[0]["msg"])
        return None
