"""``jobs.nightly`` with an engine that can be killed by a row; the command line is the job's.

The environment says which: CHAOS_LEDGER, the ledger's file; CHAOS_ECHO_DELAY_S, if set, takes the
echo engine, which answers after that time, instead of vLLM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jobs.cli import run_job
from jobs.nightly import nightly, nightly_parser
from pipeline.engine import Engine
from pipeline.engine_spec import EngineSpec
from tests.chaos.fragile_engine import start_fragile_echo, start_fragile_vllm

LEDGER_VARIABLE = "CHAOS_LEDGER"
ECHO_VARIABLE = "CHAOS_ECHO_DELAY_S"


def main() -> int:
    """The job's exit code."""
    parser = nightly_parser("tests.chaos.nightly")
    return run_job(partial(nightly, start_engine=_start_engine()), parser)


def _start_engine() -> Callable[[EngineSpec], Engine]:
    ledger = Path(os.environ[LEDGER_VARIABLE])
    delay = os.environ.get(ECHO_VARIABLE)
    if delay is None:
        return partial(start_fragile_vllm, ledger=ledger)
    return partial(start_fragile_echo, ledger=ledger, delay_s=float(delay))


if __name__ == "__main__":
    sys.exit(main())
