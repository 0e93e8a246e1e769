"""What runs below this process: found, and ended where whoever started it did not do so."""

from __future__ import annotations

from contextlib import suppress

import psutil

_REAP_S = 5.0  # SIGKILL acts at once; more is a process stuck in the kernel


def descendants() -> set[psutil.Process]:
    """Processes below this one, but for multiprocessing's tracker, which serves all of them."""
    children = psutil.Process().children(recursive=True)
    return {child for child in children if not _is_tracker(child)}


def reap(processes: set[psutil.Process]) -> None:
    """End these processes. A recycled pid never counts: psutil compares start times."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_REAP_S)


def end_all() -> None:
    """Kill what runs below this process, which must end right after it.

    All are stopped first: none starts another meanwhile, or sees one go and complains.
    """
    stopped: set[psutil.Process] = set()
    while new := descendants() - stopped:
        for process in new:
            with suppress(psutil.Error):
                process.suspend()
        stopped |= new
    for process in stopped:
        with suppress(psutil.Error):
            process.kill()


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False  # gone, or a zombie
