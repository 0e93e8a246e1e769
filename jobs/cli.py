"""What every job's command line shares: arguments, logging, the last stdout line, exit codes.

Human text goes to stderr. Stdout carries one line, the last: the result as a JSON object. Worker
processes print where they like, so stdout is pointed at stderr until that line is written.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol

from jobs import signals
from jobs.signals import Interrupted, last_line
from pipeline.budget import Budget
from pipeline.dates import check_date
from pipeline.errors import ConfigError, ExitCode, PipelineError, UsageError
from pipeline.redact import configure_logging, redacted, redacted_text
from pipeline.report import Result, RunStatus, total

log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in this project's form: one sentence, exit 2, a JSON line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def plain_parser(module: str, purpose: str, epilog: str) -> argparse.ArgumentParser:
    """A parser without arguments, whose errors are this project's."""
    return _Parser(
        prog=f"python -m {module}",
        description=purpose,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def job_parser(module: str, purpose: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the arguments every job has."""
    parser = plain_parser(module, purpose, epilog)
    add_config_arguments(parser, required=True)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, input, output and cluster; say what would run; start no engine",
    )
    return parser


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """``--config`` and ``--set``, as ``load_config`` takes them."""
    parser.add_argument("--config", required=required, metavar="FILE", help="the job's YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        help="replace one value of the config, e.g. --set engine.replicas=4 (repeatable)",
    )
    parser.add_argument(
        "--date",
        action="append",
        dest="overrides",
        type=_date_override,
        metavar="YYYY-MM-DD",
        help="what {date} in the config's URIs stands for, today (UTC) by default; "
        "short for --set date=YYYY-MM-DD",
    )


def _date_override(text: str) -> str:
    try:
        return f"date={check_date(text)}"
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


class Ending(Protocol):
    """How a job ended, and what its last line says: a ``Result``, or what a job has instead."""

    @property
    def status(self) -> str: ...

    @property
    def error(self) -> str | None: ...

    @property
    def exit_code(self) -> ExitCode: ...

    def to_json(self) -> dict[str, Any]: ...


def run_job(
    job: Callable[[argparse.Namespace], Ending],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    remedy: str = "the same command resumes",
) -> int:
    """Run ``job``, turn its errors into a result, print the result, return the exit code.

    Args:
        job: the job.
        parser: of its command line.
        argv: the command line; None: this process's.
        remedy: what to do once a signal has stopped it.
    """
    started = time.monotonic()
    arguments: argparse.Namespace | ConfigError
    try:
        arguments = parser.parse_args(argv)  # prints --help itself, on the real stdout
    except ConfigError as error:
        arguments = error
    last_line.begin(remedy)
    with _stdout_for_result(), signals.listening():
        _log_to_stderr()
        try:
            if isinstance(arguments, ConfigError):
                raise arguments
            result: Ending = job(arguments)
        except UsageError as error:
            result = _failure(RunStatus.INVALID, str(error), started)
        except PipelineError as error:
            result = _failure(RunStatus.FAILED, str(error), started)
        except Interrupted as error:
            result = _failure(RunStatus.INTERRUPTED, str(error), started)
        except SystemExit:  # Ray's own SIGTERM handler, where the job began to listen too late
            error_text = f"stopped by SIGTERM while Ray was starting; {remedy}"
            result = _failure(RunStatus.INTERRUPTED, error_text, started)
        except Exception as error:  # a defect of ours, told whole and in the contract's form
            log.exception("this is a defect; please report it with the lines below")
            message = f"unexpected {type(error).__name__}: {error}"
            result = _failure(RunStatus.FAILED, message, started)
        with suppress(OSError):  # nobody may read it; the last line is to come in any case
            if result.error:
                sys.stderr.write(redacted_text(f"{result.status}: {result.error}\n"))
            sys.stderr.flush()
        last_line.write(json.dumps(redacted(result.to_json())), int(result.exit_code))
        if signals.heard() is not None:  # nothing is left to wait for: no thread, no hook
            os._exit(int(result.exit_code))
    return int(result.exit_code)


def name_run(uri: str) -> None:
    """Name the run in the last line of a job that ends without a result; the first name counts."""
    if last_line.run is None:
        last_line.run = redacted_text(uri)


def end_budget() -> Budget:
    """What there is to end in order; no bound unless a signal was noted."""
    return Budget(signals.end_by())


def _failure(status: RunStatus, error: str, started: float) -> Result:
    return Result(
        status=status,
        run=last_line.run,
        rows_total=0,
        totals=total([]),
        seconds=time.monotonic() - started,
        error=error,
    )


@contextmanager
def _stdout_for_result() -> Iterator[None]:
    """Point file descriptor 1 at stderr; the last line goes to the real stdout."""
    sys.stdout.flush()
    real = last_line.fd = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        last_line.fd = 1
        os.dup2(real, 1)
        os.close(real)


def _log_to_stderr() -> None:
    configure_logging(logging.WARNING, "%(asctime)s %(levelname)s %(message)s", times="%H:%M:%S")
    for name in ("pipeline", "jobs", "cluster", "__main__"):  # a job run with -m logs as __main__
        logging.getLogger(name).setLevel(logging.INFO)
