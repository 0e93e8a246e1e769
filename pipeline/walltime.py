"""Wall time of a run that has not started, from its tokens and the rates of its profile.

    one replica alone   prompt tokens / prompt rate + completion tokens / completion rate
    work                that / min(replicas, shards), the replicas that get some
    tail                one shard of the input's end: the last replica begins it as others finish
    wall                load + work + tail

Where prompts are read and completions written at a time, an engine's rates of both hold less than
alone; a rate that was taken with prompts beside the completions has that in it already, so the sum
is on the careful side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.plan import Shard
from pipeline.profile import Rates


@dataclass(frozen=True, slots=True)
class WallTime:
    """Seconds of a run, by what passes them."""

    load_s: float
    work_s: float
    tail_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.load_s + self.work_s + self.tail_s


def wall_time(
    rates: Rates,
    replicas: int,
    shards: Sequence[Shard],
    *,
    prompt_tokens: float,
    completion_tokens: float,
) -> WallTime:
    """How long ``replicas`` take for all of ``shards``, whose tokens these are; without rows no
    engine starts."""
    rows = sum(shard.rows for shard in shards)
    if rows == 0:
        return WallTime(0.0, 0.0, 0.0)
    alone = (
        prompt_tokens / rates.prompt_tokens_per_s
        + completion_tokens / rates.completion_tokens_per_s
    )
    busy = min(replicas, len(shards))
    last = shards[-1].rows if busy > 1 else 0  # a replica by itself waits for no other
    return WallTime(rates.load_s, alone / busy, alone * last / rows)
