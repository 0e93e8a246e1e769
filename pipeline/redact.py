"""Secrets stay in the process: what goes into records, logs, manifests and reports passes here.

In: text or a document. Out: a copy in which URLs have neither user nor query values, keys of known
shapes are masked, and so is every secret of this process's environment. Masking too much costs a
reader a moment; a signed URL in a record is open to whoever reads the output.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from pipeline.logs import current_fields

LOG_FORMAT = "LOG_FORMAT"
"""The variable that says how logs look: text (the default) or json."""
MASK = "***"
_SECRET_NAME = re.compile(
    r"token$|secret|password|passwd|credential|authorization|(?:api|access|private)_?key", re.I
)
_MOST_SHOWN = 500  # characters of a URI in a message
_MOST_READ = 8192  # characters that are looked at for it
_SHORTEST_SECRET = 8
"""Characters: shorter values of the environment are words that occur by themselves."""
# Messages quote what strangers wrote, at any length: each pattern takes linear time. The first two
# always match what they have read (``++`` gives nothing back), so no character is read twice.
_USER = re.compile(r"(://)[^\s\"'<>@]*+(@?)")
_QUERY = re.compile(r"(https?:[^\s\"'<>?#]*+)([?#][^\s\"'<>]++)?", re.I)
_PATTERNS = (
    (re.compile(r"([?&][^\s\"'<>=&?]+=)[^\s\"'<>&]+"), rf"\1{MASK}"),
    (
        re.compile(
            r"((?:x-amz-[a-z-]{1,40}|signature|\bsig|token|secret|password|api_?key|access_?key)"
            r"\"?[=:] ?\"?)[^\s\"'<>&,;]+",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.I), rf"\1{MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), MASK),
    (re.compile(r"\b(?:hf_|gh[opsu]_|sk-)[\w-]{16,}"), MASK),
)


def redacted_text(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """``text`` without what might be a secret; the rest stays to the letter."""
    for secret in _secrets(environment):
        text = text.replace(secret, MASK)
    text = _USER.sub(lambda found: f"{found[1]}{MASK}@" if found[2] else found[0], text)
    text = _QUERY.sub(lambda found: f"{found[1]}?{MASK}" if found[2] else found[0], text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def shown_uri(uri: str) -> str:
    """What a row brought, a URI or an error about it, as messages quote it: redacted first, then
    cut, as half a secret looks like none."""
    return redacted_text(uri[:_MOST_READ])[:_MOST_SHOWN]


def redacted(value: Any, name: str = "") -> Any:
    """A copy of ``value`` whose texts are redacted; what has a secret-sounding name is masked."""
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if not isinstance(value, str):
        return value
    return MASK if value and _SECRET_NAME.search(name) else redacted_text(value)


class RedactingFormatter(logging.Formatter):
    """A log formatter whose lines, tracebacks included, are redacted."""

    def format(self, record: logging.LogRecord) -> str:
        """The finished line."""
        return redacted_text(super().format(record))


class JsonFormatter(logging.Formatter):
    """A log formatter whose lines are JSON objects, redacted: time (UTC), level, logger, message,
    what the line is about (see ``logs``), and of an exception its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The finished line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **current_fields(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(redacted(line))


def configure_logging(level: int, form: str, *, times: str | None = None) -> None:
    """Log to stderr, redacted, unless this process logs somewhere already.

    ``form`` and ``times`` are as ``logging.Formatter`` wants them; with ``LOG_FORMAT=json`` in the
    environment, lines are JSON objects instead.
    """
    handler = logging.StreamHandler()
    as_json = os.environ.get(LOG_FORMAT, "text") == "json"
    handler.setFormatter(JsonFormatter() if as_json else RedactingFormatter(form, times))
    logging.basicConfig(level=level, handlers=[handler])


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of secret-sounding variables as they are and as a URL quotes them, longest first."""
    values = {
        form
        for name, value in environment.items()
        if len(value) >= _SHORTEST_SECRET
        and _SECRET_NAME.search(name)
        and not name.upper().endswith(("_ID", "_FILE", "_PATH"))
        for form in (value, quote(value, safe=""))
    }
    return sorted(values, key=len, reverse=True)
