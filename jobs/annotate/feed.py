"""feed: the rows that another attempt may mend, copied with just what their prompts need.

In: the states of all rows. Out: below ``_feed/attempt-k/`` one file per file of the input that has
such rows, under the same relative path (its folders may say column values), rows in order. Images
by URI stay URIs, made absolute; embedded ones are copied: only those of rows that failed are.
"""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.annotate.answer import Answer
from jobs.annotate.attempts import (
    ID_COLUMN,
    ROW_COLUMN,
    Attempt,
    Feed,
    feed_folder,
    row_states,
)
from jobs.annotate.config import TaskSection
from jobs.annotate.tables import (
    Stopped,
    batches,
    check_unchanged,
    each_file,
    reading,
    writing,
)
from pipeline import storage
from pipeline.hive import partition_values
from pipeline.plan import InputFile


@dataclass(frozen=True)
class Dataset:
    """The input, as all that follows needs it."""

    files: tuple[InputFile, ...]
    paths: Mapping[str, str]
    """Of each file, its path relative to the input's folder."""
    root: str
    """The folder that relative image URIs start from."""
    names: frozenset[str]
    """Columns that some file, or its path, has."""
    has_key: bool
    """Whether the rows' ids come from a column that must not be null."""


def relative_paths(uris: Sequence[str], roots: Sequence[str]) -> dict[str, str]:
    """Each file's path below the one root, or below the folder that all roots share."""
    common = roots[0].split("/")
    for root in roots[1:]:
        parts = root.split("/")
        same = [a == b for a, b in zip(common, parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    base = "/".join(common)
    below = {uri: uri.removeprefix(base).replace(":///", "/").replace("://", "/") for uri in uris}
    return {uri: path.lstrip("/") for uri, path in below.items()}


def write_feed(
    output_uri: str,
    number: int,
    dataset: Dataset,
    attempts: Sequence[Attempt],
    answer: Answer,
    task: TaskSection,
) -> Feed:
    """Write the files of attempt ``number``; without its marker, it does not count yet.

    Raises:
        StorageError: something cannot be read or written.
    """
    folder = feed_folder(output_uri, number)

    def one(file: InputFile, stopped: Stopped) -> int:
        again: list[tuple[int, str]] = []
        for state in row_states(attempts, file, answer):
            stopped.check()
            if state.decision.is_invalid and state.tries <= task.retries:
                again.append((state.row, state.custom_id))
        if again:
            _copy_rows(storage.join(folder, dataset.paths[file.uri]), dataset, file, again, task)
        return len(again)

    counts = dict(zip(dataset.files, each_file(dataset.files, one), strict=True))
    files = {dataset.paths[file.uri]: count for file, count in counts.items() if count}
    wanted = {storage.absolute(storage.join(folder, path)) for path in files}
    for entry in storage.list_files(folder):  # of a start that was cut short
        if entry.uri not in wanted:
            storage.delete(entry.uri)
    return Feed(number, f"attempt-{number}-{uuid.uuid4().hex[:8]}", files)


def _copy_rows(
    target: str,
    dataset: Dataset,
    file: InputFile,
    again: Sequence[tuple[int, str]],
    task: TaskSection,
) -> None:
    """Copy the rows of these numbers and ids."""
    rows = [row for row, _ in again]
    with reading(file) as parquet:
        present = parquet.schema_arrow
        columns = [name for name in task.columns if name in present.names]
        own = [present.field(name).with_nullable(True) for name in columns]
        path = dataset.paths[file.uri]
        told = {*present.names, *partition_values(path)}
        absent = [name for name in task.columns if name not in told]
        lacking = [pa.field(name, pa.null()) for name in absent]
        schema = pa.schema([(ID_COLUMN, pa.string()), (ROW_COLUMN, pa.int64()), *own, *lacking])
        with writing(target, schema) as writer:
            for first, table in _groups_with(parquet, columns, rows):
                low, high = (bisect_left(rows, each) for each in (first, first + table.num_rows))
                if low == high:
                    continue
                places = [row - first for row in rows[low:high]]
                ids = [
                    custom_id if dataset.has_key else f"{path}:{row}"
                    for row, custom_id in again[low:high]
                ]
                arrays = [
                    _taken(table.column(field.name), places, dataset.root if is_image else None)
                    for field in own
                    for is_image in (field.name in task.images,)
                ]
                nulls = [pa.nulls(len(places)) for _ in lacking]
                writer.write(pa.table([ids, rows[low:high], *arrays, *nulls], schema=schema))
            check_unchanged(file)


def _groups_with(
    parquet: pq.ParquetFile, columns: Sequence[str], rows: Sequence[int]
) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, rows) of the row groups that hold one of ``rows``."""
    metadata = parquet.metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    for group, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
        first = end - size
        if bisect_left(rows, first) == bisect_left(rows, end):
            continue
        for table in batches(parquet, columns, [group]):
            yield first, table
            first += table.num_rows


def _taken(
    column: pa.ChunkedArray, places: Sequence[int], root: str | None
) -> pa.Array | pa.ChunkedArray:
    """Some values of a column; of images (``root``) with absolute URIs: the feed is elsewhere."""
    if root is None and "view" not in str(column.type):  # Arrow takes nothing from views
        return column.take(pa.array(places, pa.int64()))
    values = [column[place].as_py() for place in places]
    images = values if root is None else [_absolute(value, root) for value in values]
    return pa.array(images, column.type)


def _absolute(image: Any, root: str) -> Any:
    if isinstance(image, list):
        return [_absolute(each, root) for each in image]
    if isinstance(image, Mapping) and not image.get("bytes"):
        return {**image, "path": _absolute(image.get("path"), root)}
    if isinstance(image, str) and image and "://" not in image and not image.startswith("/"):
        return storage.join(root, image)
    return image
