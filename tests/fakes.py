"""Hand-written stand-ins behind the project's own protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace

from pipeline.admission import EngineLoad
from pipeline.cpu import Meter
from pipeline.digests import digest_tokens
from pipeline.engine import EngineOutput, EngineRequest
from pipeline.errors import EngineError, ErrorCode, RowError
from pipeline.images import decode

_STEP_S = 0.005


class EchoEngine:
    """Answers each request with a text that depends on the request alone, after ``delay_s``.

    At most ``seats`` requests are at work, the others wait. Prompts that hold ``refuse_token`` are
    refused; ``die_token`` kills the engine, and all requests inside it; ``hang_token`` makes it
    stand still, ``slow_token`` takes a request for ever. The next ``faults`` are raised by the
    requests that come first, one each.
    """

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        seats: int = 64,
        refuse_token: int = -1,
        die_token: int = -1,
        hang_token: int = -1,
        slow_token: int = -1,
        finish_reason: str = "stop",
        faults: Sequence[BaseException] = (),
    ) -> None:
        self.delay_s = delay_s
        self.finish_reason = finish_reason
        self.faults = [*faults]
        self.refuse_token = refuse_token
        self.die_token = die_token
        self.hang_token = hang_token
        self.slow_token = slow_token
        self.running = 0
        self.peak = 0
        self.stopped = 0
        self.aborted: list[str] = []
        self.requests: list[EngineRequest] = []
        self._seats = asyncio.Semaphore(seats)
        self._seated = 0
        self._finished = 0
        self._on_step: Callable[[EngineLoad], None] | None = None
        self._next_step: asyncio.TimerHandle | None = None
        self._dead = asyncio.Event()
        self._hung = False

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """Text: the seed and the number of prompt tokens."""
        self.requests.append(request)
        if self.faults:
            raise self.faults.pop(0)
        if self.refuse_token in request.token_ids:
            raise RowError(ErrorCode.ENGINE_REJECTED, "refused")
        for image in request.images:
            decode(image)
        if request.on_entry is not None:
            request.on_entry()
        self.running += 1
        self.peak = max(self.peak, self.running)
        self._plan_step()
        try:
            async with self._seats:
                self._seated += 1
                try:
                    await self._work(request)
                finally:
                    self._seated -= 1
                    self._finished += 1
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        finally:
            self.running -= 1
        text = f"{request.seed}:{len(request.token_ids)}"
        return EngineOutput(
            text,
            self.finish_reason,
            len(request.token_ids),
            len(text),
            0,
            completion_digest=digest_tokens(list(text.encode())),
        )

    def listen(self, on_step: Callable[[EngineLoad], None], _cpu: Meter) -> None:
        """One listener; steps come while there is work, unless the engine hangs."""
        self._on_step = on_step

    def _plan_step(self) -> None:
        if self._next_step is None:
            self._next_step = asyncio.get_running_loop().call_later(_STEP_S, self._step)

    def _step(self) -> None:
        self._next_step = None
        if self._on_step is not None and not self._hung:
            waiting = self.running - self._seated
            self._on_step(EngineLoad(self._seated, waiting, self._finished))
        self._finished = 0
        if self.running:
            self._plan_step()

    def shutdown(self) -> None:
        """Count the stops."""
        self.stopped += 1

    def kill(self) -> None:
        """Die now, as if the machine had ended the engine's processes."""
        self._dead.set()

    async def _work(self, request: EngineRequest) -> None:
        if self.die_token in request.token_ids:
            await asyncio.sleep(self.delay_s / 2)
            self.kill()
        if self.hang_token in request.token_ids:
            self._hung = True
        if self._hung or self.slow_token in request.token_ids:
            await self._dead.wait()
        if not self._dead.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._dead.wait(), self.delay_s)
        if self._dead.is_set():
            raise EngineError("died")


class FinishedRequest(SimpleNamespace):
    """vLLM's ``FinishedRequestStats``, as far as it is read."""

    def __init__(self, reason: str, latency_s: float, queued_s: float, per_token_s: float) -> None:
        super().__init__(
            finish_reason=reason,
            e2e_latency=latency_s,
            queued_time=queued_s,
            mean_time_per_output_token=per_token_s,
        )


class StepLoad(SimpleNamespace):
    """vLLM's ``SchedulerStats``, likewise."""

    def __init__(
        self, running: int, waiting: int, skipped: int, usage: float, *, queries: int, hits: int
    ) -> None:
        super().__init__(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_skipped_waiting_reqs=skipped,
            kv_cache_usage=usage,
            prefix_cache_stats=SimpleNamespace(queries=queries, hits=hits),
        )


class Step(SimpleNamespace):
    """vLLM's ``IterationStats``, likewise."""

    def __init__(
        self,
        prompt: int,
        preempted: int,
        generated: int,
        first_token_s: Sequence[float],
        finished: Sequence[FinishedRequest],
    ) -> None:
        super().__init__(
            num_prompt_tokens=prompt,
            num_preempted_reqs=preempted,
            num_generation_tokens=generated,
            time_to_first_tokens_iter=first_token_s,
            finished_requests=finished,
        )
