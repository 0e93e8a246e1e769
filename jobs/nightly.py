"""The main job: prompts and images in (Parquet or OpenAI batch JSONL), completions out.

``python -m jobs.nightly --config FILE [--set key.path=value ...] [--dry-run] [--retry WORDS] ...``

Uses the Ray cluster in ``RAY_ADDRESS``, else starts Ray in this process. The same command twice is
safe: it resumes what is left, or finds the run finished and generates nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from jobs.batch import run_batch
from jobs.cli import job_parser, run_job
from jobs.latest import DatedKind, resume_latest
from jobs.settle import Options
from pipeline.config import JobConfig, load_config
from pipeline.engine import Engine, VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import ConfigError
from pipeline.reopen import parse_retry
from pipeline.report import Result

_EPILOG = """\
exit codes: 0 done, 1 failed, 2 bad config or input, 3 above limits.max_error_rate,
            75 interrupted (run the same command again to resume) or past limits.deadline

examples:
  python -m jobs.nightly --config jobs/configs/sample.yaml --dry-run
  python -m jobs.nightly --config nightly.yaml --set output.uri=s3://batch/runs/today
  python -m jobs.nightly --config nightly.yaml --resume-latest
  python -m jobs.nightly --config nightly.yaml --date 2026-11-22
  python -m jobs.nightly --config nightly.yaml --retry expired,timeout
  ray job submit --working-dir . -- python -m jobs.nightly --config nightly.yaml
"""


def nightly_parser(module: str) -> argparse.ArgumentParser:
    """The job's command line."""
    parser = job_parser(module, "Run a batch of prompts through the model.", _EPILOG)
    add_run_arguments(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that become ``Options``, of every job that runs a batch."""
    parser.add_argument(
        "--retry",
        metavar="WORDS",
        help="do these records again, finished run or not: expired, errored or error codes, e.g. "
        "expired,timeout; all others stay",
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait for another driver of the run, not fail"
    )
    parser.add_argument(
        "--resume-latest",
        action="store_true",
        help="if output.uri has {date}: go on with its newest run that is not finished, whatever "
        "its day, else with today's",
    )
    parser.add_argument(
        "--new-run",
        action="store_true",
        help="discard the run that output.uri holds, and start over there",
    )
    parser.add_argument(
        "--accept-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although KEY (seed, sampling or model) changed; rows done stay (repeatable)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job; returns the exit code."""
    return run_job(nightly, nightly_parser("jobs.nightly"), argv)


def nightly(
    arguments: argparse.Namespace, *, start_engine: Callable[[EngineSpec], Engine] = VLLMEngine
) -> Result:
    """Run the job that the command line asks for.

    Args:
        arguments: as ``nightly_parser`` gives them.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError: config, input, output folder or cluster do not fit; nothing was started.
        PipelineError: the run failed; what is committed stays and the same command resumes.
    """
    config = load_config(arguments.config, overrides(arguments))
    return run_batch(config, options(arguments), start_engine=start_engine)


def overrides(arguments: argparse.Namespace, kind: DatedKind = JobConfig) -> list[str]:
    """What the arguments of ``nightly_parser`` replace in the config, one of ``kind``.

    Raises:
        UsageError: ``--resume-latest`` does not fit the config, or its bucket cannot be reached.
        StorageError: it cannot look for runs.
    """
    given: list[str] = arguments.overrides
    if not arguments.resume_latest:
        return given
    if arguments.new_run:
        raise ConfigError("give --resume-latest or --new-run, not both.")
    return resume_latest(arguments.config, given, kind)


def options(arguments: argparse.Namespace) -> Options:
    """What the arguments of ``nightly_parser`` say of the start."""
    return Options(
        retry=parse_retry(arguments.retry) if arguments.retry is not None else frozenset(),
        new_run=arguments.new_run,
        accept_changed=tuple(arguments.accept_changed),
        wait=arguments.wait,
        dry_run=arguments.dry_run,
    )


if __name__ == "__main__":
    sys.exit(main())
