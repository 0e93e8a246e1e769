"""What every job's command line shares: arguments, logging, the last stdout line, exit codes.

Human text goes to stderr. Stdout carries one line, the last: the result as a JSON object. Worker
processes print where they like, so stdout is pointed at stderr until that line is written.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Protocol

from pipeline.dates import check_date
from pipeline.errors import ConfigError, ExitCode, PipelineError, UsageError
from pipeline.redact import configure_logging, redacted, redacted_text
from pipeline.report import Result, RunStatus, total

log = logging.getLogger(__name__)

_result_fd = 1
"""Where the last line goes while descriptor 1 points at stderr."""
_run_uri: str | None = None
"""The run that the last line names if it tells of a failure, once the job knows it."""


class Interrupted(BaseException):
    """SIGTERM or SIGINT: stop now, what is committed stays. Not an error: nothing may eat it."""


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
) -> int:
    """Run ``job``, turn its errors into a result, print the result, return the exit code."""
    global _run_uri
    _run_uri = None
    started = time.monotonic()
    arguments: argparse.Namespace | ConfigError
    try:
        arguments = parser.parse_args(argv)  # prints --help itself, on the real stdout
    except ConfigError as error:
        arguments = error
    with _stdout_for_result() as print_result:
        _log_to_stderr()
        signal.signal(signal.SIGTERM, raise_interrupted)
        signal.signal(signal.SIGINT, raise_interrupted)
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
        except SystemExit:  # Ray's own SIGTERM handler, until ray.init is through
            error_text = "stopped by SIGTERM while Ray was starting; the same command resumes"
            result = _failure(RunStatus.INTERRUPTED, error_text, started)
        except Exception as error:  # a defect of ours, told whole and in the contract's form
            log.exception("this is a defect; please report it with the lines below")
            message = f"unexpected {type(error).__name__}: {error}"
            result = _failure(RunStatus.FAILED, message, started)
        if result.error:
            sys.stderr.write(redacted_text(f"{result.status}: {result.error}\n"))
        sys.stderr.flush()
        print_result(json.dumps(redacted(result.to_json())))
    return int(result.exit_code)


def raise_interrupted(number: int, _frame: FrameType | None) -> None:
    """Signal handler: raise ``Interrupted`` in the main thread."""
    raise Interrupted(f"stopped by {signal.Signals(number).name}; the same command resumes")


def name_run(uri: str) -> None:
    """Tell which run it is, for the last line of a job that ends without a result of its own."""
    global _run_uri
    _run_uri = uri


def _failure(status: RunStatus, error: str, started: float) -> Result:
    return Result(
        status=status,
        run=_run_uri,
        rows_total=0,
        totals=total([]),
        seconds=time.monotonic() - started,
        error=error,
    )


@contextmanager
def first_signal(tell: Callable[[str], None]) -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT is only told (by name), the second ends the process."""
    told: list[str] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if told:
            _exit_at_once(name)
        told.append(name)
        sys.stderr.write(f"{name}: keeping what is finished, then exit; once more = at once\n")
        tell(name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_at_once(signal_name: str) -> NoReturn:
    """The contract's last line, and nothing else: no report, no clean shutdown."""
    message = f"stopped at once by a second signal ({signal_name}); the same command resumes"
    result = _failure(RunStatus.INTERRUPTED, message, time.monotonic())
    os.write(_result_fd, (json.dumps(result.to_json()) + "\n").encode())
    os._exit(int(result.exit_code))


@contextmanager
def _stdout_for_result() -> Iterator[Callable[[str], None]]:
    """Point file descriptor 1 at stderr; yield a function that writes to the real stdout."""
    global _result_fd
    sys.stdout.flush()
    real = _result_fd = os.dup(1)
    os.dup2(2, 1)

    def write(line: str) -> None:
        sys.stdout.flush()
        os.write(real, (line + "\n").encode())

    try:
        yield write
    finally:
        os.dup2(real, 1)
        os.close(real)


def _log_to_stderr() -> None:
    configure_logging(logging.WARNING, "%(asctime)s %(levelname)s %(message)s", times="%H:%M:%S")
    for name in ("pipeline", "jobs", "cluster", "__main__"):  # a job run with -m logs as __main__
        logging.getLogger(name).setLevel(logging.INFO)
