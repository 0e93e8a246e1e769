"""What is checked of a run, and what was found wrong. Counts are exact, examples are few."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

_EXAMPLES = 10
"""Faults of one check that are kept; beyond, they are counted."""
_MAKE_AGAIN = (
    "delete the part and run the run's own command again: it makes those rows again, with the same "
    "seeds"
)


class CheckName(StrEnum):
    """One question that a run must answer with yes."""

    FINISHED = "finished"
    PARTS = "parts"
    CHECKSUMS = "checksums"
    SCHEMA = "schema"
    ROWS = "rows"
    RECORDS = "records"
    TOKENS = "tokens"
    STATS = "stats"
    SEEDS = "seeds"
    DUPLICATES = "duplicates"
    INPUT = "input"
    REPORT = "report"
    ENGINE_TOKENS = "engine_tokens"
    REPLAY = "replay"


MEANING: Mapping[CheckName, str] = {
    CheckName.FINISHED: "every shard has its part, and _SUCCESS is there",
    CheckName.PARTS: "every part can be read and is this run's",
    CheckName.CHECKSUMS: "every part's bytes are those that were written",
    CheckName.SCHEMA: "all parts have the same columns, and those of docs/output.md",
    CheckName.ROWS: "each input row has its records, each sample once, in order",
    CheckName.RECORDS: "each record is whole: status, code, text and finish reason go together",
    CheckName.TOKENS: "total = prompt + completion, cached and image tokens within the prompt",
    CheckName.STATS: "each part's footer says what its records say",
    CheckName.SEEDS: "each seed is the row's own, or the one derived from run, id and sample",
    CheckName.DUPLICATES: "rows that repeat a custom_id, and no others, ended as duplicates",
    CheckName.INPUT: "the input files are those that were planned",
    CheckName.REPORT: "report.json and OpenAI's files say what the parts say",
    CheckName.ENGINE_TOKENS: "the engines counted the tokens that the records have",
    CheckName.REPLAY: "records that are generated again are the same",
}

REMEDY: Mapping[CheckName, str] = {
    CheckName.FINISHED: "run the run's own command again: it makes what is missing",
    CheckName.PARTS: _MAKE_AGAIN,
    CheckName.CHECKSUMS: f"restore the part, or {_MAKE_AGAIN}",
    CheckName.SCHEMA: _MAKE_AGAIN,
    CheckName.ROWS: _MAKE_AGAIN,
    CheckName.RECORDS: _MAKE_AGAIN,
    CheckName.TOKENS: _MAKE_AGAIN,
    CheckName.STATS: _MAKE_AGAIN,
    CheckName.SEEDS: _MAKE_AGAIN,
    CheckName.DUPLICATES: _MAKE_AGAIN,
    CheckName.INPUT: "put the files back as they were: rows of others can be neither made again "
    "nor replayed",
    CheckName.REPORT: "delete _SUCCESS and run the run's own command again: it writes them anew "
    "and generates nothing",
    CheckName.ENGINE_TOKENS: "look for a replica that was lost in the run's log; if none was, "
    "please report it",
    CheckName.REPLAY: "see the reasons, and the texts side by side in verify.json; where the "
    "batch is one, --max-mismatch RATE bears that share",
}


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAULT = "fault"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Check:
    """How one check ended."""

    name: CheckName
    state: State
    note: str
    """What was looked at, or why it was not."""
    faults: int = 0
    examples: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        if self.state is not State.FAULT:
            return f"{self.name}: {self.state} ({self.note})"
        first = self.examples[0]
        more = f" (and {self.faults - 1} more)" if self.faults > 1 else ""
        return f"{self.name}: {first.where}: {first.what}{more}. Remedy: {REMEDY[self.name]}."


class Findings:
    """Faults by check: all are counted, the first few kept. Grows; not for several threads."""

    def __init__(self) -> None:
        self._counts: Counter[CheckName] = Counter()
        self._examples: defaultdict[CheckName, list[Fault]] = defaultdict(list)

    def add(self, name: CheckName, where: str, what: str) -> None:
        """One more fault."""
        self._counts[name] += 1
        if len(self._examples[name]) < _EXAMPLES:
            self._examples[name].append(Fault(where, what))

    def add_all(self, other: Findings) -> None:
        """All faults of ``other``, counted with it."""
        self._counts.update(other._counts)
        for name, faults in other._examples.items():
            self._examples[name] += faults[: _EXAMPLES - len(self._examples[name])]

    def any_of(self, names: Iterable[CheckName]) -> bool:
        """Whether one of these checks has a fault."""
        return any(self._counts[name] for name in names)

    def check(self, name: CheckName, note: str, *, skipped: bool = False) -> Check:
        """How the check ended, ``note`` being what it looked at."""
        if self._counts[name]:
            examples = tuple(self._examples[name])
            return Check(name, State.FAULT, note, self._counts[name], examples)
        return Check(name, State.SKIPPED if skipped else State.OK, note)
