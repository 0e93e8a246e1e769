"""The last line on stdout: which run, which status, which exit code, however a job ends."""

import argparse
import json
import signal
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from jobs.cli import job_parser, name_run, run_job
from pipeline.errors import CapacityError, RunBusyError
from pipeline.report import Result

RUN = "file:///somewhere/run"


@pytest.fixture
def last_line(
    capfd: pytest.CaptureFixture[str],
) -> Callable[[Callable[[], NoReturn]], dict[str, Any]]:
    """What is printed when a job that knows its run ends so; signal handlers are put back."""

    def ended(end: Callable[[], NoReturn]) -> dict[str, Any]:
        def job(_: argparse.Namespace) -> Result:
            name_run(RUN)
            end()

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        try:
            code = run_job(job, job_parser("tests", "A job.", ""), ["--config", "none.yaml"])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        document: dict[str, Any] = json.loads(capfd.readouterr().out)
        assert document["exit_code"] == code
        return document

    return ended


def fail(error: BaseException) -> NoReturn:
    raise error


@pytest.mark.parametrize(
    ("end", "status", "code", "words"),
    [
        (lambda: fail(RunBusyError("busy")), "failed", 1, "busy"),
        (lambda: fail(CapacityError("too small")), "invalid", 2, "too small"),
        (lambda: fail(KeyError("x")), "failed", 1, "unexpected KeyError"),
        # what Ray's handlers do while it starts: they replace the job's own
        (lambda: fail(SystemExit(15)), "interrupted", 75, "stopped by SIGTERM while Ray"),
        (lambda: fail(SystemExit(1)), "interrupted", 75, "stopped by SIGTERM while Ray"),
    ],
)
def test_a_failure_names_the_run_and_the_reason(
    last_line: Callable[[Callable[[], NoReturn]], dict[str, Any]],
    end: Callable[[], NoReturn],
    status: str,
    code: int,
    words: str,
) -> None:
    document = last_line(end)
    assert (document["status"], document["exit_code"], document["run"]) == (status, code, RUN)
    assert words in document["error"]


def test_a_run_is_not_named_by_the_next_job(
    last_line: Callable[[Callable[[], NoReturn]], dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    last_line(lambda: fail(RunBusyError("busy")))
    assert run_job(lambda _: fail(AssertionError()), job_parser("tests", "A job.", ""), []) == 2
    assert json.loads(capfd.readouterr().out)["run"] is None
