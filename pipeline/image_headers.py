"""Encoded images: the pieces that a decoder would go through, counted before one does.

In: encoded bytes. Out: the passes over all pixels that decoding takes, or ``RowError`` if there are
more pieces than any camera or program writes. Pillow keeps or joins each piece it meets, so a file
of nothing but tiny ones takes it minutes, and memory a hundred times the file's.

The walks see at least the pieces that the decoders see: where those would skip junk or stop, these
look into it.
"""

from __future__ import annotations

import re

from pipeline.errors import ErrorCode, RowError

_MOST_PIECES = {"JPEG segments": 4096, "PNG chunks": 100_000, "GIF blocks": 200_000}
_MOST_EXIF_SEGMENTS = 64
"""Of 64 KB each; Pillow joins them one by one."""

# JPEG: ITU T.81, table B.1
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_AFTER_DATA = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_END_OF_IMAGE, _START_OF_SCAN, _APP1 = 0xD9, 0xDA, 0xE1
_WITH_LENGTH = frozenset(
    {*range(0xC0, 0xD0), *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE} - {0xC8}
)


def count_passes(data: bytes) -> int:
    """Passes over all pixels: the scans of a JPEG, else 1.

    Raises:
        RowError: ``image_invalid``: too many pieces.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg_scans(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        _check_gif(data)
    return 1


def _jpeg_scans(data: bytes) -> int:
    at, segments, exif, scans = 2, 0, 0, 0
    pattern = _MARKER
    while found := pattern.search(data, at):
        at = found.end()
        kind = data[at - 1]
        if scans and kind == _END_OF_IMAGE:
            break
        segments += 1
        if kind == _START_OF_SCAN:
            scans, pattern = scans + 1, _MARKER_AFTER_DATA
        exif += kind == _APP1 and data.startswith(b"Exif\0\0", at + 2)
        if exif > _MOST_EXIF_SEGMENTS:
            raise _hostile(f"more than {_MOST_EXIF_SEGMENTS} Exif segments")
        _check("JPEG segments", segments)
        if kind in _WITH_LENGTH:
            at += int.from_bytes(data[at : at + 2], "big")
    return max(1, scans)


def _check_png(data: bytes) -> None:
    at, chunks = 8, 0
    while at < len(data):
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        chunks += 1
        _check("PNG chunks", chunks)


def _check_gif(data: bytes) -> None:
    """The blocks before the first image, which is the one that is decoded, as Pillow takes them."""
    at, blocks = 13 + _palette_bytes(data[10:11]), 0
    while at < len(data) and data[at] != ord(","):
        if data[at] == ord("!"):
            label, looped = data[at + 1 : at + 2], data.startswith(b"NETSCAPE2.0", at + 3)
            read_singly = 0 if label == b"\xfe" else 2 if label == b"\xff" and looped else 1
            at, count = _past_blocks(data, at + 2)
            if count < read_singly:  # their end was read as one of them
                at, more = _past_blocks(data, at)
                count += more
            blocks += count
        else:  # a byte that Pillow skips
            at += 1
        blocks += 1
        _check("GIF blocks", blocks)


def _past_blocks(data: bytes, at: int) -> tuple[int, int]:
    """The place behind a run of blocks and its end, and their number."""
    count = 0
    while at < len(data) and data[at]:
        at += 1 + data[at]
        count += 1
        _check("GIF blocks", count)
    return at + 1, count


def _palette_bytes(flags: bytes) -> int:
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _check(kind: str, count: int) -> None:
    if count > _MOST_PIECES[kind]:
        raise _hostile(f"more than {_MOST_PIECES[kind]} {kind}")


def _hostile(reason: str) -> RowError:
    return RowError(ErrorCode.IMAGE_INVALID, f"image has {reason}")
