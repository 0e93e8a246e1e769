"""totals: parts' stats -> their sums. A resumed run's totals are those of the whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.commit import Example, PartStats
from pipeline.cpu import added
from pipeline.experts import ExpertLoad, ExpertSums
from pipeline.history import History
from pipeline.records import Status

EXAMPLES_PER_CODE = 3
_TOKEN_KINDS = ("prompt", "completion", "cached", "image")


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


def total(parts: Iterable[PartStats]) -> Totals:
    """The sums of ``parts``."""
    rows = Counter({str(status): 0 for status in Status})
    tokens = Counter(dict.fromkeys(_TOKEN_KINDS, 0))
    sums: dict[str, Counter[str]] = {
        name: Counter()
        for name in ("errors", "finish_reasons", "lengths", "prompt_lengths", "latencies")
    }
    cpu_s: dict[str, float] = {}
    examples: dict[str, list[Example]] = {}
    history = History()
    experts = ExpertSums()
    records = count = images = 0
    for part in parts:
        count += 1
        records += part.records
        images += part.images
        rows.update(part.rows)
        tokens.update(part.tokens)
        for name, counter in sums.items():
            counter.update(getattr(part, name))
        cpu_s = added(cpu_s, part.cpu_s)
        _add_examples(examples, part)
        history.add(part)
        experts.add(part.experts)
    return Totals(
        rows=dict(rows),
        records=records,
        tokens=dict(tokens),
        parts=count,
        cpu_s=cpu_s,
        images=images,
        examples=examples,
        history=history,
        experts=experts.most(),
        **sums,
    )


def _add_examples(chosen: dict[str, list[Example]], part: PartStats) -> None:
    for code, examples in part.examples.items():
        both = sorted([*chosen.get(code, ()), *examples], key=lambda e: (e.input_file, e.input_row))
        chosen[code] = both[:EXAMPLES_PER_CODE]
