"""All parts of a run, and what the run says of itself: a verdict from object storage alone.

In: a recorded run. Out: ``Audit``: one ``Check`` per question, totals counted from the records, and
what a replay needs to know of each part. Parts are read a few at a time, so memory does not grow
with the run but by some hundred bytes a part.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.verify.checks import Check, CheckName, Findings
from jobs.verify.parts import Expected, PartAudit, audit_part
from jobs.verify.recorded import Recorded, input_change
from jobs.verify.seeds import own_seeds
from pipeline import storage
from pipeline.commit import part_uri
from pipeline.errors import StorageError
from pipeline.journal import journaled_shards
from pipeline.openai_output import OPENAI_FILES
from pipeline.parallel import mapped
from pipeline.plan import InputFile, Shard
from pipeline.records import OUTPUT_SCHEMA, Status, carried_names
from pipeline.totals import Sums, Totals

log = logging.getLogger(__name__)

_THREADS = 8
"""Parts read at a time: each is held whole, compressed and not."""
_LOOK_THREADS = 16  # latency, not CPU
_SAMPLED_SCHEMAS = 5
_TOKEN_KINDS = ("prompt", "completion")
_TELL_S = 10.0
_CHUNK = 2**20


@dataclass(frozen=True)
class Audit:
    """What a look at all of a run's objects found."""

    checks: tuple[Check, ...]
    totals: Totals
    """Counted from the records."""
    parts: Mapping[int, PartAudit]
    """By shard: those that are there."""
    input_intact: bool
    """Whether every input file is the one that was planned."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What a check looked at, or why it did not."""

    note: str
    skipped: bool = False


def audit(recorded: Recorded) -> Audit:
    """Look at everything the run's folder holds; nothing is written.

    Raises:
        StorageError: the store does not answer.
    """
    run, findings = recorded.run, Findings()
    changed = _check_input(run.plan.files, findings)
    shards = [shard for shard in run.plan.shards if shard.index in run.done]
    expected = _expected(recorded, shards, changed)
    parts: dict[int, PartAudit] = {}
    sums, tokens = Sums(), _EngineTokens()
    for part in _audited(shards, expected):  # the run may be large: what adds up is not kept
        findings.add_all(part.findings)
        if part.counted is not None:
            sums.add(part.counted)
        tokens.add(part)
        parts[part.shard] = replace(
            part, findings=Findings(), counted=None, footer=None, completed={}
        )
    totals = sums.totals()
    _check_finished(recorded, findings)
    looks = {
        CheckName.REPORT: _check_report(recorded, totals, findings),
        CheckName.ENGINE_TOKENS: _check_engine_tokens(recorded, tokens, findings),
        CheckName.INPUT: _Look(f"{len(run.plan.files)} files"),
        CheckName.FINISHED: _Look(f"{len(run.done)} of {len(run.plan.shards)} shards"),
        CheckName.ROWS: _Look(f"{totals.ended} of {run.plan.rows} rows, {totals.records} records"),
        CheckName.DUPLICATES: _Look(f"{len(run.duplicates)} rows"),
    }
    of_parts = _Look(f"{len(parts)} parts")
    checks = tuple(
        findings.check(name, look.note, skipped=look.skipped)
        for name in CheckName
        if name is not CheckName.REPLAY
        for look in (looks.get(name, of_parts),)
    )
    return Audit(checks, totals, parts, not changed)


def _audited(shards: Sequence[Shard], expected: Expected) -> Iterator[PartAudit]:
    """The audits of parts in plan order, several at a time; says how far it is."""
    next_line = time.monotonic() + _TELL_S
    audits = mapped(partial(audit_part, expected=expected), shards, _THREADS)
    for count, part in enumerate(audits, start=1):
        if time.monotonic() > next_line:
            next_line = time.monotonic() + _TELL_S
            log.info("%d of %d parts audited", count, len(shards))
        yield part


def _expected(recorded: Recorded, shards: Sequence[Shard], changed: frozenset[str]) -> Expected:
    run = recorded.run
    defaults = [sampling["seed"] for sampling in recorded.values_of("sampling")]
    return Expected(
        output_uri=run.uri,
        to=run.to,
        schema=_common_schema(recorded, shards),
        models=frozenset(str(model["name"]) for model in recorded.values_of("model")),
        run_seeds=tuple(recorded.values_of("seed")),
        default_seeds=tuple(seed for seed in defaults if seed is not None),
        duplicates=run.duplicates,
        own_seeds=partial(own_seeds, recorded.config, changed),
    )


def _common_schema(recorded: Recorded, shards: Sequence[Shard]) -> pa.Schema:
    """The contract's columns, then the carried ones as most of some parts have them."""
    step = max(1, len(shards) // _SAMPLED_SCHEMAS)
    found = [_schema_of(recorded.run.uri, shard) for shard in shards[::step]]
    carried = [_beyond_contract(schema) for schema in found if schema is not None]
    common = max(carried, key=lambda each: sum(map(each.equals, carried)), default=pa.schema([]))
    asked = recorded.config.output.carry
    if asked is not None:
        wanted = [name for name in carried_names(asked).values() if name in common.names]
        common = pa.schema([common.field(name) for name in wanted])
    return pa.schema([*OUTPUT_SCHEMA, *common])


def _beyond_contract(schema: pa.Schema) -> pa.Schema:
    return pa.schema([each for each in schema if each.name not in OUTPUT_SCHEMA.names])


def _schema_of(output_uri: str, shard: Shard) -> pa.Schema | None:
    """A part's columns; None if it cannot be read, which its own audit tells."""
    try:
        with storage.open_input(part_uri(output_uri, shard.index)) as handle:
            return pq.read_schema(handle).remove_metadata()
    except (pa.ArrowException, OSError, StorageError):
        return None


def _check_input(files: Sequence[InputFile], findings: Findings) -> frozenset[str]:
    """Files that are not those that were planned, by their sizes and versions as of now."""
    with ThreadPoolExecutor(_LOOK_THREADS) as pool:
        changes = dict(zip(files, pool.map(input_change, files), strict=True))
    for file, change in changes.items():
        if change:
            findings.add(CheckName.INPUT, file.uri, change)
    return frozenset(file.uri for file, change in changes.items() if change)


def _check_finished(recorded: Recorded, findings: Findings) -> None:
    run = recorded.run
    if run.pending:
        open_rows = sum(shard.rows for shard in run.pending)
        journaled = len(journaled_shards(run.uri) - run.done)
        what = (
            f"is not finished: {len(run.pending)} of {len(run.plan.shards)} shards ({open_rows} "
            f"rows) have no part yet, {journaled} of them have finished rows in the journal"
        )
        findings.add(CheckName.FINISHED, run.uri, what)
    elif not run.finished:
        findings.add(CheckName.FINISHED, run.uri, "has all its parts, but no _SUCCESS")


def _check_report(recorded: Recorded, totals: Totals, findings: Findings) -> _Look:
    """Compare what was told at the run's end with what was counted."""
    run = recorded.run
    if not run.complete:
        return _Look("the run is not finished", skipped=True)
    uri = storage.join(run.uri, "report.json")
    try:
        report = json.loads(storage.read_bytes(uri))
        told = {key: report[key] for key in ("rows", "tokens", "records", "errors", "parts")}
        told["finish_reasons"] = report["finish_reasons"]
    except FileNotFoundError:
        findings.add(CheckName.REPORT, uri, "is missing")
    except (ValueError, KeyError, TypeError) as error:
        findings.add(CheckName.REPORT, uri, f"cannot be read: {error!r}")
    else:
        for key, counted in _told(run.plan.rows, totals).items():
            if told[key] != counted:
                what = f"says {key} {told[key]}, the records {counted}"
                findings.add(CheckName.REPORT, uri, what)
    if recorded.is_jsonl:
        _check_openai_files(recorded, totals, findings)
        return _Look("report.json, output.jsonl and errors.jsonl")
    return _Look("report.json")


def _told(rows: int, totals: Totals) -> dict[str, Any]:
    return {
        "rows": {"total": rows, **totals.rows},
        "tokens": dict(totals.tokens),
        "records": totals.records,
        "errors": dict(totals.errors),
        "finish_reasons": dict(totals.finish_reasons),
        "parts": totals.parts,
    }


def _check_openai_files(recorded: Recorded, totals: Totals, findings: Findings) -> None:
    succeeded = totals.rows[Status.SUCCEEDED]
    for name, rows in zip(OPENAI_FILES, (succeeded, totals.ended - succeeded), strict=True):
        uri = storage.join(recorded.run.uri, name)
        try:
            with storage.open_input(uri) as file:
                lines = sum(chunk.count(b"\n") for chunk in iter(partial(file.read, _CHUNK), b""))
        except FileNotFoundError:
            findings.add(CheckName.REPORT, uri, "is missing")
            continue
        if lines != rows:
            findings.add(CheckName.REPORT, uri, f"has {lines} lines for {rows} rows")


class _EngineTokens:
    """What the engines counted, and what the records have, summed over parts."""

    def __init__(self) -> None:
        self.counted = Counter(dict.fromkeys(_TOKEN_KINDS, 0))
        self.recorded = Counter(dict.fromkeys(_TOKEN_KINDS, 0))
        self.is_known = False
        self.taken_over = self.tried_again = 0
        self.processes: set[str | None] = set()

    def add(self, part: PartAudit) -> None:
        """Add a part."""
        self.recorded.update(part.completed)
        self.tried_again += part.tried_again
        footer = part.footer
        if footer is None:
            return
        self.counted.update(footer.engine_tokens)
        self.is_known |= bool(footer.engine_tokens)
        self.taken_over += footer.taken_over
        if footer.replica:
            self.processes.add(footer.replica.get("process"))


def _check_engine_tokens(recorded: Recorded, tokens: _EngineTokens, findings: Findings) -> _Look:
    """Compare the engines' own counts with the records that have a completion.

    Both count a prompt once, images expanded and cached tokens included, and every token that was
    generated for a completion. What an engine had finished and nobody wrote down (a replica that
    was lost), or was written down by one whose count was lost (what a journal kept), makes them
    differ; only that.
    """
    if not tokens.is_known:
        return _Look("no engine told its counts", skipped=True)
    counted = {kind: tokens.counted[kind] for kind in _TOKEN_KINDS}
    told = ", ".join(f"{count:,} {kind}" for kind, count in counted.items())
    if counted == {kind: tokens.recorded[kind] for kind in _TOKEN_KINDS}:
        return _Look(f"{told}, as in the records")
    gaps = ", ".join(f"{kind} {counted[kind] - tokens.recorded[kind]:+,}" for kind in counted)
    reasons = _disturbances(recorded, tokens)
    if reasons:
        return _Look(f"{told}; against the records {gaps}, as {' and '.join(reasons)}")
    what = f"the engines counted {told} tokens; against the records that is {gaps}"
    findings.add(CheckName.ENGINE_TOKENS, recorded.run.uri, what)
    return _Look(told)


def _disturbances(recorded: Recorded, tokens: _EngineTokens) -> list[str]:
    """What made the engines and the records count differently."""
    taken_over, again, processes = tokens.taken_over, tokens.tried_again, tokens.processes
    replicas = recorded.config.engine.most_replicas
    reasons = []
    if taken_over:
        reasons.append(f"{taken_over} rows were taken over from a journal or expired")
    if again:
        reasons.append(f"{again} records took more than one engine, or were given up in one")
    if len(processes) > replicas:
        reasons.append(f"{len(processes)} replica processes took turns at {replicas} places")
    return reasons
