"""commit: one shard's records -> one Parquet object, whole, under a name the plan decides.

In: a part's table and its shard. Out: the object ``data/part-<shard>.parquet`` and its
``PartStats``, which also stand in the object's footer, so that a listing is all a resume needs.
A part is created, never replaced: of two attempts at a shard the first one counts, and a late one,
of a node that was given up or a driver that was relieved, is dropped. Only a part of another run
(``run`` in its stats) gives way.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import AccountingError, StorageError
from pipeline.plan import Plan, Shard
from pipeline.records import Failure, Outcome, SampleKey, Status, part_table, read_records

log = logging.getLogger(__name__)

_STATS_KEY = b"maverick.part"
_FOOTER_THREADS = 16
_PART_NAME = re.compile(r"part-(\d{6}|[1-9]\d{6,})\.parquet", re.ASCII)


@dataclass(frozen=True, slots=True)
class PartStats:
    """What one committed part holds: enough for totals, progress and the report."""

    shard: int
    rows: dict[str, int]
    """Input rows by how they ended; a row with several samples errs if one of them does."""
    records: int
    tokens: dict[str, int]
    """prompt, completion, cached, image: summed over records."""
    errors: dict[str, int] = field(default_factory=dict)
    """Records by error code."""
    finish_reasons: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    """Completions by length: key k counts those of [2**(k-1), 2**k) tokens, key 0 empty ones."""
    seconds: float = 0.0
    """From the shard's arrival at its replica to its commit."""
    run: str = ""
    """Id of the run it belongs to."""
    taken_over: int = 0
    """Rows that the attempt that committed the part did not make: it found them journaled, or they
    expired."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU seconds by step (see ``cpu``): of its own block until it was prepared, and of its replica
    since the part before."""

    def to_json(self) -> str:
        """As stored in the part's footer."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartStats:
        """The inverse of ``to_json``."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a run's records go, and what they say of the run; picklable."""

    output_uri: str
    run_id: str
    model_name: str


def part_uri(output_uri: str, shard: int) -> str:
    """Where the part of ``shard`` goes."""
    return storage.join(output_uri, "data", f"part-{shard:06d}.parquet")


def summarize(
    shard: int,
    outcomes: Sequence[Outcome],
    seconds: float,
    run_id: str,
    taken_over: int = 0,
    cpu_s: Mapping[str, float] | None = None,
) -> PartStats:
    """The stats of a part that holds ``outcomes``."""
    completed = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
    codes = [str(outcome.code) for outcome in outcomes if outcome.code is not None]
    rows = _count_rows(outcomes)
    return PartStats(
        shard=shard,
        rows=rows,
        records=len(outcomes),
        tokens={
            "prompt": sum(outcome.prompt_tokens for outcome in outcomes),
            "completion": sum(outcome.completion_tokens for outcome in completed),
            "cached": sum(outcome.cached_tokens for outcome in completed),
            "image": sum(outcome.image_tokens for outcome in outcomes),
        },
        errors=dict(Counter(codes)),
        finish_reasons=dict(Counter(outcome.finish_reason for outcome in completed)),
        lengths=dict(Counter(str(o.completion_tokens.bit_length()) for o in completed)),
        seconds=round(seconds, 3),
        run=run_id,
        taken_over=taken_over,
        cpu_s={step: round(spent, 6) for step, spent in (cpu_s or {}).items()},
    )


def _count_rows(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Input rows by status: errored if a sample is, else expired if a sample is."""
    errored = {o.input_row for o in outcomes if o.status is Status.ERRORED}
    expired = {o.input_row for o in outcomes if o.status is Status.EXPIRED} - errored
    succeeded = {o.input_row for o in outcomes} - errored - expired
    return {
        str(Status.SUCCEEDED): len(succeeded),
        str(Status.ERRORED): len(errored),
        str(Status.EXPIRED): len(expired),
    }


def commit_part(output_uri: str, table: pa.Table, shard: Shard, stats: PartStats) -> PartStats:
    """Write the part as one whole object, unless another attempt was first.

    Returns:
        The stats of the part that is there now: ``stats``, or those of the earlier attempt.

    Raises:
        AccountingError: the table does not hold each row of the shard.
        StorageError: the object could not be written and confirmed.
    """
    _check_whole(table, shard)
    metadata = {**(table.schema.metadata or {}), _STATS_KEY: stats.to_json().encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    uri = part_uri(output_uri, shard.index)
    if storage.create_bytes(uri, sink.getvalue()):
        return stats
    earlier = _read_stats(uri)
    if earlier.run == stats.run:
        log.info("shard %d was committed by another attempt; this one is dropped", shard.index)
        return earlier
    log.warning("%s is of another run (%s) and is replaced", uri, earlier.run)
    storage.put_bytes(uri, sink.getvalue())
    return stats


def committed_stats(to: Destination, shard: Shard) -> PartStats | None:
    """The stats of the shard's part, if this run has committed it.

    Raises:
        StorageError: the part is there and cannot be read.
    """
    try:
        stats = _read_stats(part_uri(to.output_uri, shard.index))
    except FileNotFoundError:
        return None
    return stats if stats.run == to.run_id else None


def commit_outcomes(
    to: Destination,
    shard: Shard,
    outcomes: Sequence[Outcome],
    carried: pa.Table,
    *,
    seconds: float = 0.0,
    known: Collection[SampleKey] = (),
    cpu_s: Mapping[str, float] | None = None,
) -> PartStats:
    """Commit the outcomes of one whole shard, with its carried columns in input order.

    ``known`` are those of the outcomes that the journal had; ``cpu_s`` goes into the stats.

    Raises:
        AccountingError, StorageError: as ``commit_part``.
    """
    expired = {outcome.key for outcome in outcomes if outcome.status is Status.EXPIRED}
    taken_over = len({row for row, _ in expired.union(known)})
    stats = summarize(shard.index, outcomes, seconds, to.run_id, taken_over, cpu_s)
    table = part_table(shard, outcomes, carried, model=to.model_name)
    return commit_part(to.output_uri, table, shard, stats)


def _check_whole(table: pa.Table, shard: Shard) -> None:
    expected = set(range(shard.first_row, shard.first_row + shard.rows))
    rows = table.column("input_row").to_pylist()
    present = set(rows)
    keys = set(zip(rows, table.column("sample_index").to_pylist(), strict=True))
    if len(keys) != len(rows):
        raise AccountingError(f"shard {shard.index} of {shard.uri}: a sample has two records")
    if present != expected:
        raise AccountingError(
            f"shard {shard.index} of {shard.uri}: {len(expected - present)} rows have no record "
            f"and {len(present - expected)} records no row; nothing was written"
        )


def part_number(uri: str) -> int | None:
    """The shard whose part has this name; None if no part is called so."""
    match = _PART_NAME.fullmatch(storage.name(uri))
    return int(match[1]) if match else None


def committed_shards(output_uri: str, plan: Plan) -> set[int]:
    """Shards whose part is in the output folder, by listing it once.

    Raises:
        StorageError: the folder cannot be listed, or holds a part that no shard of the plan has.
    """
    folder = storage.join(output_uri, "data")
    shards: set[int] = set()
    for entry in storage.list_files(folder, suffixes=(".parquet",)):
        shard = part_number(entry.uri)
        if shard is None or shard >= len(plan.shards):
            raise StorageError(f"{entry.uri} is no part of this run; move it away")
        shards.add(shard)
    return shards


def read_part(output_uri: str, shard: int) -> list[Outcome]:
    """The records of a committed part.

    Raises:
        FileNotFoundError: it is gone.
        StorageError: it cannot be read, or is damaged.
    """
    uri = part_uri(output_uri, shard)
    content = storage.read_bytes(uri)
    try:
        return read_records(pq.read_table(pa.BufferReader(content)))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:  # OSError: its pages
        raise StorageError(_damaged(uri, error)) from None


def read_stats(output_uri: str, shards: Iterable[int]) -> list[PartStats]:
    """The stats of committed parts, from their footers, in parallel.

    Raises:
        StorageError: a part is not readable, or was not written by this program.
    """
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(lambda shard: _read_stats(part_uri(output_uri, shard)), shards))


def _read_stats(uri: str) -> PartStats:
    with storage.open_input(uri) as handle:
        metadata = _read_metadata(uri, handle)
    if _STATS_KEY not in metadata:
        raise StorageError(f"{uri} was not written by this program; move it away")
    try:
        return PartStats.from_json(metadata[_STATS_KEY])
    except (TypeError, ValueError) as error:
        raise StorageError(_damaged(uri, error)) from None


def _read_metadata(uri: str, handle: IO[bytes]) -> dict[bytes, Any]:
    try:
        return pq.read_metadata(handle).metadata or {}
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the store's; pyarrow's own, of a footer it cannot parse, has no number
        raise StorageError(_damaged(uri, error)) from None


def _damaged(uri: str, fault: Exception) -> str:
    return (
        f"{uri} is damaged ({fault}); delete it and run the command again, which makes its rows "
        "again"
    )
