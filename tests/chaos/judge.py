"""What was promised against what came out of a run under fire. Pure: tables in, checks out.

In: the input's rows, the records of an undisturbed and of the disturbed run, the ledger of the
latter, and what the campaign saw. Out: ``Check``s, each passed or not, with its numbers.

Paying twice: a generation that follows an earlier finished one of the same sample is a repeat. It
is excused if the process that finished the earlier one died before the journal had to hold it:
within the journal interval (and some slack), not counting the time the S3 server was away. Repeats
that are not excused, and those whose process did not die at all, are waste.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.chaos.ledger import Generation

SLACK_S = 2.0
BACKOFF_S = 5.0
"""Longest wait between two tries of a write (``pipeline.faults``): an outage ends that much later
for whoever was trying."""
WASTE_LIMIT = 0.01
"""Finished tokens generated again beyond the journal interval, as a share of all."""
_COMPARED = ("status", "text", "completion_tokens", "prompt_tokens", "finish_reason", "seed")
_SHOWN = 3
_RESUMABLE_EXITS = frozenset({0, 1, 75, -9})
"""Done, failed (the same command resumes), interrupted, killed."""

Record = Mapping[str, Any]
Key = tuple[str, int, int]
Owner = tuple[int, float]
"""A replica's process: pid and start time."""


@dataclass(frozen=True)
class Check:
    """One promise."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Repeat:
    """A sample that was generated once more."""

    first_at: float
    again_at: float
    tokens: int
    excused: bool


def judge_records(
    expected: Sequence[Record], reference: Sequence[Record], disturbed: Sequence[Record]
) -> list[Check]:
    """Rows, duplicates, equality with the reference, and error codes.

    Args:
        expected: input rows with ``input_file`` (a name), ``input_row``, ``expected_error``.
        reference: records of the undisturbed run.
        disturbed: records of the run under fire.
    """
    return [
        _nothing_missing(expected, disturbed),
        _nothing_double(expected, disturbed),
        _good_as_in_reference(expected, reference, disturbed),
        _poison_has_codes(expected, disturbed, "poison rows have the right code"),
        _poison_has_codes(expected, reference, "poison rows of the reference too"),
    ]


def judge_waste(repeated: Sequence[Repeat], generations: Sequence[Generation]) -> Check:
    """At most 1 % of all finished tokens generated again without excuse."""
    once = {one.seed: one.completion_tokens for one in generations}
    total = sum(once.values())
    waste = sum(one.tokens for one in repeated if not one.excused)
    excused = sum(one.tokens for one in repeated if one.excused)
    share = waste / total if total else 0.0
    return Check(
        "finished tokens generated again",
        bool(total) and share <= WASTE_LIMIT,
        f"{waste} of {total} ({share:.2%}) beyond the journal interval, {excused} within it",
    )


def judge_campaign(
    *,
    landed: int,
    wanted: int,
    exits: Sequence[int],
    driver_kills: int,
    errors: Sequence[str],
    finished: bool,
    left_over: Sequence[str],
    troubles: Sequence[str],
) -> list[Check]:
    """That the run ended whole, by itself, and left nothing behind.

    Args:
        landed: kills that hit something while the run was going on.
        wanted: kills asked for.
        exits: exit codes of the driver's starts, in order.
        driver_kills: how many of them the campaign killed.
        errors: what the starts that failed said.
        finished: whether ``_SUCCESS`` is there.
        left_over: processes found after the end.
        troubles: what the campaign had to give up on.
    """
    strange = {code for code in exits if code not in _RESUMABLE_EXITS}
    killed_by_others = exits.count(-9) > driver_kills
    ended = finished and bool(exits) and exits[-1] == 0
    counted = ", ".join(f"{count} x {code}" for code, count in sorted(Counter(exits).items()))
    codes = f"exit codes: {counted or 'none'}"
    return [
        Check("kills landed", landed >= wanted, f"{landed} of {wanted}"),
        Check("the run is complete", ended, codes),
        Check(
            "every stop could be resumed",
            not strange and not killed_by_others,
            "; ".join((codes, *errors)),
        ),
        Check("nobody had to help", not troubles, "; ".join(troubles) or "nobody did"),
        Check("nothing left behind", not left_over, "; ".join(left_over) or "nothing"),
    ]


def find_repeats(
    generations: Iterable[Generation],
    deaths: Mapping[Owner, float],
    outages: Sequence[tuple[float, float]],
    *,
    journal_s: float,
    slack_s: float = SLACK_S,
) -> list[Repeat]:
    """Every generation after a sample's first, and whether the journal excuses it."""
    by_sample: dict[int, list[Generation]] = {}
    for one in sorted(generations, key=lambda one: one.at):
        by_sample.setdefault(one.seed, []).append(one)
    return [
        Repeat(
            earlier.at,
            later.at,
            later.completion_tokens,
            _is_excused(earlier, deaths, outages, journal_s + slack_s),
        )
        for history in by_sample.values()
        for earlier, later in pairwise(history)
    ]


def _is_excused(
    earlier: Generation,
    deaths: Mapping[Owner, float],
    outages: Sequence[tuple[float, float]],
    patience_s: float,
) -> bool:
    death = deaths.get((earlier.pid, earlier.started))
    if death is None:
        return False
    away = sum(
        max(0.0, min(end + BACKOFF_S, death) - max(start, earlier.at)) for start, end in outages
    )
    return death - earlier.at - away <= patience_s


def row_key(record: Record) -> tuple[str, int]:
    """A row's file name and number, whatever folder the file lies in."""
    return str(record["input_file"]).rpartition("/")[2], int(record["input_row"])


def _key(record: Record) -> Key:
    return (*row_key(record), int(record["sample_index"]))


def _nothing_missing(expected: Sequence[Record], records: Sequence[Record]) -> Check:
    present = {row_key(record) for record in records}
    missing = [key for row in expected if (key := row_key(row)) not in present]
    return Check("rows missing", bool(expected) and not missing, _some(missing))


def _nothing_double(expected: Sequence[Record], records: Sequence[Record]) -> Check:
    known = {row_key(row) for row in expected}
    double = [key for key, count in Counter(map(_key, records)).items() if count > 1]
    strange = [key for record in records if row_key(record) not in known for key in [_key(record)]]
    return Check("records double or of no row", not double and not strange, _some(double + strange))


def _good_as_in_reference(
    expected: Sequence[Record], reference: Sequence[Record], records: Sequence[Record]
) -> Check:
    known = {_key(record): _compared(record) for record in reference}
    good = {row_key(row) for row in expected if row["expected_error"] is None}
    ours = [record for record in records if row_key(record) in good]
    wrong = [
        _key(record)
        for record in ours
        if record["status"] != "succeeded" or known.get(_key(record)) != _compared(record)
    ]
    return Check(
        "good rows equal to the reference", bool(ours) and not wrong, f"differ: {_some(wrong)}"
    )


def _compared(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in _COMPARED)


def _poison_has_codes(expected: Sequence[Record], records: Sequence[Record], name: str) -> Check:
    codes = {row_key(record): (record["status"], record["error_code"]) for record in records}
    wrong = [
        f"{row['task']}: {codes.get(row_key(row))} instead of {row['expected_error']}"
        for row in expected
        if row["expected_error"] is not None
        and codes.get(row_key(row)) != ("errored", row["expected_error"])
    ]
    return Check(name, not wrong, _some(wrong))


def _some(items: Sequence[object]) -> str:
    if not items:
        return "0"
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return f"{len(items)}: {shown}{', ...' if len(items) > _SHOWN else ''}"
