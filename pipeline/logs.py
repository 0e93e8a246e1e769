"""What each line of a log is about: run, replica, shard.

In: what a process says once of itself, and what a thread is at work on. Out: fields, which
structured logs carry (see ``redact.configure_logging``). They say where, never which row. A
replica's shards have a thread each; its engine's loop serves all of them, so lines from there name
no shard.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

Field = str | int


class _OfThread(threading.local):
    """Not a context variable: the engine's loop would take on that of whoever called it last."""

    def __init__(self) -> None:
        self.fields: dict[str, Field] = {}


_of_process: dict[str, Field] = {}
_of_thread = _OfThread()


def name_process(**fields: Field) -> None:
    """All lines of this process carry ``fields`` from now on."""
    _of_process.update(fields)


@contextmanager
def about(**fields: Field) -> Iterator[None]:
    """Lines of this thread carry ``fields`` inside."""
    before = _of_thread.fields
    _of_thread.fields = {**before, **fields}
    try:
        yield
    finally:
        _of_thread.fields = before


def current_fields() -> dict[str, Field]:
    """What a line written here and now carries."""
    return {**_of_process, **_of_thread.fields}
