"""One engine: continuous batching on a given curve of step times.

In: requests (prompt and completion tokens). Out: when each one finishes. A step gives each running
sequence one token and takes as long as the curve says for their number, and longer by the prompts
it takes in. Between two changes of the batch all steps are alike, so the model jumps from one
change to the next: an *epoch*. What waits is admitted in order (FIFO); when the KV cache is full,
the sequence admitted last is preempted and later computed again, as vLLM does.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class EngineModel:
    """How fast one engine is, and what it holds."""

    name: str
    max_num_seqs: int
    """Most sequences in a step."""
    max_num_batched_tokens: int
    """Most prompt tokens taken in by a step."""
    kv_tokens: int
    """Tokens that the KV cache holds."""
    curve: tuple[tuple[int, float], ...]
    """(running sequences, seconds of a decode step), linear between the points."""
    prefill_s: float
    """Seconds per prompt token."""

    @cached_property
    def step_s(self) -> list[float]:
        """Seconds of a step by the number of running sequences, 0 to ``max_num_seqs``."""
        running, seconds = zip(*self.curve, strict=True)
        times = np.interp(np.arange(self.max_num_seqs + 1), running, seconds)
        return [float(time) for time in times]

    @cached_property
    def token_s(self) -> float:
        """Seconds that a completion token costs at the engine's best rate."""
        return min(self.step_s[n] / n for n in range(1, self.max_num_seqs + 1))

    def work_s(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Engine seconds of so many tokens at the best rate: no schedule is faster."""
        return prompt_tokens * self.prefill_s + completion_tokens * self.token_s

    def alone_s(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Seconds that one request takes in an engine of its own."""
        return prompt_tokens * self.prefill_s + completion_tokens * min(self.step_s[1:])


@dataclass(slots=True)
class _Epoch:
    """Steps that are all alike."""

    start: float
    steps: int
    seconds: float
    """Of all of them."""
    cuttable: bool
    """Whether it may end sooner, at the end of any step."""


class SimulatedEngine:
    """The state of one engine. Time is the caller's: ``begin`` an epoch, ``end`` it when due."""

    def __init__(self, model: EngineModel) -> None:
        self._model = model
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._running: dict[int, tuple[int, int]] = {}
        """Sequence -> (step of its last token, prompt tokens less the step of its first token)."""
        self._finishes: list[tuple[int, int]] = []
        self._origins = 0
        self._steps = 0
        self._epoch: _Epoch | None = None
        self.preempted_now = 0
        """Sequences that were preempted as the epoch on its way began."""

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._waiting)

    @property
    def kv_used(self) -> int:
        """Tokens in the KV cache."""
        return self._origins + len(self._running) * self._steps

    @property
    def idle(self) -> bool:
        """Whether no epoch is on its way."""
        return self._epoch is None

    @property
    def epoch_steps(self) -> int:
        """Steps of the epoch that is on its way."""
        return self._epoch.steps if self._epoch else 0

    @property
    def epoch_s(self) -> float:
        """Seconds of the epoch that is on its way."""
        return self._epoch.seconds if self._epoch else 0.0

    def submit(self, request: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Let a request wait for its place."""
        assert prompt_tokens + completion_tokens <= self._model.kv_tokens, "it can never run"
        self._waiting.append((request, prompt_tokens, completion_tokens))

    def begin(self, now: float, most_steps: int | None = None) -> float | None:
        """Start the next epoch; when it ends, or None if there is nothing to do.

        Args:
            now: seconds.
            most_steps: of decoding, after which the caller wants to look again.
        """
        self._preempt()
        prompts = 0 if self.preempted_now else self._admit()
        count = len(self._running)
        if not count:
            return None
        step_s = self._model.step_s[count]
        if prompts:
            steps = max(1, math.ceil(prompts / self._model.max_num_batched_tokens))
            seconds = steps * step_s + prompts * self._model.prefill_s
            self._epoch = _Epoch(now, steps, seconds, cuttable=False)
        else:
            room = (self._model.kv_tokens - self.kv_used) // count
            steps = max(1, min(self._next_finish() - self._steps, room, most_steps or room))
            self._epoch = _Epoch(now, steps, steps * step_s, cuttable=True)
        return now + self._epoch.seconds

    def cut(self, now: float) -> float | None:
        """Something arrived: end the epoch after the step that is on its way, if a place is free.

        Returns:
            The new end, or None if the epoch stays as it is.
        """
        epoch = self._epoch
        if epoch is None or not epoch.cuttable or len(self._running) >= self._model.max_num_seqs:
            return None
        step_s = epoch.seconds / epoch.steps
        steps = max(1, math.ceil((now - epoch.start) / step_s))
        if steps >= epoch.steps:
            return None
        epoch.steps, epoch.seconds = steps, steps * step_s
        return epoch.start + epoch.seconds

    def end(self) -> list[int]:
        """The epoch is over; requests that finished with it."""
        assert self._epoch is not None
        self._steps += self._epoch.steps
        self._epoch = None
        done: list[int] = []
        while self._finishes and self._finishes[0][0] <= self._steps:
            finish, request = heapq.heappop(self._finishes)
            held = self._running.get(request)
            if held is not None and held[0] == finish:  # else preempted meanwhile
                del self._running[request]
                self._origins -= held[1]
                done.append(request)
        return done

    def _admit(self) -> int:
        """Fill the batch from what waits; prompt tokens that come in."""
        model, taken = self._model, 0
        while self._waiting and len(self._running) < model.max_num_seqs:
            request, prompt, completion = self._waiting[0]
            if taken and taken + prompt > model.max_num_batched_tokens:
                break
            count = len(self._running) + 1
            if self._running and self.kv_used + prompt + count > model.kv_tokens:
                break
            self._waiting.popleft()
            steps = max(1, math.ceil(prompt / model.max_num_batched_tokens))
            first = self._steps + steps
            finish = first + completion - 1
            self._running[request] = (finish, prompt + 1 - first)
            self._origins += prompt + 1 - first
            heapq.heappush(self._finishes, (finish, request))
            taken += prompt
        return taken

    def _preempt(self) -> None:
        """Make room for a token more of each sequence; the last admitted gives way."""
        self.preempted_now = 0
        while len(self._running) > 1 and (
            self.kv_used + len(self._running) > self._model.kv_tokens
        ):
            request, (finish, origin) = self._running.popitem()
            self._origins -= origin
            context, left = origin + self._steps, finish - self._steps
            self._waiting.appendleft((request, context, left))
            self.preempted_now += 1

    def _next_finish(self) -> int:
        while True:
            finish, request = self._finishes[0]
            held = self._running.get(request)
            if held is not None and held[0] == finish:
                return finish
            heapq.heappop(self._finishes)
