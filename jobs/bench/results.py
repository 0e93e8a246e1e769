"""Measurements: one JSON line each in ``results.jsonl``, and what is made of them.

In: single measurements, taken in one go or in slices. Out: for each workload the ratios of this
pipeline to every other contender, paired by round, with the smallest, the median and the largest.
Only measurements of the same rows, code and machine are paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from jobs.bench.contenders import Contender

SAME_WORK = 0.01
"""Most that two contenders' completion tokens may differ by, as a share."""


@dataclass(frozen=True)
class Setting:
    """What two measurements must share to be compared."""

    workload: str
    rows: int
    code: str
    """The commit, and ``-dirty`` where the tree differs from it."""
    machine: str
    """Processor, cores, memory, GPU."""


@dataclass(frozen=True)
class Measurement:
    """One contender, once."""

    setting: Setting
    contender: Contender
    round: int
    seconds: float
    """Of the steady state."""
    timed_rows: int
    """What was done in ``seconds``."""
    timed_tokens: int
    """Completion tokens made in ``seconds``."""
    prompt_tokens: int
    """Of all rows, as are the following."""
    completion_tokens: int
    cached_tokens: int | None
    """Prompt tokens found in the prefix cache; None where the contender does not say."""
    whole_s: float
    """Of the process or processes, with model load and the end."""
    at: str
    """When it ended, UTC."""
    versions: Mapping[str, str]

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens a second in the steady state."""
        return self.timed_tokens / self.seconds

    @property
    def rows_per_s(self) -> float:
        """Rows a second in the steady state."""
        return self.timed_rows / self.seconds


@dataclass(frozen=True)
class Spread:
    """Of ratios or rates over rounds."""

    low: float
    middle: float
    high: float
    rounds: int


class Store:
    """``results.jsonl``: appended to after every measurement, so that a bench may be cut short."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, measurement: Measurement) -> None:
        """Write one down."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(measurement)) + "\n")

    def read(self) -> list[Measurement]:
        """All of them, oldest first; none if there is no file."""
        if not self._path.exists():
            return []
        return [_parse(line) for line in self._path.read_text("utf-8").splitlines()]


def _parse(line: str) -> Measurement:
    fields = json.loads(line)
    fields["setting"] = Setting(**fields["setting"])
    fields["contender"] = Contender(fields["contender"])
    return Measurement(**fields)


def latest_settings(found: Iterable[Measurement]) -> dict[str, Setting]:
    """By workload, what is reported: the most rows, and of those the newest."""
    best: dict[str, tuple[int, str]] = {}
    chosen: dict[str, Setting] = {}
    for one in found:
        rank = (one.setting.rows, one.at)
        if rank >= best.get(one.setting.workload, (0, "")):
            best[one.setting.workload] = rank
            chosen[one.setting.workload] = one.setting
    return chosen


def of_setting(
    found: Iterable[Measurement], setting: Setting
) -> dict[Contender, dict[int, Measurement]]:
    """By contender and round; of a round measured twice, the later one."""
    grouped: dict[Contender, dict[int, Measurement]] = {}
    for one in found:
        if one.setting == setting:
            grouped.setdefault(one.contender, {})[one.round] = one
    return grouped


def spread(values: Sequence[float]) -> Spread:
    """Smallest, median and largest of at least one value."""
    return Spread(min(values), median(values), max(values), len(values))


def ratio(ours: Mapping[int, Measurement], theirs: Mapping[int, Measurement]) -> Spread | None:
    """Our rate over theirs, round by round; None if they share no round."""
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return None
    return spread([ours[r].tokens_per_s / theirs[r].tokens_per_s for r in rounds])


def same_work(ours: Mapping[int, Measurement], theirs: Mapping[int, Measurement]) -> bool:
    """Whether both made as many completion tokens, within ``SAME_WORK``, in every shared round."""
    return all(
        abs(ours[r].completion_tokens - theirs[r].completion_tokens)
        <= SAME_WORK * max(ours[r].completion_tokens, theirs[r].completion_tokens)
        for r in ours.keys() & theirs.keys()
    )


def cache_hits(measured: Mapping[int, Measurement]) -> Spread | None:
    """Share of prompt tokens found in the prefix cache; None where that is not told."""
    shares = [
        one.cached_tokens / one.prompt_tokens
        for one in measured.values()
        if one.cached_tokens is not None
    ]
    return spread(shares) if shares else None
