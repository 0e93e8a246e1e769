"""SIGTERM and SIGINT of a job: heard by one thread, never by the code that happens to run.

Both are blocked in every thread, and a thread of their own takes them with ``sigwait``. So nothing
is raised in the middle of anybody's code, and it does not matter which handlers a library installs:
Ray's replace ours while it starts, and the one of its C++ part prints a stack trace and dies.

A signal ends the process at once: a line on stdout, exit code 75, nothing left running below. A run
survives that anywhere, as it survives being killed. Where there is something to finish first,
``deferred`` says how long that may take. Within, the first signal is only noted, and the job looks
at places of its own choice (``heard``, ``check``); a second signal, or the end of that time, ends
the process at once.

Threads and processes inherit what is blocked. Hence a job listens before it loads anything that
starts threads (``listen_if_started_as``), and what it forks starts with nothing blocked.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_INTERRUPTED = 75
"""As ``errors.ExitCode``, which would be loaded too late for a process that has only begun."""
_MOST_END_S = 15.0
"""After a signal that ends the process at once; ``pipeline.children`` takes some 5 s of it."""
_SAY_S = 1
_PRINT_S = 5.0
"""What the job's own last line may take once it has begun."""
_SPARE_S = 0.5
"""Of the time for an end in order, what is not given to anybody."""
_LONGEST_WAIT_S = 3600.0


class Interrupted(BaseException):
    """A signal was heard, and this is a place to stop. Not an error: nothing may eat it."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The first signal that was noted."""

    name: str
    at: float
    """By the monotonic clock, as is ``until``."""
    until: float
    """When the process ends in any case."""


@dataclass(frozen=True, slots=True)
class _Allowance:
    """What a signal that comes now leaves the job to do."""

    seconds: float
    words: str


class _Listener:
    """The thread that takes signals, and what it noted."""

    def __init__(self) -> None:
        self.heard: Heard | None = None
        self.noted = threading.Event()
        self._allowance: _Allowance | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._restore: Callable[[], None] = lambda: None

    @property
    def is_open(self) -> bool:
        return self._thread is not None

    def open(self) -> None:
        """Listen from now on. For the main thread."""
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        strays, stray = os.pipe()
        os.set_blocking(stray, False)

        def restore() -> None:
            signal.set_wakeup_fd(-1)
            os.close(stray)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        self._restore = restore
        self._closing = False
        self.insist()
        signal.set_wakeup_fd(stray, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        relay = partial(self._relay, strays, self._thread)
        threading.Thread(target=relay, name="stray signals", daemon=True).start()

    def insist(self) -> None:
        """Block the signals in this thread, with a handler for those that another thread takes,
        as it was there before: Python notes them for ``_relay``, at once.

        Without a handler, children would inherit that a signal is ignored.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
        for number in _NUMBERS:
            signal.signal(number, lambda *_: None)

    def close(self) -> None:
        """Listen no more, and forget."""
        assert self._thread is not None
        assert self._thread.ident is not None
        self._closing = True
        signal.pthread_kill(self._thread.ident, signal.SIGTERM)
        self._thread.join()
        self._thread, self.heard = None, None
        self.noted.clear()
        self._restore()

    def allow(self, allowance: _Allowance | None) -> _Allowance | None:
        """From now on a signal leaves so much to do; returns what it was before."""
        with self._lock:
            before, self._allowance = self._allowance, allowance
            return before

    def forked(self) -> None:
        """In a child: nothing is blocked, nobody listens, and signals do what they usually do."""
        if self._thread is not None:
            self._thread = None
            signal.set_wakeup_fd(-1)
            for number in _NUMBERS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)

    def _relay(self, strays: int, listener: threading.Thread) -> None:
        """The thread that hands on signals that another thread took."""
        while number := os.read(strays, 1):
            if listener.ident is not None and listener.is_alive() and number[0] in _NUMBERS:
                signal.pthread_kill(listener.ident, number[0])
        os.close(strays)

    def _listen(self) -> None:
        while True:
            until = math.inf if self.heard is None else self.heard.until
            left = max(0.0, until - time.monotonic())
            info = signal.sigtimedwait(_NUMBERS, min(left, _LONGEST_WAIT_S))
            if self._closing:
                return
            if info is not None:
                self._hear(signal.Signals(info.si_signo).name)
            elif self.heard is not None and time.monotonic() >= self.heard.until:
                end_at_once(f"stopped by {self.heard.name}, and cut short while it ended")

    def _hear(self, name: str) -> None:
        with self._lock:
            allowance, now = self._allowance, time.monotonic()
            is_first = self.heard is None
            if is_first and allowance is not None:
                self.heard = Heard(name, now, now + allowance.seconds)
                self.noted.set()
        if is_first and allowance is not None:
            _say(f"{name}: {allowance.words}; once more = at once")
            return
        again = not is_first
        end_at_once(
            f"stopped at once by a second signal ({name})" if again else f"stopped by {name}"
        )


class _LastLine:
    """The contract's last line on stdout: where it goes, what it says, and that there is one."""

    def __init__(self) -> None:
        self.fd = 1
        """The real stdout, wherever descriptor 1 points."""
        self.run: str | None = None
        """The run it names, once the job knows it."""
        self.remedy = "the same command resumes"
        self._code = _INTERRUPTED
        self._claim = threading.Lock()
        self._written = threading.Event()

    def begin(self, remedy: str) -> None:
        """A job begins, and has not written its line."""
        self.run, self.remedy = None, remedy
        if self._written.is_set():  # by the job before it in this process
            self._written.clear()
            self._claim.release()

    def write(self, line: str, code: int) -> None:
        """The job's own, before it exits with ``code``. Does not return if a signal was faster."""
        self._claim.acquire()
        self._code = code
        with suppress(OSError):  # what a library left there; the line itself goes elsewhere
            sys.stdout.flush()
        _write(self.fd, line)
        self._written.set()

    def write_interrupted(self, why: str) -> None:
        """That of a job ended by a signal: as a ``Result`` without rows has it.

        If the job's own was faster, this ends the process as the job was about to.
        """
        if not self._claim.acquire(blocking=False):
            self._written.wait(_PRINT_S)
            os._exit(self._code)
        rows = dict.fromkeys(("total", "succeeded", "errored", "expired", "cancelled"), 0)
        document: dict[str, Any] = {
            "status": "interrupted",
            "run": self.run,
            "rows": rows,
            "tokens": dict.fromkeys(("prompt", "completion", "cached", "image"), 0),
            "seconds": round(time.monotonic() - _started, 3),
            "exit_code": _INTERRUPTED,
            "generated_rows": 0,
            "error": f"{why}; {self.remedy}",
        }
        _write(self.fd, json.dumps(document))
        _say(f"interrupted: {why}; {self.remedy}")


def _write(descriptor: int, line: str) -> None:
    """Write a line, which nobody may read any more: that must not change how the process ends."""
    with suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())


def _say(line: str) -> None:
    """Write a line to stderr, unless its reader takes nothing."""
    poll = select.poll()  # a pipe counts as ready once it has room for 4 KiB
    poll.register(2, select.POLLOUT)
    if poll.poll(1000 * _SAY_S):
        _write(2, line)


_started = time.monotonic()
_scratch: set[str] = set()
_listener = _Listener()
last_line = _LastLine()
os.register_at_fork(after_in_child=_listener.forked)


def listen() -> None:
    """Listen until this process ends. For its main thread, before it has others."""
    if not _listener.is_open:
        _listener.open()


def listen_if_started_as(*modules: str) -> None:
    """Listen from now on if this process was started as ``python -m`` one of ``modules``.

    For their packages, which are loaded first; a program that imports them is left alone.
    """
    words = sys.orig_argv
    if "-m" in words[:-1] and words[words.index("-m") + 1] in modules:
        listen()


@contextmanager
def listening() -> Iterator[None]:
    """Within, signals are heard; a process that listens already goes on with it afterwards."""
    if _listener.is_open:
        yield
        return
    _listener.open()
    try:
        yield
    finally:
        _listener.close()


def insist() -> None:
    """Take the signals back, whatever handler a library has installed meanwhile."""
    if _listener.is_open:
        _listener.insist()


@contextmanager
def deferred(within_s: float, words: str = "ending in order") -> Iterator[None]:
    """Within, the first signal is noted, and leaves ``within_s`` seconds to end the process.

    Raises:
        Interrupted: one was noted before.
    """
    before = _listener.allow(_Allowance(within_s, words))
    try:
        check()
        yield
    finally:
        _listener.allow(before)


def heard() -> Heard | None:
    """The signal that was noted; None if there was none."""
    return _listener.heard


def end_by() -> float:
    """When a signal that was noted wants the end to be over, by the monotonic clock; else never."""
    return math.inf if _listener.heard is None else _listener.heard.until - _SPARE_S


def check() -> None:
    """Stop here if a signal was noted.

    Raises:
        Interrupted: there was one.
    """
    if _listener.heard is not None:
        raise Interrupted(f"stopped by {_listener.heard.name}; {last_line.remedy}")


def pause(seconds: float) -> bool:
    """Sleep, but not beyond a signal; whether one was noted."""
    return _listener.noted.wait(seconds)


def pause_or_stop(seconds: float) -> None:
    """Sleep, but not beyond a signal.

    Raises:
        Interrupted: one was noted.
    """
    pause(seconds)
    check()


@contextmanager
def scratch_folder(prefix: str) -> Iterator[str]:
    """A temporary folder that is gone afterwards, even if a signal ends the process at once."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        _scratch.add(folder)
        yield folder
    _scratch.discard(folder)


def end_at_once(why: str) -> NoReturn:
    """End this process and all that runs below it, with the last line and exit code 75."""
    threading.Thread(target=_exit_late, daemon=True).start()
    try:
        last_line.write_interrupted(why)
        _end_children()
    finally:
        os._exit(_INTERRUPTED)


def _exit_late() -> None:
    """End the process also where a full pipe, or a child, holds its end up."""
    time.sleep(_MOST_END_S)
    try:
        _end_children()
    finally:
        os._exit(_INTERRUPTED)


def _end_children() -> None:
    """End all that runs below this process, then delete the folders it writes to."""
    from pipeline.children import end_all  # psutil, which a process that just began has not loaded

    end_all()
    for folder in tuple(_scratch):
        shutil.rmtree(folder, ignore_errors=True)
