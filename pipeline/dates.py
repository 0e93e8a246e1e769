"""``{date}`` in a config's URIs: one config for every night.

In: the parsed YAML. Out: the same with a date in its place. It is UTC's when the config is loaded,
so that no zone and no machine has another, unless the config (or ``--date``) says which. Other
braces stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

PLACE = "{date}"
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_ALIKE = re.compile(r"\{\s*date[^{}]*\}", re.IGNORECASE)


def today() -> str:
    """The UTC date."""
    return datetime.now(UTC).date().isoformat()


def check_date(value: Any) -> str | None:
    """A config's value as text, once it is known to be a day; for a pydantic validator.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        return None
    # YAML parses days, and times into a kind of day
    text = value.isoformat() if isinstance(value, date) else str(value)
    if not _DAY.fullmatch(text):
        raise ValueError("must be a day as YYYY-MM-DD, e.g. 2026-11-22")
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError("there is no such day") from None


def with_date(document: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy with its date in place of each ``{date}`` below ``keys`` (``section.key``, of texts or
    lists of them), and with that date as its ``date`` if there was such a place.

    A ``date`` that is no day is left for others to refuse.

    Raises:
        ValueError: what stands in braces is nearly, but not quite, ``{date}``.
    """
    try:
        day = check_date(document.get("date"))
    except ValueError:
        return dict(document)
    changed = dict(document)
    for path in keys:
        section, key = path.split(".")
        inside = changed.get(section)
        if not isinstance(inside, Mapping) or not _has_place(path, inside.get(key)):
            continue
        day = day or today()
        changed[section] = {**inside, key: _replaced(inside[key], day)}
    return changed if day is None else {**changed, "date": day}


def _has_place(path: str, value: Any) -> bool:
    texts = [text for text in (value if isinstance(value, list) else [value]) if _is_text(text)]
    for text in texts:
        for braces in _ALIKE.findall(text):
            if braces != PLACE:
                raise ValueError(
                    f"key '{path}' = {text!r}: {braces} is not known; write {PLACE}, which becomes "
                    "a day as YYYY-MM-DD"
                )
    return any(PLACE in text for text in texts)


def _replaced(value: Any, day: str) -> Any:
    if isinstance(value, list):
        return [_replaced(item, day) for item in value]
    return value.replace(PLACE, day) if _is_text(value) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
