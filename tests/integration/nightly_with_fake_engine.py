"""``jobs.nightly`` with the echo engine in place of vLLM; run by test_nightly_flow."""

import os
import sys
from functools import partial

from jobs.cli import run_job
from jobs.nightly import nightly, nightly_parser
from pipeline.engine import EngineSpec
from pipeline.errors import EngineRefusalError
from tests.fakes import EchoEngine


def start(spec: EngineSpec, *, delay_s: float, fault: str) -> EchoEngine:
    """Called on the replica's node; ``fault`` is "", "start", "die" or "poison".

    As many requests are at work as vLLM would take into one step.
    """
    if fault == "start":
        raise EngineRefusalError("the weights are not there")
    # every prompt of the test has the token of "S", a few have that of "~"
    killers = {"die": ord("S"), "poison": ord("~")}
    seats = spec.engine_args["max_num_seqs"]
    return EchoEngine(delay_s=delay_s, seats=seats, die_token=killers.get(fault, -1))


def main() -> int:
    """The job's command line, unchanged."""
    delay_s = float(os.environ.get("FAKE_ENGINE_DELAY_S", "0.01"))
    fault = os.environ.get("FAKE_ENGINE_FAULT", "")
    start_engine = partial(start, delay_s=delay_s, fault=fault)
    return run_job(partial(nightly, start_engine=start_engine), nightly_parser("tests"))


if __name__ == "__main__":
    sys.exit(main())
