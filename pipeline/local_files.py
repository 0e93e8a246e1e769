"""Whole local files or nothing, and a lock beside one: what object stores promise by themselves.

In: paths and bytes. Out: files that appear, or change, at once and wherever the writer dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_LOCKED_S = 10.0
"""A lock is held for some milliseconds."""
_POLL_S = 0.005


def put(path: str, data: bytes, *, publish: Callable[[Path, Path], None]) -> None:
    """Write beside ``path``, then bring it there by ``publish``: ``os.replace`` or ``os.link``."""
    with writing(path, publish=publish) as file:
        file.write(data)


@contextmanager
def writing(path: str, *, publish: Callable[[Path, Path], None]) -> Iterator[IO[bytes]]:
    """A file beside ``path``, brought there by ``publish`` if the block ends well."""
    target = Path(path)
    _make_folder(target.parent)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(beside, target)
        _sync_folder(target.parent)
    finally:
        beside.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    """Make new names in it last through a loss of power, as ``fsync`` does for a file's content."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):  # not on this file system, or not ours
            raise


def remove_empty_folders(path: str) -> None:
    """Remove the folder ``path`` and those below it, but for those that hold files."""
    for folder, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):  # it holds something, or is not ours to remove: it stays
            Path(folder).rmdir()


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Alone with the local file ``path``, among all that take this lock; leaves no lock file.

    Raises:
        BlockingIOError: another process has it and stands still; that may pass.
    """
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    while True:
        with lock.open("ab") as file:
            _lock(file)
            try:
                current = lock.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if not current:  # who had the lock before has removed the file we waited for
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _lock(file: IO[bytes]) -> None:
    """Not by a call that blocks: it would wait for ever for a process that is suspended."""
    until = time.monotonic() + _LOCKED_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(_POLL_S)
