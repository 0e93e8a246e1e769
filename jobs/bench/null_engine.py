"""An engine that answers at once: what is left of a run is the pipeline's own cost.

``python -m jobs.bench.null_engine --config FILE``: ``jobs.nightly`` with it.
"""

from __future__ import annotations

import sys
from functools import partial

from jobs.cli import run_job
from jobs.nightly import nightly, nightly_parser
from pipeline.engine import EngineOutput, EngineRequest, EngineSpec

_TEXT = "The answer is known at once."
_TOKENS = 8


class NullEngine:
    """Answers each request with the same short text; runs nothing."""

    def __init__(self) -> None:
        self._answered = 0

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """See ``Engine.generate``."""
        self._answered += 1
        return EngineOutput(_TEXT, "stop", len(request.token_ids), _TOKENS, 0)

    def progress(self) -> int:
        """Requests answered."""
        return self._answered

    def shutdown(self) -> None:
        """Nothing was started."""


def start_null_engine(_spec: EngineSpec) -> NullEngine:
    """What ``jobs.nightly`` takes for ``start_engine``."""
    return NullEngine()


def main() -> int:
    """The nightly job's command line, unchanged."""
    job = partial(nightly, start_engine=start_null_engine)
    return run_job(job, nightly_parser("jobs.bench.null_engine"))


if __name__ == "__main__":
    sys.exit(main())
