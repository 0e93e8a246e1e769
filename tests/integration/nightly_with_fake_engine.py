"""``jobs.nightly`` with the echo engine in place of vLLM; run by test_nightly_flow."""

import os
import sys
from functools import partial

from jobs.cli import job_parser, run_job
from jobs.nightly import nightly
from pipeline.engine import EngineSpec
from tests.fakes import EchoEngine


def start(_spec: EngineSpec, *, delay_s: float) -> EchoEngine:
    """Called on the replica's node."""
    return EchoEngine(delay_s=delay_s)


def main() -> int:
    """The job's command line, unchanged."""
    arguments = job_parser("tests", "nightly with a fake engine", "").parse_args()
    delay_s = float(os.environ.get("FAKE_ENGINE_DELAY_S", "0.01"))
    return run_job(lambda: nightly(arguments, start_engine=partial(start, delay_s=delay_s)))


if __name__ == "__main__":
    sys.exit(main())
