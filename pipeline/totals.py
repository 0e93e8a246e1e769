"""totals: parts' stats -> their sums. A resumed run's totals are those of the whole run.

In: parts one by one, as they are committed or read. Out: ``Totals``. No part's stats are kept, so
that memory does not grow with the run but for a byte per shard.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from pipeline.commit import Example, PartStats
from pipeline.experts import ExpertLoad, ExpertSums
from pipeline.history import History
from pipeline.records import Status

EXAMPLES_PER_CODE = 3
_TOKEN_KINDS = ("prompt", "completion", "cached", "image")
_COUNTED = ("errors", "finish_reasons", "lengths", "prompt_lengths", "latencies")
"""Fields of a part's stats that count something by a key, and of the totals."""


@dataclass(frozen=True)
class Totals:
    """Sums over parts."""

    rows: Mapping[str, int]
    records: int
    tokens: Mapping[str, int]
    errors: Mapping[str, int]
    finish_reasons: Mapping[str, int]
    lengths: Mapping[str, int]
    parts: int
    generated_rows: int = 0
    """Rows that the attempts which committed the parts made: neither expired nor taken over."""
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    """CPU seconds by step."""
    images: int = 0
    """Of rows that were ready for an engine."""
    prompt_lengths: Mapping[str, int] = field(default_factory=dict)
    latencies: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    """Of each error code, the first in the order of the input."""
    history: History = field(default_factory=History)
    experts: ExpertLoad | None = None
    """Tokens by MoE layer and expert; None: no engine told."""

    @property
    def ended(self) -> int:
        """Rows that have a terminal record."""
        return sum(self.rows.values())


class Sums:
    """Adds parts up as they come, in any order, from any thread; a shard's first part counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted = bytearray()
        self._runs: dict[str, int] = {}
        self._rows = Counter({str(status): 0 for status in Status})
        self._tokens = Counter(dict.fromkeys(_TOKEN_KINDS, 0))
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
        self._cpu_s: defaultdict[str, float] = defaultdict(float)
        self._examples: dict[str, list[Example]] = {}
        self._history = History()
        self._experts = ExpertSums()
        self._records = self._parts = self._images = self._generated = 0

    def __contains__(self, shard: int) -> bool:
        """Whether a part of the shard is counted."""
        return shard < len(self._counted) and bool(self._counted[shard])

    def add(self, part: PartStats) -> bool:
        """Count a part; False if its shard has one already."""
        with self._lock:
            if part.shard in self:
                return False
            self._counted.extend(bytes(max(0, part.shard + 1 - len(self._counted))))
            self._counted[part.shard] = True
            self._runs.setdefault(part.run, part.shard)
            self._add(part)
            return True

    def foreign(self, run: str) -> int | None:
        """A shard whose part is of another run; None if all parts are of ``run``."""
        return next((shard for each, shard in self._runs.items() if each != run), None)

    def totals(self) -> Totals:
        """The sums so far; parts that come later do not change them."""
        with self._lock:
            return Totals(
                rows=dict(self._rows),
                records=self._records,
                tokens=dict(self._tokens),
                parts=self._parts,
                generated_rows=self._generated,
                cpu_s=dict(self._cpu_s),
                images=self._images,
                examples=dict(self._examples),
                history=deepcopy(self._history),
                experts=self._experts.most(),
                **{name: dict(counter) for name, counter in self._counts.items()},
            )

    def _add(self, part: PartStats) -> None:
        self._parts += 1
        self._records += part.records
        self._images += part.images
        self._generated += part.generated_rows
        self._rows.update(part.rows)
        self._tokens.update(part.tokens)
        for name, counter in self._counts.items():
            counter.update(getattr(part, name))
        for step, seconds in part.cpu_s.items():
            self._cpu_s[step] += seconds
        _add_examples(self._examples, part)
        self._history.add(part)
        self._experts.add(part.experts)


def total(parts: Iterable[PartStats]) -> Totals:
    """The sums of ``parts``, each shard once."""
    sums = Sums()
    for part in parts:
        sums.add(part)
    return sums.totals()


def _add_examples(chosen: dict[str, list[Example]], part: PartStats) -> None:
    for code, examples in part.examples.items():
        both = sorted([*chosen.get(code, ()), *examples], key=lambda e: (e.input_file, e.input_row))
        chosen[code] = both[:EXAMPLES_PER_CODE]
