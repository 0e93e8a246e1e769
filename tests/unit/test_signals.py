"""What SIGTERM and SIGINT do to a job, whatever it is doing and whoever started it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.report import Result, RunStatus, total
from tests.waiting import wait_until

PRELUDE = """
import argparse, os, signal, subprocess, sys, time
from jobs import signals
from jobs.cli import job_parser, name_run, run_job
from pipeline.report import Result, RunStatus, total

def ready():
    print("ready", file=sys.stderr, flush=True)

def result():
    return Result(status=RunStatus.COMPLETE, run="s3://b/run", rows_total=0, totals=total([]),
        seconds=0.0)

def job(_):
    name_run("s3://b/run")
"""
RUN = """
sys.exit(run_job(job, job_parser("tests", "A job.", ""), ["--config", "none.yaml"]))
"""
NUMBERS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


class Running:
    """A job that was started."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def wait_for(self, words: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return
        raise AssertionError(f"it ended without a word of {words!r}")

    def end(self) -> dict[str, Any]:
        stdout, stderr = self.process.communicate(timeout=60)
        (line,) = stdout.splitlines()
        document: dict[str, Any] = json.loads(line)
        assert document["exit_code"] == self.process.returncode, stderr
        assert "Traceback" not in stderr
        assert "defect" not in stderr
        return document


@contextmanager
def started(body: str, *, ignored: bool = False, early: bool = False) -> Iterator[Running]:
    """A job whose body is this code; with SIGINT ignored, as a shell's background jobs have it; or
    listening before anything starts a thread, as the commands do."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    listen = "from jobs import signals\nsignals.listen()\n" if early else ""
    program = listen + PRELUDE + lines + RUN
    ignore = "trap '' INT; " if ignored else ""
    with subprocess.Popen(
        ["/bin/sh", "-c", f'{ignore}exec "$@"', "sh", sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def assert_interrupted(document: dict[str, Any], words: str) -> None:
    found = (document["status"], document["exit_code"], document["run"])
    assert found == ("interrupted", 75, "s3://b/run")
    assert words in document["error"]


@NUMBERS
def test_a_job_that_hangs_ends_at_once_with_all_below_it(number: signal.Signals) -> None:
    body = """
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print("child", child.pid, file=sys.stderr)
ready()
os.read(os.pipe()[0], 1)
"""
    with started(body) as job:
        assert job.process.stderr is not None
        child = psutil.Process(int(job.process.stderr.readline().split()[1]))
        job.wait_for("ready")
        job.process.send_signal(number)
        document = job.end()
    assert_interrupted(document, f"stopped by {number.name}; the same command resumes")
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    like = Result(RunStatus.INTERRUPTED, "s3://b/run", 0, total([]), 0.0, error="").to_json()
    assert list(document) == list(like)
    assert {key: document[key] for key in ("rows", "tokens")} == {
        key: like[key] for key in ("rows", "tokens")
    }


def test_nothing_is_raised_in_the_code_that_happens_to_run() -> None:
    body = """
with signals.deferred(60):
    ready()
    try:
        while signals.heard() is None:
            pass
    finally:
        time.sleep(0.2)
    print("unharmed", file=sys.stderr)
    signals.check()
"""
    with started(body) as job:
        job.wait_for("ready")
        job.process.send_signal(signal.SIGINT)
        job.wait_for("once more = at once")
        job.wait_for("unharmed")
        assert_interrupted(job.end(), "stopped by SIGINT; the same")


def test_a_second_signal_ends_what_was_to_end_in_order() -> None:
    body = """
with signals.deferred(1000):
    ready()
    time.sleep(1000)
"""
    with started(body) as job:
        job.wait_for("ready")
        job.process.send_signal(signal.SIGTERM)
        job.wait_for("once more = at once")
        job.process.send_signal(signal.SIGINT)
        assert_interrupted(job.end(), "stopped at once by a second signal (SIGINT)")


def test_an_end_in_order_that_takes_too_long_is_cut_short() -> None:
    body = """
with signals.deferred(0.5):
    ready()
    time.sleep(1000)
"""
    with started(body) as job:
        job.wait_for("ready")
        job.process.send_signal(signal.SIGTERM)
        assert_interrupted(job.end(), "stopped by SIGTERM, and cut short")


@pytest.mark.parametrize(
    "reader",
    ["os.close(reader)", "os.set_blocking(writer, False); fill(writer)"],
    ids=["is gone", "takes nothing"],
)
def test_a_reader_of_stderr_that_fails_keeps_no_job_from_its_end(reader: str) -> None:
    body = f"""
def fill(descriptor):
    try:
        while True:
            os.write(descriptor, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(descriptor, True)

reader, writer = os.pipe()
with signals.deferred(0.5):
    ready()
    {reader}
    os.dup2(writer, 2)
    time.sleep(1000)
"""
    with started(body) as job:
        job.wait_for("ready")
        time.sleep(0.5)  # stderr tells nothing more
        job.process.send_signal(signal.SIGTERM)
        assert_interrupted(job.end(), "stopped by SIGTERM, and cut short")


def test_after_a_signal_nothing_new_is_begun_and_what_was_finished_counts() -> None:
    body = """
with signals.deferred(60):
    ready()
    while signals.heard() is None:
        time.sleep(0.01)
try:
    with signals.deferred(60):
        print("begun", file=sys.stderr)
except signals.Interrupted:
    print("not begun", file=sys.stderr)
return result()
"""
    with started(body) as job:
        job.wait_for("ready")
        job.process.send_signal(signal.SIGTERM)
        job.wait_for("not begun")
        document = job.end()
    assert (document["status"], document["exit_code"]) == ("complete", 0)


def test_a_job_that_was_interrupted_waits_for_no_thread() -> None:
    body = """
import threading
with signals.deferred(1000):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    ready()
    signals.pause_or_stop(1000)
"""
    with started(body) as job:
        job.wait_for("ready")
        job.process.send_signal(signal.SIGTERM)
        assert_interrupted(job.end(), "stopped by SIGTERM; the same command resumes")


def test_handlers_that_a_library_installs_are_not_called() -> None:
    body = """
def handler(number, frame):
    raise SystemExit(number)
signal.signal(signal.SIGTERM, handler)
ready()
time.sleep(1000)
"""
    with started(body, early=True) as job:
        job.wait_for("ready")
        job.process.send_signal(signal.SIGTERM)
        document = job.end()
    assert_interrupted(document, "stopped by SIGTERM; the same command resumes")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_job_hears_what_its_shell_ignores_and_its_children_ignore_and_block_nothing(
    ignored: bool,
) -> None:
    body = """
shown = "import signal; print(signal.getsignal(2), signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
for preexec in (None, lambda: None):
    command = [sys.executable, "-c", shown]
    print(subprocess.check_output(command, text=True, preexec_fn=preexec), file=sys.stderr)
ready()
time.sleep(1000)
"""
    with started(body, ignored=ignored) as job:
        assert job.process.stderr is not None
        plain, _, forked, _ = (job.process.stderr.readline() for _ in range(4))
        job.wait_for("ready")
        job.process.send_signal(signal.SIGINT)
        assert_interrupted(job.end(), "stopped by SIGINT; the same command resumes")
    assert "default_int_handler" in plain
    assert "default_int_handler" in forked
    assert forked.endswith("set()\n")


def test_a_folder_for_the_moment_does_not_outlive_the_job(tmp_path: Path) -> None:
    body = f"""
import tempfile
tempfile.tempdir = {str(tmp_path)!r}
with signals.scratch_folder("replay-") as folder:
    open(os.path.join(folder, "part"), "w").close()
    ready()
    time.sleep(1000)
"""
    with started(body) as job:
        job.wait_for("ready")
        assert list(tmp_path.glob("replay-*/part"))
        job.process.send_signal(signal.SIGTERM)
        job.end()
    assert not list(tmp_path.iterdir())


@NUMBERS
def test_a_job_that_is_still_being_loaded_ends_like_any_other(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.status", "file:///nowhere", "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        job = Running(process)
        wait_until(lambda: blocks(process.pid, number))
        process.send_signal(number)
        document = job.end()
    assert (document["status"], document["exit_code"], document["run"]) == ("interrupted", 75, None)


def blocks(pid: int, number: int) -> bool:
    """Whether the process's first thread blocks a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(mask, 16) >> (number - 1) & 1)
