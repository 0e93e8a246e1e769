"""Waiting for what other processes and threads do."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def wait_until(ready: Callable[[], object], timeout_s: float = 60) -> None:
    """Poll until `ready()` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"not ready within {timeout_s:g} s"
        time.sleep(0.02)


def suspend_driver(process: "subprocess.Popen[str]", run: Path) -> None:
    """Suspend the owner of that run's lease: not while it locks a local one, which would hold up
    everybody who looks."""
    while True:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        if not (run / "._lease.json.lock").exists():
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
