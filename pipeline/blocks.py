"""Blocks as Ray Data makes them, window by window, and the end of the threads that make them.

In: windows, each a dataset over some shards that is not made yet. Out: references to its blocks.
Ray Data plans a whole dataset before its first task, at about a millisecond a shard: over windows,
what comes before the first block does not depend on the input's size.

Ray ends the whole process, last line or not, when a thread asks it for something after its
shutdown: so these threads are waited for.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import ray
import ray.data
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import RayError

_POLL_S = 0.25
_REST_S = 0.05
"""Between two steps of a dataset that has nothing to do."""


class Rest(ExecutionCallback):
    """Has a dataset rest while nothing happens.

    Ray Data waits for running tasks alone: a dataset whose blocks are all made, or may not be read
    yet, would ask in a circle, on a whole CPU, until the driver takes them.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, int, int]] = []

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """See ``ExecutionCallback``; on the dataset's own thread."""
        seen = [
            (done.num_tasks_submitted, done.num_task_outputs_generated, done.num_outputs_taken)
            for done in (operator.metrics for operator in executor._topology)
        ]
        if seen == self._seen:
            time.sleep(_REST_S)
        self._seen = seen


def rest_when_idle(context: DataContext) -> None:
    """Have the datasets of ``context`` rest while nothing happens."""
    context.custom_execution_callback_classes = [Rest]


@dataclass(frozen=True, slots=True)
class Window:
    """Some of the input."""

    dataset: Callable[[], ray.data.Dataset]
    """Makes the dataset; called on a thread of its own."""
    blocks: int
    """Number of blocks that it has."""


class _Puller(threading.Thread):
    """The thread that drives a dataset."""


class Blocks:
    """References to blocks as they come. A context manager: after it, none are made.

    Each window has a thread that drives its dataset, no further than ``ahead`` blocks before the
    driver. The next window starts when half of one is taken, so that its first blocks are there
    when the last one of the window before is.
    """

    def __init__(self, windows: Iterable[Window], *, ahead: int) -> None:
        self._windows = iter(windows)
        self._queue: queue.Queue[ray.ObjectRef] = queue.Queue(maxsize=ahead)
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._ended = threading.Event()

    def __enter__(self) -> Blocks:
        before = threading.Event()
        before.set()
        if not self._start_next(before):
            self._ended.set()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def __iter__(self) -> Iterator[ray.ObjectRef]:
        """All blocks; waits for each.

        Raises:
            Exception: what ended a dataset before its time.
        """
        while not self.all_taken:
            with suppress(queue.Empty):
                yield self._queue.get(timeout=_POLL_S)

    @property
    def all_taken(self) -> bool:
        """Whether no more blocks come.

        Raises:
            Exception: what ended a dataset before its time.
        """
        ended = self._ended.is_set()
        if self._error is not None:
            raise self._error
        return ended and self._queue.empty()

    def take(self) -> ray.ObjectRef | None:
        """The next block, if there is one now."""
        with suppress(queue.Empty):
            return self._queue.get_nowait()
        return None

    def _start_next(self, before: threading.Event) -> bool:
        """Start the next window, whose blocks come after the event ``before``; False: no more."""
        window = next(self._windows, None)
        if window is None:
            return False
        _Puller(target=self._pull, args=(window, before), name="blocks", daemon=True).start()
        return True

    def _pull(self, window: Window, before: threading.Event) -> None:
        done = threading.Event()
        is_last = True
        try:
            for number, block in enumerate(_references(window.dataset())):
                if not (self._reached(before) and self._put(block)):
                    return
                if number == window.blocks // 2:
                    is_last = not self._start_next(done)
        except Exception as error:  # noqa: BLE001 - raised again on the driver's thread
            self._error = error
        done.set()
        if is_last or self._error is not None:
            self._ended.set()

    def _reached(self, before: threading.Event) -> bool:
        """False if nobody wants more."""
        while not self._stopped.is_set():
            if before.wait(_POLL_S):
                return True
        return False

    def _put(self, block: ray.ObjectRef) -> bool:
        """False if nobody wants more."""
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(block, timeout=_POLL_S)
                return True
        return False


def _references(dataset: ray.data.Dataset) -> Iterator[ray.ObjectRef]:
    for bundle in dataset.iter_internal_ref_bundles():
        yield from bundle.block_refs


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
