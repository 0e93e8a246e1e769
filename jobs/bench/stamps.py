"""When the first request entered an engine and the last one left it, noted inside its process.

In: ``enter`` and ``leave`` around each request. Out: a small JSON file with two times of the
monotonic clock (which all processes of a machine share), rewritten whenever nothing is in flight,
since nobody promises a replica's process an orderly end. Standard library only: contenders with
environments of their own use it, too.
"""

from __future__ import annotations

import json
import time
from pathlib import Path


class Stamps:
    """Start and end of the steady state of one engine; used from one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_flight = 0
        self._started: float | None = None

    def enter(self) -> None:
        """A request is handed to the engine."""
        if self._started is None:
            self._started = time.monotonic()
        self._in_flight += 1

    def leave(self) -> None:
        """A request came back; if it was the last in flight, the file is written."""
        self._in_flight -= 1
        if not self._in_flight:
            self._write()

    def _write(self) -> None:
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps({"start": self._started, "end": time.monotonic()}))
        beside.replace(self._path)


def read_seconds(path: Path) -> float:
    """Seconds from the first admission to the last completion.

    Raises:
        FileNotFoundError: no request was completed.
    """
    stamps = json.loads(path.read_text())
    return float(stamps["end"] - stamps["start"])
