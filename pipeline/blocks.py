"""Prepared blocks as Ray Data makes them, and the end of the threads that make them.

Ray ends the whole process, last line or not, when a thread asks it for something after its
shutdown: so these threads are waited for.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress

import ray
import ray.data
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import RayError

_POLL_S = 0.25


class _Puller(threading.Thread):
    """The thread that drives a dataset."""


class Blocks:
    """Prepared blocks as they come, as references; a thread of its own drives the dataset, no
    further than ``ahead`` blocks before the driver. A context manager: after it, none are made."""

    def __init__(self, dataset: ray.data.Dataset, *, ahead: int) -> None:
        self._queue: queue.Queue[ray.ObjectRef] = queue.Queue(maxsize=ahead)
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = _Puller(target=self._pull, args=(dataset,), name="blocks", daemon=True)

    def __enter__(self) -> Blocks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    @property
    def all_taken(self) -> bool:
        """Whether no more blocks come.

        Raises:
            Exception: what ended the dataset before its time.
        """
        ended = not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return ended and self._queue.empty()

    def take(self) -> ray.ObjectRef | None:
        """The next block, if there is one now."""
        with suppress(queue.Empty):
            return self._queue.get_nowait()
        return None

    def _pull(self, dataset: ray.data.Dataset) -> None:
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                for block in bundle.block_refs:
                    if not self._put(block):
                        return
        except Exception as error:  # noqa: BLE001 - raised again on the driver's thread
            self._error = error

    def _put(self, block: ray.ObjectRef) -> bool:
        """False if nobody wants more."""
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(block, timeout=_POLL_S)
                return True
        return False


def end_datasets(within_s: float) -> None:
    """End all datasets that are at work in this process, and wait for their threads."""
    until = time.monotonic() + within_s
    while (threads := _at_work()) and time.monotonic() < until:
        for thread in threads:
            if isinstance(thread, StreamingExecutor):
                with suppress(RayError):  # the cluster may be gone
                    thread.shutdown(force=False)
        for thread in threads:
            thread.join(_POLL_S)
    if threads:  # they will complain once Ray is shut down under them
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _at_work() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if isinstance(each, _Puller | StreamingExecutor)]
