"""An earlier run's completions: what lengths to expect of the next one.

In: a run folder, or the folder that run folders lie in. Out: ``FromRun``. Of a run, up to 256 parts
are read, evenly chosen, of each the few columns needed and up to 2,000 records, so that neither
time nor memory grows with the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.commit import part_number
from pipeline.errors import ConfigError, StorageError
from pipeline.lengths import FromRun, Observed

log = logging.getLogger(__name__)

_COLUMNS = ("attempts", "completion_tokens", "prompt_tokens", "image_tokens", "finish_reason")
_MOST_PARTS = 256
_MOST_RECORDS = 2_000
"""Of one part."""
_MOST_FOLDERS = 64
"""Run folders looked into, the last ones by name: most are called by a date."""
_THREADS = 16


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """A finished run."""

    uri: str
    model: str
    finished_at: str
    """ISO 8601, as in its report."""
    records: int


def find_previous(output_uri: str, model: str) -> PreviousRun | None:
    """The newest finished run of ``model`` in or beside the folder ``output_uri``.

    Raises:
        StorageError: the folder above cannot be listed.
    """
    parent = storage.absolute(output_uri).rstrip("/").rpartition("/")[0]
    if parent.endswith(("/", ":")):
        return None  # a bucket, or a disk's root: nothing lies beside it
    folders = storage.list_folders(parent)[-_MOST_FOLDERS:]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [run for run in pool.map(_look, folders) if run is not None]
    return max((r for r in found if r.model == model), key=lambda r: r.finished_at, default=None)


def open_previous(uri: str) -> PreviousRun:
    """The finished run in the folder ``uri``.

    Raises:
        ConfigError: there is none.
        InputError: the bucket cannot be reached.
    """
    storage.check_reachable(uri)
    folder = storage.absolute(uri).rstrip("/")
    found = _look(folder)
    if found is None:
        raise ConfigError(
            f"--previous {uri}: is no finished run (run.json, report.json and _SUCCESS); give the "
            "output.uri of one."
        )
    return found


def _look(folder: str) -> PreviousRun | None:
    """The run in ``folder``; None if there is none, or none that is finished and can be read."""
    try:
        if not storage.exists(storage.join(folder, "_SUCCESS")):
            return None
        manifest, report = (
            json.loads(storage.read_bytes(storage.join(folder, name)))
            for name in ("run.json", "report.json")
        )
        return PreviousRun(
            folder, manifest["model"]["name"], report["finished_at"], report["records"]
        )
    except (FileNotFoundError, StorageError, ValueError, KeyError, TypeError) as error:
        log.debug("%s holds no run to learn from: %s", folder, error)
        return None


def learn_lengths(run: PreviousRun) -> FromRun | None:
    """How long its completions were; None if it has none.

    Raises:
        ConfigError: a part of it cannot be read, or lacks a column.
        StorageError: its parts cannot be listed.
    """
    entries = storage.list_files(storage.join(run.uri, "data"), suffixes=(".parquet",))
    parts = [entry.uri for entry in entries if part_number(entry.uri) is not None]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_read_part, _spread(parts, _MOST_PARTS)))
    if not any(len(each.tokens) for each in found):
        return None
    observed = Observed(
        np.concatenate([each.tokens for each in found]),
        np.concatenate([each.cut for each in found]),
        np.concatenate([each.kinds for each in found]),
    )
    return FromRun(observed, run=run.uri, finished_at=run.finished_at, records=run.records)


def _spread(items: Sequence[str], most: int) -> list[str]:
    """At most ``most`` of ``items``, evenly chosen."""
    if len(items) <= most:
        return list(items)
    return [items[number] for number in ((np.arange(most) + 0.5) * len(items) // most).astype(int)]


def _read_part(uri: str) -> Observed:
    try:
        with storage.open_input(uri) as handle:
            file = pq.ParquetFile(handle, read_dictionary=["sampling"])
            table = file.read(columns=[*_COLUMNS, "sampling"])
        return _observe(table)
    except (
        FileNotFoundError,
        StorageError,
        KeyError,
        ValueError,
        TypeError,
        pa.ArrowException,
    ) as error:
        raise ConfigError(
            f"{uri}: cannot be read as a part of an earlier run: {error}; give another one with "
            "--previous, or --expected-tokens."
        ) from None


def _observe(table: pa.Table) -> Observed:
    """Its records that an engine was asked for; those it failed on are completions of 0 tokens."""
    asked = table.filter(pc.greater(table.column("attempts"), 0))
    step = max(1, -(-asked.num_rows // _MOST_RECORDS))
    asked = asked.take(pa.array(range(0, asked.num_rows, step), pa.int64())).combine_chunks()
    caps = _caps(asked.column("sampling"))
    kinds = [
        _numbers(asked, "image_tokens") > 0,
        _bit_lengths(caps),
        _bit_lengths(_numbers(asked, "prompt_tokens")),
    ]
    return Observed(
        tokens=_numbers(asked, "completion_tokens"),
        cut=pc.fill_null(pc.equal(asked.column("finish_reason"), "length"), False).to_numpy(),
        kinds=np.stack(kinds, axis=1).astype(np.int64),
    )


def _numbers(table: pa.Table, column: str) -> npt.NDArray[np.int64]:
    values: npt.NDArray[np.int64] = table.column(column).to_numpy().astype(np.int64)
    return values


def _caps(sampling: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """``max_completion_tokens`` of each record; parsed once per distinct text."""
    texts: list[str] = sampling.cast(pa.string()).to_pylist()
    caps = {text: json.loads(text)["max_completion_tokens"] for text in set(texts)}
    return np.array([caps[text] for text in texts], np.int64)


def _bit_lengths(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``int.bit_length`` of each: frexp's exponent, exact below 2**53."""
    exponents: npt.NDArray[np.int64] = np.frexp(values.astype(float))[1].astype(np.int64)
    return exponents
