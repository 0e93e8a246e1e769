"""The typed records that travel between steps, and their Arrow forms.

    read -> prepare      input block: shard, input_row, first_use, row (a struct of the columns)
    prepare -> generate  prepared block: a Prepared or a Failure per input row, carried columns
    generate -> commit   part: one row per record, OUTPUT_SCHEMA, then the carried columns
    generate -> journal  records alone: one row per record, OUTPUT_SCHEMA

Every block holds exactly one shard. Conversions are lossless and need no schema inference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from itertools import count, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import logprobs
from pipeline.arrow_types import conformed, large_type
from pipeline.errors import ErrorCode, RowError
from pipeline.plan import FirstUse, Shard
from pipeline.redact import redacted_text
from pipeline.sampling import Sampling

_MAX_MESSAGE = 4_000  # characters
SampleKey = tuple[int, int]
"""(input_row, sample_index)"""


class Status(StrEnum):
    """How a row ended (contract)."""

    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row that is ready for an engine."""

    input_row: int
    custom_id: str
    token_ids: Sequence[int]
    """Prompt tokens with one image token per image; the engine expands those. Of a block a view:
    as Python's integers they would take ten times the memory."""
    images: tuple[bytes, ...]
    """Encoded images, in the order of the prompt's image tokens."""
    image_tokens: int
    """Prompt tokens the images take, markers included."""
    prompt_tokens: int
    """Prompt tokens after expansion, as the engine will count them."""
    sampling: Sampling
    seeds: tuple[int, ...]
    """One per sample."""
    digest: str | None = None
    """Of ``token_ids`` and ``images`` (see ``digests``)."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A row, or one sample of it, that ended without a completion."""

    input_row: int
    custom_id: str
    code: ErrorCode
    message: str
    seed: int
    sample_index: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    status: Status = Status.ERRORED
    """``errored`` or ``expired``."""
    sampling: str | None = None
    """The resolved request parameters, as JSON; None if it did not get that far."""
    finished_at: float | None = None
    """Seconds since 1970, to the millisecond; None: not known, or expired."""

    @property
    def key(self) -> SampleKey:
        """What names the record within its file."""
        return self.input_row, self.sample_index


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool that the model asks for."""

    id: str
    name: str
    arguments: str
    """JSON; an object, unless the model wrote something else."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample of a row, as the engine returned it: succeeded, unless it has a ``code``."""

    input_row: int
    custom_id: str
    sample_index: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int
    seed: int
    latency_s: float
    attempts: int = 1
    logprobs: pa.StructArray | None = None
    """One ``logprobs.TOKEN`` per token; None: not asked for."""
    prompt_logprobs: pa.StructArray | None = None
    """One ``logprobs.PROMPT_TOKEN`` per token of the prompt; None: not asked for."""
    tool_calls: tuple[ToolCall, ...] = ()
    sampling: str | None = None
    """The resolved request parameters, as JSON."""
    code: ErrorCode | None = None
    """What is wrong with the text, which is kept."""
    message: str | None = None
    finished_at: float | None = None
    """Seconds since 1970, to the millisecond; None: not known."""
    prompt_digest: str | None = None
    """Of the prompt's tokens and images (see ``digests``)."""
    completion_digest: str | None = None
    """Of the completion's tokens; None: the engine does not tell them."""
    stop_reason: str | None = None
    """The stop string, or the id of the stop token, that ended it."""

    @property
    def status(self) -> Status:
        """``succeeded`` or ``errored``."""
        return Status.SUCCEEDED if self.code is None else Status.ERRORED

    @property
    def key(self) -> SampleKey:
        """What names the record within its file."""
        return self.input_row, self.sample_index


Outcome = Completion | Failure

_TOOL_CALLS_TYPE = pa.list_(
    pa.struct([("id", pa.string()), ("name", pa.string()), ("arguments", pa.string())])
)

OUTPUT_SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("sample_index", pa.int32()),
        ("status", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("total_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("image_tokens", pa.int64()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),
        ("latency_s", pa.float64()),
        ("input_file", pa.string()),
        ("input_row", pa.int64()),
        ("logprobs", pa.list_(logprobs.TOKEN)),
        ("tool_calls", _TOOL_CALLS_TYPE),
        ("sampling", pa.string()),
        ("finished_at", pa.timestamp("ms", tz="UTC")),
        ("prompt_digest", pa.string()),
        ("completion_digest", pa.string()),
        ("prompt_logprobs", pa.list_(logprobs.PROMPT_TOKEN)),
        ("stop_reason", pa.string()),
    ]
)

_SHARD_TYPE = pa.struct(
    [("index", pa.int32()), ("uri", pa.string()), ("first_row", pa.int64()), ("rows", pa.int64())]
)
_FIRST_USE_TYPE = pa.struct([("uri", pa.string()), ("row", pa.int64())])
_PREPARED_FIELDS = [
    ("shard", _SHARD_TYPE),
    ("input_row", pa.int64()),
    ("custom_id", pa.string()),
    ("token_ids", pa.large_list(pa.int32())),
    ("images", pa.large_list(pa.int32())),  # places in the block's ``image_data``
    ("image_data", pa.large_list(pa.large_binary())),  # those that no earlier row has
    ("image_tokens", pa.int64()),
    ("prompt_tokens", pa.int64()),
    ("sampling", pa.string()),
    ("seeds", pa.list_(pa.int64())),
    ("digest", pa.string()),
    ("error_code", pa.string()),
    ("error_message", pa.string()),
]


def carried_names(names: Sequence[str]) -> dict[str, str]:
    """Input column -> output column; a clash with ours gets the prefix ``input_`` (contract)."""
    taken = set(OUTPUT_SCHEMA.names)
    renamed: dict[str, str] = {}
    for column in names:
        output = column
        while output.casefold() in taken:  # DuckDB and others ignore case
            output = f"input_{output}"
        taken.add(output.casefold())
        renamed[column] = output
    return renamed


def input_block(
    shard: Shard, columns: pa.Table, first_uses: Mapping[int, FirstUse] | None = None
) -> pa.Table:
    """One shard's input rows; the user's columns sit in a struct, where no name can clash.

    ``first_uses`` has, for each row whose ``custom_id`` an earlier row used, that earlier row.
    """
    rows = columns.num_rows
    numbers = range(shard.first_row, shard.first_row + rows)
    earlier = [(first_uses or {}).get(number) for number in numbers]
    return pa.table(
        {
            "shard": pa.array([asdict(shard)] * rows, _SHARD_TYPE),
            "input_row": pa.array(numbers, pa.int64()),
            "first_use": pa.array([use and asdict(use) for use in earlier], _FIRST_USE_TYPE),
            "row": _to_struct(columns, rows),
        }
    )


def block_shard(block: pa.Table) -> Shard:
    """The shard a block belongs to."""
    return Shard(**block.column("shard")[0].as_py())


def prepared_block(
    shard: Shard, items: Sequence[Prepared | Failure], carried: pa.Table
) -> pa.Table:
    """Prepared rows of one shard, in input order, with the columns to carry beside them."""
    ready = [item if isinstance(item, Prepared) else None for item in items]
    failed = [item if isinstance(item, Failure) else None for item in items]
    places: dict[bytes, int] = {}
    image_data: list[object] = [_new_images(item, places) for item in ready]
    values: dict[str, list[object]] = {
        "shard": [asdict(shard)] * len(items),
        "input_row": [item.input_row for item in items],
        "custom_id": [item.custom_id for item in items],
        "token_ids": [item and item.token_ids for item in ready],
        "images": [item and [places[data] for data in item.images] for item in ready],
        "image_data": image_data,
        "image_tokens": [item.image_tokens for item in items],
        "prompt_tokens": [item.prompt_tokens for item in items],
        "sampling": [
            item.sampling.as_json if isinstance(item, Prepared) else item.sampling for item in items
        ],
        "seeds": [item.seeds if isinstance(item, Prepared) else (item.seed,) for item in items],
        "digest": [item and item.digest for item in ready],
        "error_code": [item and str(item.code) for item in failed],
        "error_message": [item and told(item.message) for item in failed],
    }
    columns = {name: pa.array(values[name], type_) for name, type_ in _PREPARED_FIELDS}
    return pa.table({**columns, "carried": _to_struct(carried, len(items))})


def _new_images(item: Prepared | None, places: dict[bytes, int]) -> list[bytes]:
    """Images that have no place in the block yet; they get one in ``places``."""
    new = [data for data in dict.fromkeys(item.images if item else ()) if data not in places]
    places.update(zip(new, count(len(places)), strict=False))
    return new


def read_prepared(block: pa.Table) -> list[Prepared | Failure]:
    """The inverse of ``prepared_block`` (without the carried columns)."""
    apart = ("shard", "token_ids", "image_data")
    rows = block.select([name for name, _ in _PREPARED_FIELDS if name not in apart]).to_pylist()
    images = _one_array(block.column("image_data")).flatten().to_pylist()
    asked = {row["sampling"] for row in rows if row["error_code"] is None}
    sampling = {text: Sampling.model_validate_json(text) for text in asked}
    return [
        _prepared(row, token_ids, sampling[row["sampling"]], images)
        if row["error_code"] is None
        else _failure(row)
        for row, token_ids in zip(rows, _token_ids(block), strict=True)
    ]


def _token_ids(block: pa.Table) -> Iterator[memoryview]:
    """Each row's tokens where they lie in the block, of 4 bytes each."""
    lists = _one_array(block.column("token_ids"))
    flat = memoryview(lists.values.to_numpy())
    return (flat[start:end] for start, end in pairwise(lists.offsets.to_pylist()))


def samples_asked(
    items: Iterable[Prepared | Failure], known: Iterable[Outcome] = ()
) -> dict[int, int]:
    """The records that each row makes: its samples, or one if they are not known.

    A row that fails before its parameters are read does not tell its samples; what was ``known``
    of it before does.
    """
    asked: dict[int, int] = {}
    ready: set[int] = set()
    for item in items:
        if isinstance(item, Prepared):
            asked[item.input_row] = item.sampling.n
            ready.add(item.input_row)
        else:
            asked[item.input_row] = max(asked.get(item.input_row, 1), item.sample_index + 1)
    for outcome in known:
        if outcome.input_row not in ready:
            before = asked.get(outcome.input_row, 1)
            asked[outcome.input_row] = max(before, recorded_samples(outcome))
    return asked


def with_known(
    items: Sequence[Prepared | Failure], known: Mapping[SampleKey, Outcome]
) -> list[Prepared | Failure]:
    """``items``, whose failures stand for just the samples that are not known.

    A row may fail that was being generated before: what it has is kept, the rest fails.
    """
    asked = samples_asked(items, known.values())
    begun = {row for row, _ in known}
    return [
        one
        for item in items
        for one in (
            [
                replace(item, sample_index=index)
                for index in range(asked[item.input_row])
                if (item.input_row, index) not in known
            ]
            if isinstance(item, Failure) and item.input_row in begun
            else [item]
        )
    ]


def recorded_samples(outcome: Outcome) -> int:
    """How many samples its row asked for when the record was made; 1 if it does not say."""
    return _samples_in(outcome.sampling) if outcome.sampling else 1


@lru_cache(maxsize=256)
def _samples_in(sampling: str) -> int:
    return int(json.loads(sampling).get("n", 1))


def count_images(block: pa.Table) -> int:
    """Images of a prepared block's rows; rows that failed have none."""
    return int(pc.sum(pc.list_value_length(block.column("images"))).as_py() or 0)


def carried_columns(block: pa.Table) -> pa.Table:
    """The carried columns of a prepared block, as a table in input order."""
    return _from_struct(block.column("carried"))


def read_first_uses(block: pa.Table) -> list[FirstUse | None]:
    """For each row of an input block, the row that used its ``custom_id`` first, if one did."""
    return [use and FirstUse(**use) for use in block.column("first_use").to_pylist()]


def input_columns(block: pa.Table) -> pa.Table:
    """The input's columns of an input block, as a table in input order."""
    return _from_struct(block.column("row"))


def _from_struct(chunked: pa.ChunkedArray) -> pa.Table:
    struct = _one_array(chunked)
    fields = list(struct.type)
    columns = [struct.field(number) for number in range(len(fields))]
    return pa.table(columns, schema=pa.schema(fields))


def part_table(
    shard: Shard, outcomes: Iterable[Outcome], carried: pa.Table, *, model: str
) -> pa.Table:
    """All records of one shard in order of (row, sample), then the carried columns."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.key)
    table = record_table(shard, ordered, model=model)
    positions = pa.array([outcome.input_row - shard.first_row for outcome in ordered], pa.int64())
    taken = carried.take(positions) if carried.num_columns else carried
    for source, output in carried_names(carried.column_names).items():
        field = taken.schema.field(source).with_name(output)
        table = table.append_column(field, taken.column(source))
    return table


def record_table(shard: Shard, outcomes: Iterable[Outcome], *, model: str) -> pa.Table:
    """Records of one shard in the order given: ``OUTPUT_SCHEMA``, no carried columns."""
    ordered = list(outcomes)
    records = [_record(outcome, model, shard.uri) for outcome in ordered]
    table = pa.Table.from_pylist(records, schema=_PLAIN_SCHEMA)
    done = [outcome if isinstance(outcome, Completion) else None for outcome in ordered]
    made = {
        "logprobs": logprobs.to_column([one and one.logprobs for one in done], logprobs.TOKEN),
        "prompt_logprobs": logprobs.to_column(
            [one and one.prompt_logprobs for one in done], logprobs.PROMPT_TOKEN
        ),
    }
    columns = [made[name] if name in made else table.column(name) for name in OUTPUT_SCHEMA.names]
    return pa.table(columns, schema=OUTPUT_SCHEMA)


def read_records(table: pa.Table) -> list[Outcome]:
    """The inverse of ``record_table``; columns beyond ``OUTPUT_SCHEMA`` are left out."""
    present = set(table.column_names)
    names = [name for name in OUTPUT_SCHEMA.names if name in present or name not in ADDED_LATER]
    records = table.select([name for name in names if name not in _AS_ARROW]).to_pylist()
    for name in _AS_ARROW:
        if name in names:
            arrays = logprobs.from_column(table.column(name))
            for record, array in zip(records, arrays, strict=True):
                record[name] = array
    return [_outcome(record) for record in records]


def _prepared(
    row: dict[str, object], token_ids: Sequence[int], sampling: Sampling, images: Sequence[bytes]
) -> Prepared:
    return Prepared(
        input_row=row["input_row"],  # type: ignore[arg-type]
        custom_id=row["custom_id"],  # type: ignore[arg-type]
        token_ids=token_ids,
        images=tuple(images[place] for place in row["images"]),  # type: ignore[attr-defined]
        image_tokens=row["image_tokens"],  # type: ignore[arg-type]
        prompt_tokens=row["prompt_tokens"],  # type: ignore[arg-type]
        sampling=sampling,
        seeds=tuple(row["seeds"]),  # type: ignore[arg-type]
        digest=row["digest"],  # type: ignore[arg-type]
    )


def _failure(row: dict[str, object]) -> Failure:
    return Failure(
        input_row=row["input_row"],  # type: ignore[arg-type]
        custom_id=row["custom_id"],  # type: ignore[arg-type]
        code=ErrorCode(row["error_code"]),  # type: ignore[arg-type]
        message=row["error_message"],  # type: ignore[arg-type]
        seed=row["seeds"][0],  # type: ignore[index]
        prompt_tokens=row["prompt_tokens"],  # type: ignore[arg-type]
        image_tokens=row["image_tokens"],  # type: ignore[arg-type]
        sampling=row["sampling"],  # type: ignore[arg-type]
    )


def _record(outcome: Outcome, model: str, input_file: str) -> dict[str, object]:
    common: dict[str, object] = {
        "custom_id": outcome.custom_id,
        "sample_index": outcome.sample_index,
        "status": outcome.status,
        "prompt_tokens": outcome.prompt_tokens,
        "image_tokens": outcome.image_tokens,
        "seed": outcome.seed,
        "model": model,
        "attempts": outcome.attempts,
        "input_file": input_file,
        "input_row": outcome.input_row,
        "sampling": outcome.sampling,
        "finished_at": outcome.finished_at and round(1000 * outcome.finished_at),
    }
    if isinstance(outcome, Failure):
        return {
            **common,
            "completion_tokens": 0,
            "total_tokens": outcome.prompt_tokens,
            "cached_tokens": 0,
            "error_code": outcome.code,
            "error_message": told(outcome.message),
        }
    return {
        **common,
        "text": outcome.text,
        "finish_reason": outcome.finish_reason,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "cached_tokens": outcome.cached_tokens,
        "latency_s": outcome.latency_s,
        "tool_calls": [asdict(call) for call in outcome.tool_calls] or None,
        "error_code": outcome.code,
        "error_message": outcome.message and told(outcome.message),
        "prompt_digest": outcome.prompt_digest,
        "completion_digest": outcome.completion_digest,
        "stop_reason": outcome.stop_reason,
    }


ADDED_LATER = frozenset(
    {"finished_at", "prompt_digest", "completion_digest", "prompt_logprobs", "stop_reason"}
)
"""Columns that records of runs that began earlier may lack."""
_AS_ARROW = ("logprobs", "prompt_logprobs")
"""Columns that never are Python's objects: those would be the bulk of a record."""
_PLAIN_SCHEMA = pa.schema([field for field in OUTPUT_SCHEMA if field.name not in _AS_ARROW])
_SHARED_FIELDS = (
    *("input_row", "custom_id", "sample_index", "seed", "attempts", "prompt_tokens"),
    *("image_tokens", "sampling"),
)
_COMPLETION_FIELDS = ("text", "finish_reason", "completion_tokens", "cached_tokens", "latency_s")


def _outcome(record: Mapping[str, Any]) -> Outcome:
    shared = {name: record[name] for name in _SHARED_FIELDS}
    finished: datetime | None = record.get("finished_at")
    shared["finished_at"] = finished and finished.timestamp()
    code = record["error_code"] and ErrorCode(record["error_code"])
    message = record["error_message"]
    if record["finish_reason"] is None:
        return Failure(**shared, code=code, message=message, status=Status(record["status"]))
    return Completion(
        **shared,
        **{name: record[name] for name in _COMPLETION_FIELDS},
        prompt_digest=record.get("prompt_digest"),
        completion_digest=record.get("completion_digest"),
        stop_reason=record.get("stop_reason"),
        logprobs=record["logprobs"],
        prompt_logprobs=record.get("prompt_logprobs"),
        tool_calls=tuple(ToolCall(**call) for call in record["tool_calls"] or ()),
        code=code,
        message=message,
    )


def engine_failure(item: Prepared, sample_index: int, error: RowError, attempts: int) -> Failure:
    """The failure of a sample that was ready for an engine, as of now."""
    return Failure(
        input_row=item.input_row,
        custom_id=item.custom_id,
        code=error.code,
        message=error.message,
        seed=item.seeds[sample_index],
        sample_index=sample_index,
        attempts=attempts,
        prompt_tokens=item.prompt_tokens,
        image_tokens=item.image_tokens,
        sampling=item.sampling.as_json,
        finished_at=round(time.time(), 3),
    )


def well_formed(text: str) -> str:
    """Put U+FFFD in the place of lone surrogates, which UTF-8 and so Parquet cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def told(message: str, limit: int = _MAX_MESSAGE) -> str:
    """Text that quotes what users wrote, lone surrogates and secrets included, as it may be shown:
    at most ``limit`` characters."""
    shown = message[: 2 * limit].encode("utf-8", "backslashreplace").decode("utf-8")
    return redacted_text(shown)[:limit]  # in this order: a cut secret looks like none


def _to_struct(table: pa.Table, rows: int) -> pa.Array:
    """The columns of ``table`` as one; ``rows`` as a table without columns has no length."""
    if table.num_columns == 0:
        return pa.array([{}] * rows, pa.struct([]))
    columns = [_one_array(column) for column in table.columns]
    fields = [
        field.with_type(column.type) for field, column in zip(table.schema, columns, strict=True)
    ]
    return pa.StructArray.from_arrays(columns, fields=fields)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)  # combining would copy the images
    try:
        return column.combine_chunks()
    except pa.ArrowInvalid:  # more than 2 GiB of text or bytes
        return conformed(column, large_type(column.type)).combine_chunks()
