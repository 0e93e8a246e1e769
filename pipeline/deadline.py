"""When a run has to stop: ``limits.deadline``, a time or a duration.

In: what the config says and when the job started. Out: the moment, aware of its zone.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_EXPECTED = "a time with its zone (2026-11-23T06:00Z) or a duration (6h, 90m, 45s)"


def check_deadline(value: Any) -> Any:
    """A config's value as text, once it is known to be a deadline; for a pydantic validator.

    Raises:
        ValueError: it is neither a time with its zone nor a duration.
    """
    if value is None:
        return None
    # YAML parses times and days
    text = value.isoformat() if isinstance(value, date) else str(value)
    resolve_deadline(text, started=datetime.now(UTC))
    return text


def resolve_deadline(text: str, *, started: datetime) -> datetime:
    """The moment meant by ``text`` for a job that started at ``started``.

    Raises:
        ValueError: it is neither a time with its zone nor a duration.
    """
    duration = _DURATION.fullmatch(text.strip())
    if duration:
        return _after(started, float(duration[1]) * _SECONDS[duration[2]], text)
    if _DAY.fullmatch(text.strip()):
        raise ValueError(f"{text} is a day without a time: must be {_EXPECTED}")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"must be {_EXPECTED}, not {text!r}") from None
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no zone: must be {_EXPECTED}")
    return moment


def _after(started: datetime, seconds: float, text: str) -> datetime:
    try:
        return started + timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError(f"{text!r} is beyond the calendar") from None
