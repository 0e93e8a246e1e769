"""One row as the engine saw it: prompt, token ids, images, parameters, seeds, and what it got.

In: a ``custom_id``, or ``file:row``. Out: a document. The row goes through the run's own prepare
step once more, in this process; no engine is started. Of the parts only the id column is read, a
few at a time, until the id is found.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.settle import prepare_spec
from jobs.verify.choose import shards_of_rows
from jobs.verify.recorded import Recorded, input_change
from jobs.verify.replay import recorded_job
from pipeline import storage
from pipeline.commit import part_uri, read_stored_part
from pipeline.digests import digest_tokens
from pipeline.engine import VLLMEngine
from pipeline.errors import InputError, StorageError
from pipeline.images import image_size
from pipeline.model import PromptFormat, load_prompt_format, stop_token_ids
from pipeline.plan import Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.read import read_shard
from pipeline.records import Failure, Prepared, input_block, read_prepared
from pipeline.redact import redacted
from pipeline.sampling import Sampling
from pipeline.values import rows_of

_THREADS = 16  # latency: an id column is small and far away


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is."""

    shard: Shard
    row: int


def describe_row(recorded: Recorded, row_id: str) -> dict[str, Any]:
    """The row's request and records, for people and programs.

    Raises:
        InputError: no such row, or its input file changed since.
        StorageError: its part, or its input file, cannot be read.
        ConfigError: the model's small files are not on this machine.
    """
    place = find_row(recorded, row_id)
    spec = prepare_spec(recorded_job(recorded, VLLMEngine))
    item = _prepared(recorded, place, spec)
    records = _records(recorded, place)
    return {
        "custom_id": item.custom_id,
        "input_file": place.shard.uri,
        "input_row": place.row,
        "part": part_uri(recorded.run.uri, place.shard.index),
        "request": _request(item, load_prompt_format(spec.model), spec),
        "differs": _differences(item, records),
        "engine": redacted(dict(recorded.manifest["engine"])),
        "model": recorded.manifest["model"],
        "versions": recorded.manifest["versions"],
        "records": records,
    }


def find_row(recorded: Recorded, row_id: str) -> Place:
    """Where the row is: by ``file:row`` (a planned file's URI or name), else by ``custom_id``.

    Raises:
        InputError: no such row, or a file name that several files have.
        StorageError: a part cannot be read.
    """
    file, separator, number = row_id.rpartition(":")
    if separator and number.isdecimal():
        named = [
            planned
            for planned in recorded.run.plan.files
            if file in (planned.uri, storage.name(planned.uri))
        ]
        if len(named) > 1:
            raise InputError(f"--row {row_id}: {len(named)} files are called so; give the URI.")
        if named and int(number) >= named[0].rows:
            raise InputError(f"--row {row_id}: the file has {named[0].rows} rows, from 0.")
        if named:
            return _place_of(recorded.run.plan.shards, named[0].uri, int(number))
    return _find_id(recorded, row_id)


def _place_of(shards: Sequence[Shard], uri: str, row: int) -> Place:
    for shard in shards:
        if shard.uri == uri and shard.first_row <= row < shard.first_row + shard.rows:
            return Place(shard, row)
    raise AssertionError("a plan covers its files")


def _find_id(recorded: Recorded, custom_id: str) -> Place:
    run = recorded.run
    shards = [shard for shard in run.plan.shards if shard.index in run.done]
    found = threading.Event()
    look = partial(_row_of, run.uri, custom_id=custom_id, found=found)
    with _quick_pool() as pool:
        for shard, row in zip(shards, pool.map(look, shards), strict=True):
            if row is not None:
                found.set()
                return Place(shard, row)
    open_shards = f"; {len(run.pending)} shards have no part yet" if run.pending else ""
    raise InputError(
        f"--row {custom_id}: no record has this custom_id{open_shards}. A row can also be named as "
        f"{storage.name(run.plan.files[0].uri)}:0."
    )


@contextmanager
def _quick_pool() -> Iterator[ThreadPoolExecutor]:
    """Threads whose work that has not begun is dropped at the end."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _row_of(output_uri: str, shard: Shard, *, custom_id: str, found: threading.Event) -> int | None:
    """The first row of the shard's part with this id, by its two small columns."""
    if found.is_set():
        return None
    uri = part_uri(output_uri, shard.index)
    try:
        with storage.open_input(uri) as handle:
            file = pq.ParquetFile(handle)
            if not _may_hold(file.metadata, custom_id):
                return None
            table = file.read(columns=["custom_id", "input_row"])
    except (pa.ArrowException, FileNotFoundError) as error:
        raise StorageError(f"{uri} cannot be read: {error}; run the audit") from None
    rows = table.filter(pc.equal(table.column("custom_id"), custom_id)).column("input_row")
    return int(rows[0].as_py()) if len(rows) else None


def _may_hold(metadata: pq.FileMetaData, custom_id: str) -> bool:
    """Whether the footer's least and greatest id leave room for this one: ids that are sorted, as
    many are, need one part read."""
    column = metadata.schema.names.index("custom_id")
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_min_max:
            return True
        if statistics.min <= custom_id <= statistics.max:
            return True
    return False


def _prepared(recorded: Recorded, place: Place, spec: PrepareSpec) -> Prepared | Failure:
    run = recorded.run
    (shard,) = shards_of_rows(run.plan.shards, {place.shard.index: [place.row]})
    change = input_change(next(file for file in run.plan.files if file.uri == shard.uri))
    if change:
        raise InputError(f"{shard.uri}: {change}; the row cannot be shown as it was.")
    table = read_shard(shard, spec.columns)
    block = input_block(shard, table, run.duplicates.of(shard))
    (item,) = read_prepared(prepare_block(block, spec=spec))
    return item


def _records(recorded: Recorded, place: Place) -> list[dict[str, Any]]:
    """The row's records with all columns, as JSON knows them; none if it has no part yet."""
    if place.shard.index not in recorded.run.done:
        return []
    table = read_stored_part(recorded.run.uri, place.shard.index).table
    found = table.filter(pc.equal(table.column("input_row"), place.row))
    rows = rows_of(found, parsed=found.column_names)
    plain: list[dict[str, Any]] = json.loads(json.dumps(rows, default=str))
    return plain


def _request(item: Prepared | Failure, prompts: PromptFormat, spec: PrepareSpec) -> dict[str, Any]:
    if isinstance(item, Failure):
        return {"error_code": str(item.code), "error_message": item.message}
    return {
        "prompt": prompts.tokenizer.decode(list(item.token_ids)),
        "prompt_tokens": item.prompt_tokens,
        "image_tokens": item.image_tokens,
        "prompt_digest": digest_tokens(item.token_ids, item.images),
        "images": [_image(data, prompts, spec) for data in item.images],
        "sampling": json.loads(item.sampling.as_json),
        "seeds": list(item.seeds),
        "stop_token_ids": list(stop_token_ids(spec.model)),
        "token_ids": list(item.token_ids),
    }


def _image(data: bytes, prompts: PromptFormat, spec: PrepareSpec) -> dict[str, Any]:
    width, height = image_size(data, max_pixels=spec.max_image_pixels)
    tokens = prompts.images.tiling.tokens(width, height) if prompts.images else 0
    return {
        "bytes": len(data),
        "width": width,
        "height": height,
        "tokens": tokens,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _differences(item: Prepared | Failure, records: Sequence[dict[str, Any]]) -> list[str]:
    """Where today's request is not the recorded one."""
    found = []
    for record in records:
        name = f"sample {record['sample_index']}"
        if isinstance(item, Failure):
            if record["error_code"] != item.code:
                found.append(f"{name}: today the row ends as {item.code}")
            continue
        digest = record.get("prompt_digest")
        if digest is not None and digest != item.digest:
            found.append(f"{name}: another prompt: tokens or images")
        recorded = record["sampling"]  # an earlier version's lacks parameters of today
        if recorded and Sampling.model_validate_json(recorded) != item.sampling:
            found.append(f"{name}: other parameters")
        if record["sample_index"] < len(item.seeds) and (
            record["seed"] != item.seeds[record["sample_index"]]
        ):
            found.append(f"{name}: another seed")
    return found
