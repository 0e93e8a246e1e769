"""What people and programs get to see: a line per check, ``verify.json``, the last line on stdout.

In: checks, and what came of a replay. Out: a ``Result``: failed if a check has a fault, or more
records came out otherwise than was allowed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.verify.audit import Audit
from jobs.verify.checks import MEANING, REMEDY, Check, CheckName, Fault, State
from jobs.verify.compare import Mismatch, Replay
from jobs.verify.recorded import Recorded
from pipeline import storage
from pipeline.redact import redacted, redacted_text
from pipeline.report import Result, RunStatus

_SHOWN_MISMATCHES = 5
_LINE_MISMATCHES = 20
"""Mismatches in the last line on stdout; verify.json has all."""
_NUMBERS = re.compile(r"\[(?:\s+-?\d+,?)+\s+\]")
_STYLES = {State.OK: "green", State.FAULT: "bold red", State.SKIPPED: "yellow"}


def replay_check(replay: Replay, max_mismatch: float) -> Check:
    """The replay as one check."""
    note = (
        f"{replay.sampled} records: {replay.text_equal} text-equal, {replay.token_equal} "
        f"token-equal, mismatch rate {replay.mismatch_rate:.4f}"
    )
    if replay.mismatch_rate <= max_mismatch:
        return Check(CheckName.REPLAY, State.OK, note)
    examples = tuple(_fault_of(each) for each in replay.mismatches[:_LINE_MISMATCHES])
    return Check(CheckName.REPLAY, State.FAULT, note, len(replay.mismatches), examples)


def _fault_of(mismatch: Mismatch) -> Fault:
    where = f"{mismatch.custom_id} sample {mismatch.sample_index}"
    return Fault(where, f"{mismatch.difference}; {'; '.join(mismatch.reasons)}")


def to_result(
    recorded: Recorded,
    found: Audit,
    checks: Sequence[Check],
    replay: Replay | None,
    seconds: float,
) -> Result:
    """How the verification ended."""
    faults = [check for check in checks if check.state is State.FAULT]
    return Result(
        status=RunStatus.FAILED if faults else RunStatus.COMPLETE,
        run=recorded.run.uri,
        rows_total=recorded.run.plan.rows,
        totals=found.totals,
        seconds=seconds,
        error=_told(faults, len(checks)) if faults else None,
        details={
            "checks": {check.name: _check_json(check) for check in checks},
            "replay": _replay_json(replay, _LINE_MISMATCHES),
        },
    )


def _told(faults: Sequence[Check], checks: int) -> str:
    named = ", ".join(check.name for check in faults)
    return f"{len(faults)} of {checks} checks found faults ({named}): {faults[0]}"


def _check_json(check: Check) -> dict[str, Any]:
    document: dict[str, Any] = {"state": check.state, "note": check.note}
    if check.faults:
        document["faults"] = check.faults
        document["examples"] = [asdict(fault) for fault in check.examples]
        document["remedy"] = REMEDY[check.name]
    return document


def _replay_json(replay: Replay | None, most: int | None) -> dict[str, Any] | None:
    if replay is None:
        return None
    document = replay.to_json()
    document["mismatches"] = document["mismatches"][:most]
    return document


def write_verdict(folder: str, recorded: Recorded, result: Result, replay: Replay | None) -> str:
    """Put ``verify.json`` into ``folder``; its URI.

    Raises:
        StorageError: it cannot be written.
    """
    uri = storage.join(folder, "verify.json")
    document = {
        **result.to_json(),
        "replay": _replay_json(replay, None),
        "run_id": recorded.run.id,
        "verified_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    storage.put_bytes(uri, (json.dumps(redacted(document), indent=2) + "\n").encode())
    return uri


def show_checks(checks: Sequence[Check]) -> None:
    """A line per check, the faults below it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        state = f"[{_STYLES[check.state]}]{check.state}[/]"
        table.add_row(state, check.name, _plain(f"{MEANING[check.name]} ({check.note})"))
        for fault in check.examples[:_SHOWN_MISMATCHES]:
            table.add_row("", "", _plain(f"{fault.where}: {fault.what}"))
        hidden = check.faults - min(len(check.examples), _SHOWN_MISMATCHES)
        if hidden > 0:
            table.add_row("", "", f"and {hidden} more")
        if check.faults:
            table.add_row("", "", _plain(f"remedy: {REMEDY[check.name]}"))
    _console().print(table)


def show_row(document: dict[str, Any]) -> None:
    """A row's request and records, as indented JSON; lists of numbers are one line."""
    text = json.dumps(redacted(document), indent=2, ensure_ascii=False)
    _console().print(_plain(_NUMBERS.sub(lambda found: " ".join(found[0].split()), text)))


def _console() -> Console:
    """Of the stderr of now; lines are not wrapped in a log."""
    width = None if sys.stderr.isatty() else 1_000
    return Console(file=sys.stderr, width=width, soft_wrap=width is None, highlight=False)


def _plain(text: str) -> str:
    """Redacted, and nothing in it is markup."""
    return redacted_text(text).replace("[", r"\[")
