"""Dataset annotation: a YAML task over the rows of a dataset, the dataset with typed answers out.

``python -m jobs.annotate --config FILE [--set key.path=value ...] [--dry-run] [--retry WORDS] ...``

The config is the nightly job's with a ``task``. The same command twice is safe: it goes on with
what is left, or finds the dataset finished and generates nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from jobs.annotate.config import AnnotateConfig
from jobs.annotate.job import annotate
from jobs.cli import job_parser, run_job
from jobs.nightly import add_run_arguments, options, overrides
from pipeline.config import load_config_as
from pipeline.engine import Engine, VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.report import Result

_EPILOG = """\
exit codes: 0 done, 1 failed, 2 bad config or input, 3 above limits.max_error_rate,
            75 interrupted (run the same command again to resume) or past limits.deadline

examples:
  python -m jobs.annotate --config jobs/configs/annotate-digits.yaml --dry-run
  python -m jobs.annotate --config jobs/configs/annotate-text.yaml \\
      --set input.uri=jobs/sample/feedback/ --set output.uri=out/feedback
  python -m jobs.annotate --config task.yaml --retry expired,image_fetch_failed
"""


def annotate_parser(module: str) -> argparse.ArgumentParser:
    """The job's command line."""
    parser = job_parser(module, "Ask a model about each row of a dataset.", _EPILOG)
    add_run_arguments(parser)
    return parser


def annotate_job(
    arguments: argparse.Namespace, *, start_engine: Callable[[EngineSpec], Engine] = VLLMEngine
) -> Result:
    """Run the job that the command line asks for.

    Args:
        arguments: as ``annotate_parser`` gives them.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError, PipelineError: as ``annotate``.
    """
    config = load_config_as(AnnotateConfig, arguments.config, overrides(arguments, AnnotateConfig))
    return annotate(config, options(arguments), start_engine=start_engine)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job; returns the exit code."""
    return run_job(annotate_job, annotate_parser("jobs.annotate"), argv)


if __name__ == "__main__":
    sys.exit(main())
