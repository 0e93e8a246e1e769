"""``jobs.nightly`` with the echo engine in place of vLLM; run by test_nightly_flow."""

import os
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from jobs.cli import run_job
from jobs.nightly import nightly, nightly_parser
from pipeline.engine import EngineOutput, EngineRequest
from pipeline.engine_spec import EngineSpec
from pipeline.errors import EngineRefusalError
from pipeline.experts import ExpertLayout, load_of
from tests.fakes import EchoEngine


class LogNormalEngine(EchoEngine):
    """Completions of log-normal lengths, by their seeds, cut at what their rows allow."""

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """The echo's text; only the number of tokens and the finish reason differ."""
        output = await super().generate(request)
        natural = 1 + int(random.Random(request.seed).lognormvariate(3.3, 0.9))
        limit = request.sampling.max_completion_tokens
        reason = "length" if natural > limit else "stop"
        return replace(output, completion_tokens=min(natural, limit), finish_reason=reason)


class RoutingEngine(EchoEngine):
    """Tells where tokens went as vLLM does: of four layers the second and the last have experts,
    and send all to expert 2."""

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """The echo's answer."""
        output = await super().generate(request)
        routed = np.full((output.prompt_tokens + output.completion_tokens - 1, 4, 1), 2, np.uint8)
        layout = ExpertLayout((1, 3), 8)
        return replace(output, experts=load_of(routed, output.cached_tokens, layout))


class CountingEngine(EchoEngine):
    """Writes down each request that came in, by its seed, in a file of its own process."""

    def __init__(self, folder: Path, *, delay_s: float, seats: int) -> None:
        super().__init__(delay_s=delay_s, seats=seats)
        self._calls = (folder / str(os.getpid())).open("a", buffering=1, encoding="utf-8")

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """The echo's."""
        self._calls.write(f"{request.seed}\n")
        return await super().generate(request)


class EndingEngine(EchoEngine):
    """Ends its own process at a row that holds "~"."""

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """The echo's."""
        if ord("~") in request.token_ids:
            os._exit(1)
        return await super().generate(request)


class PatientEngine(EchoEngine):
    """Takes its time until a file appears."""

    def __init__(self, hurry: Path, *, delay_s: float, seats: int) -> None:
        super().__init__(delay_s=delay_s, seats=seats)
        self._hurry = hurry

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """The echo's."""
        if self.delay_s and self._hurry.exists():
            self.delay_s = 0.0
        return await super().generate(request)


def start(spec: EngineSpec, *, delay_s: float, fault: str, calls: str, hurry: str) -> EchoEngine:
    """Called on the replica's node; ``fault`` is "", "start", "die", "poison", "exit" or "lengths",
    which is none, but another engine, as are the one that writes its requests into the folder
    ``calls`` and the one that hurries once the file ``hurry`` is there.

    As many requests are at work as vLLM would take into one step.
    """
    if fault == "start":
        raise EngineRefusalError("the weights are not there")
    # every prompt of the test has the token of "S", a few have that of "~"
    killers = {"die": ord("S"), "poison": ord("~")}
    seats = spec.engine_args["max_num_seqs"]
    if calls:
        return CountingEngine(Path(calls), delay_s=delay_s, seats=seats)
    if hurry:
        return PatientEngine(Path(hurry), delay_s=delay_s, seats=seats)
    if fault == "exit":
        return EndingEngine(delay_s=delay_s, seats=seats)
    if fault == "lengths":
        return LogNormalEngine(delay_s=delay_s, seats=seats)
    counts = spec.engine_args.get("enable_return_routed_experts")
    kind = RoutingEngine if counts else EchoEngine
    return kind(delay_s=delay_s, seats=seats, die_token=killers.get(fault, -1))


def main() -> int:
    """The job's command line, unchanged."""
    delay_s = float(os.environ.get("FAKE_ENGINE_DELAY_S", "0.01"))
    fault = os.environ.get("FAKE_ENGINE_FAULT", "")
    calls = os.environ.get("FAKE_ENGINE_CALLS", "")
    hurry = os.environ.get("FAKE_ENGINE_HURRY", "")
    start_engine = partial(start, delay_s=delay_s, fault=fault, calls=calls, hurry=hurry)
    return run_job(partial(nightly, start_engine=start_engine), nightly_parser("tests"))


if __name__ == "__main__":
    sys.exit(main())
