"""JSONL files as bytes: which lines are rows, where they start, and a range of them.

In: seekable files. Out: rows as bytes, unparsed: what is wrong with one is that row's error, found
later. A row is a line that holds more than blanks; lines end with LF (a CR before it is a blank),
the last one also with the file. A UTF-8 byte order mark at the start is no part of the first row.
Files are streamed: memory is bounded by the longest line.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import IO

import numpy as np

from pipeline.plan import Offsets

_CHUNK = 8 * 2**20  # bytes per read
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def iterate_rows(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each row of a file, from its beginning: (offset, content)."""
    offset = _skip_byte_order_mark(file)
    pending: list[bytes] = []
    while chunk := file.read(_CHUNK):
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            line = b"".join([*pending, piece]) if pending else piece
            pending = []
            if not _is_blank(line):
                yield offset, line
            offset += len(line) + 1
        pending.append(rest)
    if not _is_blank(last := b"".join(pending)):
        yield offset, last


def row_offsets(file: IO[bytes]) -> Offsets:
    """Where each row starts: 8 bytes a row."""
    return np.array(array("q", (offset for offset, _ in iterate_rows(file))), np.int64)


def read_rows(file: IO[bytes], first_byte: int, end_byte: int) -> list[bytes]:
    """The rows of one range of bytes, which starts where a row does."""
    file.seek(first_byte)
    lines = file.read(end_byte - first_byte).split(b"\n")
    return [line for line in lines if not _is_blank(line)]


def row_spans(file: IO[bytes], first_byte: int, end_byte: int) -> list[tuple[int, int]]:
    """Of each row of a range of bytes, where it starts and where the next one may."""
    file.seek(first_byte)
    spans: list[tuple[int, int]] = []
    start = first_byte
    for line in file.read(end_byte - first_byte).split(b"\n"):
        end = min(start + len(line) + 1, end_byte)
        if not _is_blank(line):
            spans.append((start, end))
        start = end
    return spans


def _is_blank(line: bytes) -> bool:
    return not line or line.isspace()


def _skip_byte_order_mark(file: IO[bytes]) -> int:
    """Stand behind a byte order mark, if there is one; the position."""
    if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
        return len(_BYTE_ORDER_MARK)
    file.seek(0)
    return 0
