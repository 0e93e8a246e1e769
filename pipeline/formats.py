"""Numbers as people read them. In: values of report.json. Out: short texts, with units.

Digits are grouped by a comma and cut by a point, whatever the reader's locale: the page is made
once, for everyone.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_WRITTEN_OUT = 100_000
"""Counts below are written out by ``compact``."""


def integer(value: float) -> str:
    """1234567 -> ``1,234,567``."""
    return f"{round(value):,}"


def compact(value: float) -> str:
    """Three digits and a letter: 1234567 -> ``1.23 M``; small counts are written out."""
    if abs(value) < _WRITTEN_OUT:
        return integer(value)
    return _with_letter(value)


def rate(value: float) -> str:
    """A count per second: three digits."""
    if abs(value) >= 10_000:
        return _with_letter(value)
    return integer(value) if abs(value) >= 100 else f"{value:.3g}"


def round_number(value: float) -> str:
    """A number of few digits, without zeros at its end: 40000 -> ``40 k``."""
    digits, space, letter = rate(value).partition(" ")
    return f"{_trimmed(digits)}{space}{letter}"


def _trimmed(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _with_letter(value: float) -> str:
    for size, letter in _LARGE:
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {letter}"
    return integer(value)


def _three_digits(value: float) -> str:
    decimals = max(0, 2 - int(math.log10(max(1.0, abs(value)))))
    return f"{value:.{decimals}f}"


def duration(seconds: float) -> str:
    """The two largest units: 4353 -> ``1 h 13 min``; below a minute, seconds."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 2 * _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return _two(whole, _MINUTE, "min", 1, "s")
    if whole < 2 * _DAY:
        return _two(whole, _HOUR, "h", _MINUTE, "min")
    return _two(whole, _DAY, "d", _HOUR, "h")


def _two(whole: int, large: int, large_name: str, small: int, small_name: str) -> str:
    first, rest = divmod(round(whole / small) * small, large)
    second = rest // small
    return f"{first} {large_name} {second} {small_name}" if second else f"{first} {large_name}"


def latency(seconds: float | None) -> str:
    """Three digits: ``0.213 s``, ``12.5 s``; from two minutes on as ``duration``."""
    if seconds is None:
        return "none"
    return f"{seconds:.3g} s" if seconds < 2 * _MINUTE else duration(seconds)


def percent(share: float) -> str:
    """0.00512 -> ``0.51 %``; never 0 for what is more than nothing, nor 100 for less than all."""
    if 0 < share < 0.0001:
        return "< 0.01 %"
    if 0.9999 < share < 1:
        return "> 99.99 %"
    return f"{_trimmed(f'{100 * share:.2f}')} %"


def amount(value: float, currency: str) -> str:
    """An amount of money; cents, unless it is less than ten of them."""
    digits = f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
    return f"{digits} {currency}"


def moment(seconds: float) -> str:
    """A point in time: ``25 Nov 2026, 01:45:10 UTC``."""
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at.day} {at:%b %Y, %H:%M:%S} UTC"


def clock(seconds: float, *, with_seconds: bool) -> str:
    """A time of day in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):{'%H:%M:%S' if with_seconds else '%H:%M'}}"


def day(seconds: float) -> str:
    """A date without its year: ``25 Nov``."""
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at.day} {at:%b}"


def epoch(iso: str) -> float:
    """Seconds since 1970 of a time in report.json."""
    return datetime.fromisoformat(iso).timestamp()
