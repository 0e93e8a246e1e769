"""vLLM plugin: an engine's processes end with the replica that started them.

vLLM's engine core waits for requests for ever if its parent is killed with SIGKILL, and keeps its
memory (a GPU's, too), so that no new replica would fit. vLLM calls ``register`` in each of its
processes (entry point group ``vllm.general_plugins``); in those it spawned itself, the kernel is
asked to end the process when its parent's thread does. Linux only; elsewhere it does nothing.

A parent in another PID namespace, or processes that Ray starts for vLLM's Ray backend, are not
covered: those end with Ray's own bookkeeping.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Entry point: called by vLLM in every process; a further call in one process is harmless."""
    if multiprocessing.parent_process() is not None:
        end_with_parent()
    # vLLM forks its engine core where it can, and plugins are not loaded again there
    multiprocessing.util.register_after_fork(sys.modules[__name__], lambda _: end_with_parent())


def end_with_parent() -> None:
    """Have this process end when the one that started it does."""
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)
