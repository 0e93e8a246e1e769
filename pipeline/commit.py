"""commit: one shard's records -> one Parquet object, whole, under a name the plan decides.

In: a part's table and its shard. Out: the object ``data/part-<shard>.parquet`` and its
``PartStats``, which also stand in the object's footer, so that a listing is all a resume needs.
Writing a part twice replaces it with the same rows: idempotent.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import AccountingError, StorageError
from pipeline.plan import Plan, Shard
from pipeline.records import Failure, Outcome, Status

_STATS_KEY = b"maverick.part"
_FOOTER_THREADS = 16


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

    def to_json(self) -> str:
        """As stored in the part's footer."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartStats:
        """The inverse of ``to_json``."""
        return cls(**json.loads(text))


def part_uri(output_uri: str, shard: int) -> str:
    """Where the part of ``shard`` goes."""
    return storage.join(output_uri, "data", f"part-{shard:06d}.parquet")


def summarize(shard: int, outcomes: Sequence[Outcome], seconds: float) -> PartStats:
    """The stats of a part that holds ``outcomes``."""
    completed = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    all_rows = {outcome.input_row for outcome in outcomes}
    errored_rows = {failure.input_row for failure in failed}
    return PartStats(
        shard=shard,
        rows={
            Status.SUCCEEDED: len(all_rows) - len(errored_rows),
            Status.ERRORED: len(errored_rows),
        },
        records=len(outcomes),
        tokens={
            "prompt": sum(outcome.prompt_tokens for outcome in outcomes),
            "completion": sum(outcome.completion_tokens for outcome in completed),
            "cached": sum(outcome.cached_tokens for outcome in completed),
            "image": sum(outcome.image_tokens for outcome in outcomes),
        },
        errors=dict(Counter(str(failure.code) for failure in failed)),
        finish_reasons=dict(Counter(outcome.finish_reason for outcome in completed)),
        lengths=dict(Counter(str(o.completion_tokens.bit_length()) for o in completed)),
        seconds=round(seconds, 3),
    )


def commit_part(output_uri: str, table: pa.Table, shard: Shard, stats: PartStats) -> None:
    """Write the part as one whole object.

    Raises:
        AccountingError: the table does not hold each row of the shard.
        StorageError: the object could not be written and confirmed.
    """
    expected = set(range(shard.first_row, shard.first_row + shard.rows))
    keys = table.select(["input_row", "sample_index"]).to_pylist()
    present = {key["input_row"] for key in keys}
    if len({(key["input_row"], key["sample_index"]) for key in keys}) != len(keys):
        raise AccountingError(f"shard {shard.index} of {shard.uri}: a sample has two records")
    if present != expected:
        raise AccountingError(
            f"shard {shard.index} of {shard.uri}: {len(expected - present)} rows have no record "
            f"and {len(present - expected)} records no row; nothing was written"
        )
    metadata = {**(table.schema.metadata or {}), _STATS_KEY: stats.to_json().encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    storage.put_bytes(part_uri(output_uri, shard.index), sink.getvalue())


def committed_shards(output_uri: str, plan: Plan) -> set[int]:
    """Shards whose part is in the output folder, by listing it once.

    Raises:
        StorageError: the folder cannot be listed, or holds a part that no shard of the plan has.
    """
    found = {
        storage.name(entry.uri)
        for entry in storage.list_files(storage.join(output_uri, "data"), suffixes=(".parquet",))
    }
    names = {storage.name(part_uri(output_uri, shard.index)): shard.index for shard in plan.shards}
    strange = sorted(found - set(names))
    if strange:
        raise StorageError(
            f"{storage.join(output_uri, 'data', strange[0])} is no part of this run; move it away"
        )
    return {names[name] for name in found}


def read_stats(output_uri: str, shards: Iterable[int]) -> list[PartStats]:
    """The stats of committed parts, from their footers, in parallel.

    Raises:
        StorageError: a part is not readable, or was not written by this program.
    """
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(lambda shard: _read_stats(part_uri(output_uri, shard)), shards))


def _read_stats(uri: str) -> PartStats:
    with storage.open_input(uri) as handle:
        metadata: dict[bytes, Any] = pq.read_metadata(handle).metadata or {}
    if _STATS_KEY not in metadata:
        raise StorageError(f"{uri} was not written by this program; move it away")
    return PartStats.from_json(metadata[_STATS_KEY])
