"""schedule: in which order a replica's waiting samples go to its engine. Pure.

In: the samples of each open shard, as they come. Out: one sample after the other.

Three wishes, and how they are traded:

- *No barrier at a shard's end.* Samples are handed out in waves. A wave takes the older half of the
  shards that may be open; the younger ones wait, so that while the last rows of a wave run, the
  next has rows, and its shards' successors are on their way. While a run begins, its shards come
  one by one: a wave that is not full takes them in.
- *The tail.* A sample expected to take several times its shard's median is a straggler: those of
  all open shards go first, whatever their prefix, as a prefix computed again costs one prefill, and
  a straggler that starts last leaves the engine empty for its whole length.
- *The prefix cache.* All others go by prefix: samples that share at least half of their prompt are
  neighbours, across all shards of the wave, and neighbouring groups share what they can. Within a
  group, and among samples that share nothing, the longest expected go first, by powers of two, so
  that rows of about the same length stay in prefix order.

Images are not looked at: rows with images are grouped by their text, and of those with the same
text the ones that came first go first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Generic, TypeVar

import numpy as np

_STRAGGLER = 4.0
"""Times the median of a shard's expected lengths beyond which a sample is a straggler."""
_BYTES_PER_TOKEN = 4
_LEAST_SHARED_TOKENS = 32
"""A chat template's own first tokens are shared by all rows, and cost next to nothing."""
_PROMPT_TOKENS_PER_STEP = 128
"""Prompt tokens that take an engine about as long as one decode step, roughly: for an order."""
_UNBOUNDED_STEPS = 2**16
"""What a sample without a limit of its own may take."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """A sample that waits for the engine."""

    sample: T
    prefix: bytes
    """The prompt as ``prefix_key`` gives it."""
    expected: float
    """How long it may take, in decode steps."""


def prefix_key(token_ids: Sequence[int]) -> bytes:
    """Prompt tokens in a form that sorts by common prefixes, fast."""
    return np.asarray(token_ids, np.int32).tobytes()


def expected_steps(prompt_tokens: int, most_completion_tokens: int | None) -> float:
    """The most decode steps a sample may take, its prompt converted into such."""
    limit = most_completion_tokens or _UNBOUNDED_STEPS
    return limit + prompt_tokens / _PROMPT_TOKENS_PER_STEP


class Backlog(Generic[T]):
    """The samples of a replica's open shards that wait for the engine."""

    def __init__(self, open_shards: int) -> None:
        """Args:
        open_shards: most shards that are open at a time.
        """
        self._shards_per_wave = max(1, open_shards // 2)
        self._shards: deque[list[Waiting[T]]] = deque()
        self._wave: deque[Waiting[T]] = deque()
        self._wave_shards = 0
        self._is_ordered = True
        self._stragglers: list[Waiting[T]] = []
        """The longest expected last."""
        self._last_prefix = b""
        """Of the sample that left the wave last."""

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._stragglers) + len(self._wave) + sum(map(len, self._shards))

    def add(self, samples: Sequence[Waiting[T]]) -> None:
        """Take in the samples of one shard, in input order."""
        if not samples:
            return
        limit = _STRAGGLER * median_low(item.expected for item in samples)
        stragglers = [item for item in samples if item.expected > limit]
        if stragglers:
            self._stragglers += stragglers
            self._stragglers.sort(key=lambda item: (item.expected, item.prefix))
        others = [item for item in samples if item.expected <= limit]
        if self._wave and self._wave_shards < self._shards_per_wave:
            self._wave.extend(others)
            self._wave_shards += 1
            self._is_ordered = False
        else:
            self._shards.append(others)

    def pop(self) -> T | None:
        """The sample to go next; None if none waits."""
        if self._stragglers:
            return self._stragglers.pop().sample
        if not self._wave:
            self._next_wave()
        if not self._wave:
            return None
        if not self._is_ordered:
            self._wave = deque(_ordered(self._wave, self._last_prefix))
            self._is_ordered = True
        item = self._wave.popleft()
        self._last_prefix = item.prefix
        return item.sample

    def _next_wave(self) -> None:
        self._wave_shards = min(self._shards_per_wave, len(self._shards))
        for _ in range(self._wave_shards):
            self._wave.extend(self._shards.popleft())
        self._is_ordered = False


def _ordered(wave: Sequence[Waiting[T]], last_prefix: bytes) -> list[Waiting[T]]:
    groups = _groups(wave)
    first = _hottest(groups, last_prefix)
    grouped = [item for group in groups[first:] + groups[:first] for item in _longest_first(group)]
    in_groups = set(map(id, grouped))
    alone = [item for item in wave if id(item) not in in_groups]
    rest_of_last = [item for item in alone if _share_half(item.prefix, last_prefix)]
    others = [item for item in alone if not _share_half(item.prefix, last_prefix)]
    return [*rest_of_last, *grouped, *_longest_first(others)]


def _groups(items: Sequence[Waiting[T]]) -> list[list[Waiting[T]]]:
    """Those of ``items`` that share half of their prompt with another, in order of prefix."""
    groups: list[list[Waiting[T]]] = []
    for item in sorted(items, key=lambda item: item.prefix):
        if groups and _share_half(groups[-1][-1].prefix, item.prefix):
            groups[-1].append(item)
        else:
            groups.append([item])
    return [group for group in groups if len(group) > 1]


def _share_half(one: bytes, other: bytes) -> bool:
    tokens = min(len(one), len(other)) // _BYTES_PER_TOKEN
    size = max(_LEAST_SHARED_TOKENS, math.ceil(tokens / 2)) * _BYTES_PER_TOKEN
    return len(one) >= size <= len(other) and one[:size] == other[:size]


def _hottest(groups: Sequence[Sequence[Waiting[T]]], last_prefix: bytes) -> int:
    """The group to begin with: the one that the wave before ended with, else the first."""
    for number, group in enumerate(groups):
        if _share_half(group[0].prefix, last_prefix):
            return number
    return 0


def _longest_first(items: Sequence[Waiting[T]]) -> list[Waiting[T]]:
    return sorted(items, key=lambda item: -math.frexp(item.expected)[1])
