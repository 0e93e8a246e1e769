"""An engine that notes when its first request entered and its last one left; for the benchmark.

It adds a counter and a look at the clock to each request, which no profile shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.bench.requests import WARM_UP_REQUESTS, WARM_UP_TOKENS
from jobs.bench.stamps import Stamps
from pipeline.admission import EngineLoad
from pipeline.cpu import Meter
from pipeline.engine import Engine, EngineOutput, EngineRequest, VLLMEngine
from pipeline.engine_spec import EngineSpec


class TimedEngine:
    """An ``Engine`` that warms another one up before the clock, and stamps what it does then."""

    def __init__(self, engine: Engine, stamps: Stamps) -> None:
        self._engine = engine
        self._stamps = stamps
        self._warming = asyncio.Lock()
        self._warm = False

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """See ``Engine.generate``. The first call warms the engine up, others wait for it."""
        if not self._warm:
            await self._warm_up(request)
        self._stamps.enter()
        try:
            return await self._engine.generate(request)
        finally:
            self._stamps.leave()

    def listen(self, on_step: Callable[[EngineLoad], None], cpu: Meter) -> None:
        """See ``Engine.listen``. The warm-up's steps are nobody's: they would widen a window."""
        self._engine.listen(lambda load: on_step(load) if self._warm else None, cpu)

    def shutdown(self) -> None:
        """See ``Engine.shutdown``."""
        self._engine.shutdown()

    async def _warm_up(self, request: EngineRequest) -> None:
        """Copies of the first request, cut short; every contender that can does the same."""
        async with self._warming:
            if self._warm:
                return
            short = request.sampling.model_copy(update={"max_completion_tokens": WARM_UP_TOKENS})
            copies = (
                replace(request, request_id=f"warm-up-{i}", sampling=short, seed=i)
                for i in range(WARM_UP_REQUESTS)
            )
            await asyncio.gather(*(self._engine.generate(copy) for copy in copies))
            self._warm = True


def start_timed_engine(spec: EngineSpec, *, stamps: Path) -> TimedEngine:
    """Called on the replica's node: vLLM, timed."""
    return TimedEngine(VLLMEngine(spec), Stamps(stamps))
