"""Text that can be stored: Python strings may hold lone surrogates, which no encoding has."""

from __future__ import annotations


def lone_surrogate(text: str) -> int | None:
    """Where the first lone surrogate stands, in characters; None if ``text`` is proper Unicode.

    JSON brings them by escapes (``"\\\\ud800"``).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
