"""``jobs.nightly`` with its engine timed: the same command line, and ``BENCH_STAMPS``, a file."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from jobs.bench.timed_engine import start_timed_engine
from jobs.cli import run_job
from jobs.nightly import nightly, nightly_parser


def main() -> int:
    """Parse the command line and run the job; returns its exit code."""
    start_engine = partial(start_timed_engine, stamps=Path(os.environ["BENCH_STAMPS"]))
    job = partial(nightly, start_engine=start_engine)
    return run_job(job, nightly_parser("jobs.bench.timed_nightly"))


if __name__ == "__main__":
    sys.exit(main())
