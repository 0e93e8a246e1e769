"""The book of finished generations, from which is counted what was generated twice.

One line of JSON per finished generation, appended by one ``write`` to a file that all replicas of
the machine share: such appends do not mix, and a killed writer leaves whole lines only.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished generation."""

    at: float
    """Seconds since the epoch."""
    request_id: str
    seed: int
    """Tells the sample from all others: derived from its row, the same in every attempt."""
    prompt_tokens: int
    completion_tokens: int
    pid: int
    """The replica's process."""
    started: float
    """When that process started, seconds since the epoch: pids are used again."""
    engine: int
    """The engine's own process, so another one after each restart."""


class Ledger:
    """Appends generations to the file at ``path``."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, generation: Generation) -> None:
        """One line, by one system call."""
        os.write(self._file, (json.dumps(asdict(generation)) + "\n").encode())

    def close(self) -> None:
        """Nothing can be written any more."""
        os.close(self._file)


class LedgerReader:
    """Reads a growing ledger bit by bit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.generations: list[Generation] = []

    def read(self) -> list[Generation]:
        """What was added since the last call; also kept in ``generations``."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        fresh = [Generation(**json.loads(line)) for line in whole.splitlines()]
        self.generations.extend(fresh)
        return fresh


def now() -> float:
    """The ledger's clock."""
    return time.time()
