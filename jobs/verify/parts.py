"""One part against the plan, its own records and its footer. Columns at a time, not rows.

In: a shard, and what its part must hold. Out: ``PartAudit``: the faults, and what was counted. A
part is read whole, by one GET, so memory is bounded by the parts read at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.verify.checks import CheckName, Findings
from jobs.verify.columns import Flags, Records, asked_samples, recount
from pipeline.commit import Destination, PartStats, StoredPart, counts, part_uri, read_stored_part
from pipeline.duplicates import Duplicates
from pipeline.errors import ErrorCode, StorageError
from pipeline.plan import Shard
from pipeline.records import ADDED_LATER, OUTPUT_SCHEMA, Status
from pipeline.seeds import derive_seed, sample_seed

_FINISH_REASONS = ("stop", "length")
_NEVER_NULL = (
    *("custom_id", "sample_index", "status", "prompt_tokens", "completion_tokens", "total_tokens"),
    *("cached_tokens", "image_tokens", "seed", "model", "attempts", "input_file", "input_row"),
)
_COMPARED = ("rows", "records", "tokens", "errors", "finish_reasons", "lengths")
"""What a footer says of its records."""


@dataclass(frozen=True)
class Expected:
    """What every part of the run must agree with."""

    output_uri: str
    to: Destination
    """The run, and what was retried in it."""
    schema: pa.Schema
    """Of all parts."""
    models: frozenset[str]
    """Names that records may carry."""
    run_seeds: tuple[int, ...]
    """The run's seed, and those it had before."""
    default_seeds: tuple[int, ...]
    """Seeds that ``sampling.seed`` of the config gave to rows without their own."""
    duplicates: Duplicates
    own_seeds: Callable[[Shard], Mapping[int, int] | None]
    """By row number, the seeds that rows of a shard bring; None if the input cannot be read."""


@dataclass(frozen=True)
class PartAudit:
    """What was found in one part."""

    shard: int
    findings: Findings
    sound: bool = False
    """Whether its records can be relied on."""
    counted: PartStats | None = None
    """Counted from the records; None if they could not be."""
    footer: PartStats | None = None
    """As the part says."""
    succeeded: int = 0
    """Records that succeeded."""
    completed: Mapping[str, int] = field(default_factory=dict)
    """prompt, completion: tokens of the records that have a completion."""
    tried_again: int = 0
    """Records that took more than one engine, or were given up inside of one."""


def audit_part(shard: Shard, expected: Expected) -> PartAudit:
    """Check the part of ``shard``."""
    uri = part_uri(expected.output_uri, shard.index)
    findings = Findings()
    try:
        stored = read_stored_part(expected.output_uri, shard.index)
    except (StorageError, FileNotFoundError) as error:
        findings.add(CheckName.PARTS, uri, str(error))
        return PartAudit(shard.index, findings)
    _check_origin(stored, shard, expected, uri, findings)
    if not _check_columns(stored.table, expected, uri, findings):
        return PartAudit(shard.index, findings, footer=stored.stats)
    records = Records(stored.table)
    _check_rows(records, shard, uri, findings)
    _check_records(records, expected, uri, findings)
    _check_tokens(records, uri, findings)
    _check_seeds(records, shard, expected, uri, findings)
    _check_duplicates(records, shard, expected, uri, findings)
    counted = recount(records, stored.stats)
    for name in _COMPARED:
        said, found = getattr(stored.stats, name), getattr(counted, name)
        if said != found:
            what = f"its footer says {name} {said}, its records {found}"
            findings.add(CheckName.STATS, uri, what)
    doubtful = (CheckName.PARTS, CheckName.CHECKSUMS, CheckName.ROWS, CheckName.RECORDS)
    return PartAudit(
        shard.index,
        findings,
        sound=not findings.any_of(doubtful),
        counted=counted,
        footer=stored.stats,
        succeeded=int((records.status == Status.SUCCEEDED).sum()),
        completed={
            "prompt": int(records.prompt_tokens[records.completed].sum()),
            "completion": int(records.completion_tokens[records.completed].sum()),
        },
        tried_again=int((records.attempts > records.completed).sum()),
    )


def _check_origin(
    stored: StoredPart, shard: Shard, expected: Expected, uri: str, findings: Findings
) -> None:
    stats = stored.stats
    if stats.run != expected.to.run_id:
        findings.add(CheckName.PARTS, uri, f"is of another run ({stats.run or 'unnamed'})")
    elif not counts(expected.to, stats):
        what = "has records that were retried since: an attempt from before --retry wrote it late"
        findings.add(CheckName.PARTS, uri, what)
    if stats.shard != shard.index:
        findings.add(CheckName.PARTS, uri, f"was written as the part of shard {stats.shard}")
    if stored.checksum is None:
        findings.add(CheckName.CHECKSUMS, uri, "has no checksum: it was written anew since")
    elif stored.checksum != stored.found_checksum:
        what = f"sha256 {stored.found_checksum[:12]}..., not {stored.checksum[:12]}...: changed"
        findings.add(CheckName.CHECKSUMS, uri, what)


def _check_columns(table: pa.Table, expected: Expected, uri: str, findings: Findings) -> bool:
    """Whether the records can be looked at."""
    schema = table.schema.remove_metadata()
    absent = ADDED_LATER.difference(schema.names)
    wanted = pa.schema([field for field in expected.schema if field.name not in absent])
    if not schema.equals(wanted):
        findings.add(CheckName.SCHEMA, uri, _difference(schema, wanted))
        if any(
            name not in schema.names or schema.field(name).type != OUTPUT_SCHEMA.field(name).type
            for name in OUTPUT_SCHEMA.names
            if name not in absent
        ):
            return False
    holes = [name for name in _NEVER_NULL if table.column(name).null_count]
    for name in holes:
        what = f"{table.column(name).null_count} records have no {name}"
        findings.add(CheckName.RECORDS, uri, what)
    return not holes


def _difference(found: pa.Schema, expected: pa.Schema) -> str:
    for name in expected.names:
        if name not in found.names:
            return f"has no column {name}"
        if found.field(name).type != expected.field(name).type:
            return f"column {name} is {found.field(name).type}, not {expected.field(name).type}"
    extra = [name for name in found.names if name not in expected.names]
    return f"has a column {extra[0]}" if extra else "has its columns in another order"


def _check_rows(records: Records, shard: Shard, uri: str, findings: Findings) -> None:
    def fault(what: str) -> None:
        findings.add(CheckName.ROWS, uri, what)

    files = pc.unique(records.table.column("input_file")).to_pylist()
    for strange in [file for file in files if file != shard.uri]:
        fault(f"has records of {strange}; its shard is of {shard.uri}")
    planned = np.arange(shard.first_row, shard.first_row + shard.rows)
    lost, strange_rows = np.setdiff1d(planned, records.rows), np.setdiff1d(records.rows, planned)
    if len(lost):
        fault(f"{len(lost)} rows have no record, the first is row {lost[0]}")
    if len(strange_rows):
        fault(f"{len(strange_rows)} rows are not its shard's, the first is row {strange_rows[0]}")
    keys = records.rows * (int(records.samples.max(initial=0)) + 1) + records.samples
    values, counts = np.unique(keys, return_counts=True)
    if (counts > 1).any():
        position = int(np.flatnonzero(keys == values[counts > 1][0])[0])
        fault(f"{int((counts - 1).sum())} records too many: {records.row_at(position)} twice")
    elif (np.diff(keys) < 0).any():
        fault(f"records are out of order after {records.row_at(int(np.argmin(np.diff(keys))))}")
    else:
        _check_samples(records, fault)


def _check_samples(records: Records, fault: Callable[[str], None]) -> None:
    """Each row has samples 0 to n-1, n being its own; one that failed before has one record."""
    if not len(records.rows):
        return
    sizes = np.diff(np.append(records.starts, len(records.rows)))
    places = np.arange(len(records.rows)) - np.repeat(records.starts, sizes)
    for position in np.flatnonzero(records.samples != places)[:1]:
        row, index = records.rows[position], places[position]
        fault(f"row {row} has no record of sample {index}, but one of a later sample")
    try:
        asked = np.maximum.reduceat(asked_samples(records.table), records.starts)
    except (ValueError, KeyError, TypeError) as error:
        fault(f"sampling cannot be read: {error!r}")
        return
    refused = (records.status[records.starts] == Status.ERRORED) & (
        records.attempts[records.starts] == 0
    )
    wrong = (asked > 0) & (sizes != asked) & ~(refused & (sizes == 1))
    for place in np.flatnonzero(wrong)[:1]:
        row = records.rows[records.starts[place]]
        fault(f"row {row} has {sizes[place]} records; its sampling asks for n = {asked[place]}")


def _check_records(records: Records, expected: Expected, uri: str, findings: Findings) -> None:
    status, code, completed = records.status, records.code, records.completed
    succeeded = status == Status.SUCCEEDED
    has_code = ~records.is_null("error_code")
    strange_model = ~np.isin(records.texts("model").astype(str), list(expected.models))
    known_code = np.isin(code[has_code].astype(str), [str(each) for each in ErrorCode])
    strange_code = has_code.copy()
    strange_code[has_code] = ~known_code
    reasons = np.isin(records.finish_reason.astype(str), _FINISH_REASONS)
    rules: tuple[tuple[str, Flags], ...] = (
        ("has an unknown status", ~np.isin(status.astype(str), [str(each) for each in Status])),
        ("has an unknown error_code", strange_code),
        ("succeeded with an error_code", succeeded & has_code),
        ("succeeded without a text", succeeded & records.is_null("text")),
        ("succeeded without a finish_reason", succeeded & ~completed),
        ("has no error_code and did not succeed", ~succeeded & ~has_code),
        ("has no error_message and did not succeed", ~succeeded & records.is_null("error_message")),
        ("has an unknown finish_reason", completed & ~reasons),
        ("has a text and no finish_reason, or the reverse", records.is_null("text") == completed),
        (
            "is expired without batch_expired, or the reverse",
            (status == Status.EXPIRED) != (code == ErrorCode.BATCH_EXPIRED),
        ),
        ("is of another model than the run's", strange_model),
    )
    _add_broken(rules, records, CheckName.RECORDS, uri, findings)


def _check_tokens(records: Records, uri: str, findings: Findings) -> None:
    table, prompt, completion = records.table, records.prompt_tokens, records.completion_tokens
    total, cached, image = (
        table.column(name).to_numpy() for name in ("total_tokens", "cached_tokens", "image_tokens")
    )
    least = np.minimum.reduce([prompt, completion, cached, image])
    rules = (
        ("total_tokens is not prompt + completion", total != prompt + completion),
        ("has a number of tokens below 0", least < 0),
        ("has completion tokens and no completion", (completion > 0) & ~records.completed),
        ("has more cached than prompt tokens", cached > prompt),
        ("has more image than prompt tokens", records.completed & (image > prompt)),
    )
    _add_broken(rules, records, CheckName.TOKENS, uri, findings)


def _add_broken(
    rules: tuple[tuple[str, Flags], ...],
    records: Records,
    name: CheckName,
    uri: str,
    findings: Findings,
) -> None:
    """A fault per rule that records break."""
    for what, broken in rules:
        count = int(broken.sum())
        if count:
            first = records.row_at(int(np.argmax(broken)))
            more = f" ({count} records)" if count > 1 else ""
            findings.add(name, uri, f"{first} {what}{more}")


def _check_seeds(
    records: Records, shard: Shard, expected: Expected, uri: str, findings: Findings
) -> None:
    """Most seeds can be derived; the others must be what their rows in the input say."""
    own = list(_not_derived(records, expected))
    if not own:
        return
    given = expected.own_seeds(shard)
    if given is None:  # the input is gone: that is a fault of its own
        return
    wrong = [
        position
        for position in own
        if (seed := given.get(int(records.rows[position]))) is None
        or sample_seed(seed, int(records.samples[position])) != records.seeds[position]
    ]
    if wrong:
        first, more = records.row_at(wrong[0]), f" ({len(wrong)} records)" if wrong[1:] else ""
        what = f"{first} has a seed that neither the row brings nor the run gives{more}"
        findings.add(CheckName.SEEDS, uri, what)


def _not_derived(records: Records, expected: Expected) -> Iterator[int]:
    """Positions of records whose seed does not follow from the run's config."""
    ids = records.table.column("custom_id").to_pylist()
    samples, seeds = records.samples.tolist(), records.seeds.tolist()
    for position, (custom_id, index, seed) in enumerate(zip(ids, samples, seeds, strict=True)):
        if not any(seed == derive_seed(run, custom_id, index) for run in expected.run_seeds) and (
            not any(seed == sample_seed(base, index) for base in expected.default_seeds)
        ):
            yield position


def _check_duplicates(
    records: Records, shard: Shard, expected: Expected, uri: str, findings: Findings
) -> None:
    """An expired row was never judged, so a duplicate may have expired."""
    repeating = set(expected.duplicates.of(shard))
    refused = set(records.rows[records.code == ErrorCode.DUPLICATE_CUSTOM_ID].tolist())
    expired = set(records.rows[records.status == Status.EXPIRED].tolist())
    for row in sorted(refused - repeating)[:1]:
        what = f"row {row} ended as a duplicate, and repeats no custom_id"
        findings.add(CheckName.DUPLICATES, uri, what)
    for row in sorted(repeating - refused - expired)[:1]:
        what = f"row {row} repeats a custom_id, and did not end as a duplicate"
        findings.add(CheckName.DUPLICATES, uri, what)
