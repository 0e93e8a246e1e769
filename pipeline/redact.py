"""Secrets out of what people read: logs, errors, records, manifests, reports.

In: text or a manifest. Out: a copy in which URLs have no user and no query, and what the
environment or a config holds under a secret-sounding name is ``***``. A fixed text, never a hash:
short secrets could be guessed from one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"
_SECRET_NAME = re.compile(
    r"token$|secret|password|passwd|credential|api_?key|access_?key$|auth$", re.I
)
_SHORTEST_SECRET = 8
"""Characters: shorter values would turn up in plain words, and be taken out there."""
_USER = re.compile(r"(?<=://)[^/\s@\"']*@")
_QUERY = re.compile(r"(?i)(https?://[^\s\"'?]*|://[^\s\"'?]*(?=\?[^\s\"'?]*=))\?[^\s\"']*")
"""Of the web always, else only with a = in it: a glob may hold a question mark."""
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[a-z0-9._~+/=-]{8,}")


def text(message: str) -> str:
    """``message`` without secrets: users and queries of URLs, bearer tokens, the environment's."""
    message = _USER.sub("", message)
    message = _QUERY.sub(rf"\1?{REDACTED}", message)
    message = _BEARER.sub(rf"\1 {REDACTED}", message)
    for secret in _environment_secrets():
        message = message.replace(secret, REDACTED)
    return message


def manifest(value: Any, name: str = "") -> Any:
    """A copy of ``value``, nested as it is, without what stands under secret-sounding names."""
    if isinstance(value, Mapping):
        return {key: manifest(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [manifest(item, name) for item in value]
    if isinstance(value, str) and value:
        return REDACTED if _SECRET_NAME.search(name) else text(value)
    return value


class RedactingFormatter(logging.Formatter):
    """A log line, traceback and all, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """As ``logging.Formatter``."""
        return text(super().format(record))


def configure_logging(level: int, form: str, *, times: str | None = None) -> None:
    """Log to stderr without secrets, unless this process logs somewhere already.

    ``form`` and ``times`` are as ``logging.Formatter`` wants them.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter(form, times))
    logging.basicConfig(level=level, handlers=[handler])


def _environment_secrets() -> list[str]:
    """Longest first, as one may hold another."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name)
    }
    return sorted(found, key=len, reverse=True)
