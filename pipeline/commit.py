"""commit: one shard's records -> one Parquet object, whole, under a name the plan decides.

In: a part's table and its shard. Out: the object ``data/part-<shard>.parquet`` and its
``PartStats``, which also stand in the object's footer, so that a listing is all a resume needs.
A part is created, never replaced: of two attempts at a shard the first one counts, and a late one,
of a node that was given up or a driver that was relieved, is dropped. Two kinds give way, to a
writer of the run that ``run.json`` names, and only as long as they are as it found them: a part of
another run (``run`` in its stats), and one with records that were retried since (``epoch``).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import AccountingError, LeaseLostError, StorageError
from pipeline.experts import PackedLoad
from pipeline.histogram import latency_bucket, length_bucket
from pipeline.pace import Pace
from pipeline.parallel import mapped
from pipeline.plan import Plan, Shard
from pipeline.records import (
    Completion,
    Outcome,
    SampleKey,
    Status,
    part_table,
    read_records,
    recorded_samples,
    told,
)

log = logging.getLogger(__name__)

_STATS_KEY = b"maverick.part"
_DATA_KEY = "maverick.data.sha256"
_FOOTER_THREADS = 16
_TAIL_BYTES = 2**16
"""What is read first of a part's end: more than its footer has but for hundreds of columns."""
_FOOTER_END = 8
"""Bytes behind a Parquet footer: its length, and a magic number."""
_EXAMPLES_PER_CODE = 2
_EXAMPLE_ID = 120  # characters
_EXAMPLE_MESSAGE = 400  # characters
_TAKEOVERS = 5  # of one part: more than one needs another writer each time
_PART_NAME = re.compile(r"part-(\d{6}|[1-9]\d{6,})\.parquet", re.ASCII)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which replica made a part, and when it began to."""

    replica: str
    """The same for all processes that take this replica's place within a start."""
    process: str
    """This process alone."""
    node: str
    """The name of the machine it is on."""
    engine_restarts: int
    """Of this process until the commit."""
    start: float
    """When the driver's start began, in seconds since 1970, by the driver's clock."""
    opened: float
    """When the shard came to the replica, in seconds since 1970, by the replica's clock."""
    cold_start_s: float = 0.0
    """Seconds this process took from its beginning until its engine was up; 0: not recorded."""


@dataclass(frozen=True, slots=True)
class Example:
    """One record of an error code, to look at."""

    custom_id: str
    input_file: str
    input_row: int
    message: str


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
    images: int = 0
    """Of rows that were ready for an engine; hosted APIs charge by them."""
    latencies: dict[str, int] = field(default_factory=dict)
    """Completions by latency, as ``histogram.latency_bucket`` numbers them."""
    prompt_lengths: dict[str, int] = field(default_factory=dict)
    """Rows by the length of their prompt, as ``lengths``; those whose tokens were counted."""
    examples: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    """A few records of each error code, the first in input order."""
    pace: Pace = field(default_factory=Pace)
    """When its rows were finished; those taken over too, if their journal says."""
    attempt: Attempt | None = None
    """Which made it; None: no replica did, or an earlier version, as the fields before this."""
    made_tokens: int = 0
    """Completion tokens of the records that are not taken over."""
    committed_at: float = 0.0
    """Seconds since 1970; 0: an earlier version."""
    engine_tokens: dict[str, int] = field(default_factory=dict)
    """prompt, completion: of the requests that its replica's engine says it completed since the
    part before; empty if it said nothing."""
    replica: dict[str, str] = field(default_factory=dict)
    """Who made it: process (an id), hardware, engine (a fingerprint of model and arguments),
    version (the engine's); empty if no replica did."""
    experts: PackedLoad | None = None
    """Tokens by expert, of its replica's engine since the part before; None: it does not tell."""
    epoch: int = 0
    """Number of retries that its run had seen; see ``Destination``."""

    @property
    def generated_rows(self) -> int:
        """Rows that the attempt that committed the part made."""
        return sum(self.rows.values()) - self.taken_over

    def has_any(self, words: Collection[str]) -> bool:
        """Whether it holds a record with one of these statuses and error codes."""
        return any(self.rows.get(word, 0) or self.errors.get(word, 0) for word in words)

    def to_json(self) -> str:
        """As stored in the part's footer."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartStats:
        """The inverse of ``to_json``."""
        stored = json.loads(text, object_pairs_hook=_with_shared_keys)
        if "pace" in stored:
            stored["pace"] = Pace.from_json(stored["pace"])
        if stored.get("attempt"):
            stored["attempt"] = Attempt(**stored["attempt"])
        if stored.get("experts"):
            stored["experts"] = PackedLoad.from_json(stored["experts"])
        for code, examples in stored.get("examples", {}).items():
            stored["examples"][code] = tuple(Example(**example) for example in examples)
        return cls(**stored)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a run's records go, and what they say of the run; picklable."""

    output_uri: str
    run_id: str
    model_name: str
    retries: tuple[frozenset[str], ...] = ()
    """Statuses and error codes of each retry of the run so far."""
    unsigned_journals: bool = False
    """Whether journal entries without a run's id count: an earlier version began the run."""

    @property
    def epoch(self) -> int:
        """Number of retries so far. Journal entries and parts say which epoch they were made in."""
        return len(self.retries)

    def retried_since(self, epoch: int) -> frozenset[str]:
        """Statuses and error codes whose records of ``epoch`` do not count any more."""
        return frozenset[str]().union(*self.retries[epoch:])


def _with_shared_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are kept once for all parts: a driver holds the stats of each."""
    return {sys.intern(key): value for key, value in pairs}


def is_any(outcome: Outcome, words: Collection[str]) -> bool:
    """Whether the outcome has one of these statuses and error codes."""
    return outcome.status in words or outcome.code in words


def part_uri(output_uri: str, shard: int) -> str:
    """Where the part of ``shard`` goes."""
    return storage.join(output_uri, "data", f"part-{shard:06d}.parquet")


def summarize(
    shard: Shard,
    outcomes: Sequence[Outcome],
    seconds: float,
    run_id: str,
    known: Collection[SampleKey] = (),
    cpu_s: Mapping[str, float] | None = None,
    images: int = 0,
    attempt: Attempt | None = None,
    engine_tokens: Mapping[str, int] | None = None,
    replica: Mapping[str, str] | None = None,
    experts: PackedLoad | None = None,
) -> PartStats:
    """The stats of a part that holds ``outcomes``, those in ``known`` from the journal."""
    completed = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
    codes = [str(outcome.code) for outcome in outcomes if outcome.code is not None]
    expired = {outcome.key for outcome in outcomes if outcome.status is Status.EXPIRED}
    made = [outcome for outcome in completed if outcome.key not in known]
    return PartStats(
        shard=shard.index,
        rows=_count_rows(outcomes),
        records=len(outcomes),
        tokens={
            "prompt": sum(outcome.prompt_tokens for outcome in outcomes),
            "completion": sum(outcome.completion_tokens for outcome in completed),
            "cached": sum(outcome.cached_tokens for outcome in completed),
            "image": sum(outcome.image_tokens for outcome in outcomes),
        },
        errors=dict(Counter(codes)),
        finish_reasons=dict(Counter(outcome.finish_reason for outcome in completed)),
        lengths=_counted(length_bucket(o.completion_tokens) for o in completed),
        seconds=round(seconds, 3),
        run=run_id,
        taken_over=len({row for row, _ in expired.union(known)}),
        images=images,
        cpu_s={step: round(spent, 6) for step, spent in (cpu_s or {}).items()},
        latencies=_counted(latency_bucket(o.latency_s) for o in completed),
        prompt_lengths=_counted(
            length_bucket(o.prompt_tokens)
            for o in outcomes
            if o.sample_index == 0 and o.prompt_tokens
        ),
        examples=_examples(shard.uri, outcomes),
        pace=Pace.of(outcomes),
        attempt=attempt,
        made_tokens=sum(outcome.completion_tokens for outcome in made),
        committed_at=round(time.time(), 3),
        engine_tokens=dict(engine_tokens or {}),
        replica=dict(replica or {}),
        experts=experts,
    )


def _counted(buckets: Iterable[int]) -> dict[str, int]:
    return {str(bucket): count for bucket, count in Counter(buckets).items()}


def _examples(input_file: str, outcomes: Iterable[Outcome]) -> dict[str, tuple[Example, ...]]:
    """The first records of each error code, cut and without secrets."""
    found: dict[str, list[Outcome]] = {}
    faulty = [outcome for outcome in outcomes if outcome.code is not None]
    for outcome in sorted(faulty, key=lambda outcome: outcome.key):
        chosen = found.setdefault(str(outcome.code), [])
        if len(chosen) < _EXAMPLES_PER_CODE:
            chosen.append(outcome)
    return {
        code: tuple(
            Example(
                told(outcome.custom_id, _EXAMPLE_ID),
                told(input_file),
                outcome.input_row,
                told(outcome.message or "", _EXAMPLE_MESSAGE),
            )
            for outcome in chosen
        )
        for code, chosen in found.items()
    }


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


def commit_part(to: Destination, table: pa.Table, shard: Shard, stats: PartStats) -> PartStats:
    """Write the part as one whole object, unless another attempt was first.

    Returns:
        The stats of the part that is there now: ``stats``, or those of the earlier attempt.

    Raises:
        AccountingError: the table does not hold each row of the shard.
        LeaseLostError: the place is taken by another run's part, and the folder is no longer ours.
        StorageError: the object could not be written and confirmed.
    """
    _check_whole(table, shard)
    metadata = {**(table.schema.metadata or {}), _STATS_KEY: stats.to_json().encode()}
    content = _to_parquet(table.replace_schema_metadata(metadata))
    uri = part_uri(to.output_uri, shard.index)
    for _ in range(_TAKEOVERS):
        if storage.create_bytes(uri, content):
            return stats
        try:
            stored, version = storage.read_version(uri)
        except FileNotFoundError:
            continue
        earlier = _stats_of(uri, _read_metadata(uri, stored))
        if counts(to, earlier):
            log.info("shard %d was committed by another attempt; this one is dropped", shard.index)
            return earlier
        _check_current(to)
        log.warning("%s (run %s, epoch %d) is replaced", uri, earlier.run, earlier.epoch)
        if storage.replace_bytes(uri, content, version) is not None:
            return stats
    raise StorageError(f"cannot write {uri}: others keep replacing it; make sure they have ended")


def counts(to: Destination, part: PartStats) -> bool:
    """Whether a part is of this run, and nothing in it was retried since."""
    return part.run == to.run_id and not part.has_any(to.retried_since(part.epoch))


def _check_current(to: Destination) -> None:
    """Refuse to replace anything for a run that was discarded.

    A run that is discarded after this look has its parts deleted first, so that the version found
    before the look is gone.
    """
    uri = storage.join(to.output_uri, "run.json")
    try:
        current = json.loads(storage.read_bytes(uri)).get("id", "")
    except (FileNotFoundError, ValueError, AttributeError):
        current = None
    if current != to.run_id:
        raise LeaseLostError(f"{uri} is no longer of run {to.run_id}: another driver discarded it")


def _to_parquet(table: pa.Table) -> bytes:
    """The object's bytes; its footer has the SHA-256 of all that stands before the footer."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        digest = hashlib.sha256(sink.getbuffer()).hexdigest()
        writer.add_key_value_metadata({_DATA_KEY: digest})
    return sink.getvalue()


def committed_stats(to: Destination, shard: Shard) -> PartStats | None:
    """The stats of the shard's part, if this run has committed it and retried nothing in it since.

    Raises:
        StorageError: the part is there and cannot be read.
    """
    try:
        stats = _read_stats(part_uri(to.output_uri, shard.index))
    except FileNotFoundError:
        return None
    return stats if counts(to, stats) else None


def commit_outcomes(
    to: Destination,
    shard: Shard,
    outcomes: Sequence[Outcome],
    carried: pa.Table,
    *,
    seconds: float = 0.0,
    known: Collection[SampleKey] = (),
    cpu_s: Mapping[str, float] | None = None,
    images: int = 0,
    attempt: Attempt | None = None,
    engine_tokens: Mapping[str, int] | None = None,
    replica: Mapping[str, str] | None = None,
    experts: PackedLoad | None = None,
    samples: Mapping[int, int] | None = None,
) -> PartStats:
    """Commit the outcomes of one whole shard, with its carried columns in input order.

    ``known`` are those of the outcomes that the journal had, ``samples`` how many each row asks
    for now, if that is known; the others go into the stats.

    Raises:
        AccountingError, StorageError: as ``commit_part``.
    """
    stats = summarize(
        shard,
        outcomes,
        seconds,
        to.run_id,
        known,
        cpu_s,
        images,
        attempt,
        engine_tokens,
        replica,
        experts,
    )
    _check_samples(outcomes, samples or {}, shard)
    table = part_table(shard, outcomes, carried, model=to.model_name)
    return commit_part(to, table, shard, replace(stats, epoch=to.epoch))


def _check_samples(outcomes: Sequence[Outcome], samples: Mapping[int, int], shard: Shard) -> None:
    """Each row that has a completion has a record of each of its samples."""
    found = Counter(outcome.input_row for outcome in outcomes)
    for outcome in outcomes:
        row = outcome.input_row
        if isinstance(outcome, Completion):
            asked = samples.get(row) or recorded_samples(outcome)
            if found[row] < asked:
                raise AccountingError(
                    f"shard {shard.index} of {shard.uri}: row {row} has {found[row]} of {asked} "
                    "samples; nothing was written"
                )


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
    """Shards whose part is in the output folder, by listing it once, in bounded memory.

    Raises:
        StorageError: the folder cannot be listed, or holds a part that no shard of the plan has.
    """
    folder = storage.join(output_uri, "data")
    shards: set[int] = set()
    for entry in storage.iterate_folder(folder, suffixes=(".parquet",)):
        shard = part_number(entry.uri)
        if shard is None or shard >= len(plan.shards):
            raise StorageError(f"{entry.uri} is no part of this run; move it away")
        shards.add(shard)
    return shards


def read_part(output_uri: str, shard: int) -> list[Outcome]:
    """The records of a committed part.

    Raises:
        StorageError: it is gone, cannot be read, or is damaged.
    """
    uri = part_uri(output_uri, shard)
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise StorageError(_gone(uri)) from None
    try:
        return read_records(pq.read_table(pa.BufferReader(content)))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:  # OSError: its pages
        raise StorageError(_damaged(uri, error)) from None


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A committed part, read whole."""

    table: pa.Table
    stats: PartStats
    checksum: str | None
    """SHA-256 of its data as recorded when it was written; None: another program wrote it."""
    found_checksum: str
    """SHA-256 of its data as found."""


def read_stored_part(output_uri: str, shard: int) -> StoredPart:
    """A committed part with all that its footer says of it, by one GET.

    Raises:
        FileNotFoundError: it is gone.
        StorageError: it cannot be read, is damaged, or was not written by this program.
    """
    uri = part_uri(output_uri, shard)
    content = storage.read_bytes(uri)
    metadata = _read_metadata(uri, content)
    stats = _stats_of(uri, metadata)
    checksum = metadata.get(_DATA_KEY.encode())
    footer = int.from_bytes(content[-_FOOTER_END:-4], "little") + _FOOTER_END
    data = memoryview(content)[: max(0, len(content) - footer)]
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:  # OSError: its pages
        raise StorageError(_damaged(uri, error)) from None
    return StoredPart(
        table, stats, checksum and checksum.decode(), hashlib.sha256(data).hexdigest()
    )


def read_stats(output_uri: str, shards: Iterable[int]) -> Iterator[PartStats]:
    """The stats of committed parts in the order of ``shards``, from their footers, in parallel.

    Raises:
        StorageError: a part is gone, not readable, or was not written by this program.
    """
    return mapped(lambda shard: _listed(part_uri(output_uri, shard)), shards, _FOOTER_THREADS)


def _listed(uri: str) -> PartStats:
    try:
        return _read_stats(uri)
    except FileNotFoundError:
        raise StorageError(_gone(uri)) from None


def _read_stats(uri: str) -> PartStats:
    tail = storage.read_tail(uri, _TAIL_BYTES)
    size = int.from_bytes(tail[-_FOOTER_END:-4], "little") + _FOOTER_END
    if size > len(tail) == _TAIL_BYTES:
        tail = storage.read_tail(uri, size)
    return _stats_of(uri, _read_metadata(uri, tail))


def _stats_of(uri: str, metadata: Mapping[bytes, Any]) -> PartStats:
    if _STATS_KEY not in metadata:
        raise StorageError(f"{uri} was not written by this program; move it away")
    try:
        return PartStats.from_json(metadata[_STATS_KEY])
    except (TypeError, ValueError) as error:
        raise StorageError(_damaged(uri, error)) from None


def _read_metadata(uri: str, end: bytes) -> dict[bytes, Any]:
    """The metadata in the footer that ``end`` ends with."""
    try:
        return pq.read_metadata(pa.BufferReader(end)).metadata or {}
    except (pa.ArrowException, OSError) as error:  # OSError: pyarrow's, of one it cannot parse
        raise StorageError(_damaged(uri, error)) from None


def _damaged(uri: str, fault: Exception) -> str:
    return (
        f"{uri} is damaged ({fault}); delete it and run the command again, which makes its rows "
        "again"
    )


def _gone(uri: str) -> str:
    return f"{uri} is gone since it was listed; run the command again, which makes its rows again"
