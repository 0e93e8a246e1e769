"""Work on many items with a few threads, in bounded memory.

In: a function and items, of which there may be millions. Out: results in the order of the items.
``ThreadPoolExecutor.map`` queues all items at once, and keeps results that nobody took yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")

_AHEAD_PER_THREAD = 4
"""Items begun or done before the one that is next, so that a slow one holds up few threads."""


def mapped(work: Callable[[Item], Found], items: Iterable[Item], threads: int) -> Iterator[Found]:
    """``work`` of each item, in order. Its end waits for what has begun, and cancels the
    rest.

    Raises:
        Exception: what ``work`` raised for the item that is next.
    """
    left = iter(items)
    pool = ThreadPoolExecutor(threads)

    def submit(item: Item) -> Future[Found]:
        return pool.submit(copy_context().run, work, item)  # with the caller's patience

    try:
        begun: deque[Future[Found]] = deque(
            submit(item) for item in islice(left, _AHEAD_PER_THREAD * threads)
        )
        while begun:
            yield begun.popleft().result()
            begun.extend(submit(item) for item in islice(left, 1))
    finally:
        pool.shutdown(cancel_futures=True)
