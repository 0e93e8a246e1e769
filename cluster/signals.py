"""Signals while a mini-cluster starts or stops: they end a start, but not a clean-up."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores SIGINT, SIGTERM and SIGHUP: half a clean-up would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def unwind_on_termination() -> None:
    """Makes SIGTERM and SIGHUP unwind the stack, as Ctrl-C does, so that clean-ups run.

    SIGINT does so even where a shell has it ignored, as in its background jobs.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
