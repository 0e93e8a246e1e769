"""An engine that answers at once: what is left of a run is the pipeline's own cost.

``python -m jobs.bench.null_engine --config FILE``: ``jobs.nightly`` with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from jobs.cli import run_job
from jobs.nightly import nightly, nightly_parser
from pipeline.admission import EngineLoad
from pipeline.cpu import Meter
from pipeline.engine import EngineOutput, EngineRequest, Renderer
from pipeline.engine_spec import EngineSpec

_TEXT = "The answer is known at once."
_TOKENS = 8


class NullEngine:
    """Answers each request with the same short text; runs nothing, but decodes the images."""

    def __init__(self) -> None:
        self._renderer = Renderer(lambda prompts: prompts)
        self._on_step: Callable[[EngineLoad], None] | None = None

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """See ``Engine.generate``."""
        await self._renderer.render(request)
        prompt = len(request.token_ids)
        if self._on_step is not None:
            done = EngineLoad(0, 0, 1, prompt_tokens=prompt, completion_tokens=_TOKENS)
            self._on_step(done)
        return EngineOutput(_TEXT, "stop", prompt, _TOKENS, 0)

    def listen(self, on_step: Callable[[EngineLoad], None], cpu: Meter) -> None:
        """See ``Engine.listen``; an answer is a step."""
        self._on_step = on_step
        self._renderer.cpu = cpu

    def shutdown(self) -> None:
        """See ``Engine.shutdown``."""
        self._renderer.shutdown()


def start_null_engine(_spec: EngineSpec) -> NullEngine:
    """What ``jobs.nightly`` takes for ``start_engine``."""
    return NullEngine()


def main() -> int:
    """The nightly job's command line, unchanged."""
    job = partial(nightly, start_engine=start_null_engine)
    return run_job(job, nightly_parser("jobs.bench.null_engine"))


if __name__ == "__main__":
    sys.exit(main())
