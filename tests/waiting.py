"""Waiting for what other processes and threads do."""

import time
from collections.abc import Callable


def wait_until(ready: Callable[[], object], timeout_s: float = 60) -> None:
    """Poll until `ready()` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"not ready within {timeout_s:g} s"
        time.sleep(0.02)
