"""Tokens by the engine's own count, beside the one that the records make.

In: what the engine says after its steps. Out: sums per committed part, of its replica since the
part before; together they are what the engines finished, whatever became of it. ``jobs.verify``
compares them with the records.
"""

from __future__ import annotations

import threading
from collections import Counter

from pipeline.admission import EngineLoad


class EngineTokens:
    """Prompt and completion tokens of the requests that an engine finished; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter()

    def add(self, load: EngineLoad) -> None:
        """Count the requests that ended in a step."""
        if load.prompt_tokens or load.completion_tokens:
            with self._lock:
                self._counted["prompt"] += load.prompt_tokens
                self._counted["completion"] += load.completion_tokens

    def take(self) -> dict[str, int]:
        """Tokens by kind since the last call; empty if nothing ended."""
        with self._lock:
            counted, self._counted = self._counted, Counter()
        return dict(counted)
