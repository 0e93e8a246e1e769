"""Rows to simulate: prompt and completion tokens, and what is known of them beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
_MEDIAN_PROMPT = 300
_MEDIAN_COMPLETION = 160
_SIGMA = 0.8
_MOST_PROMPT = 4096
_MOST_COMPLETION = 1024
_LONG_SHARE = 0.02
_LONG_FACTOR = 30
_TAIL_COMPLETION = 48


@dataclass(frozen=True)
class Workload:
    """Rows in input order."""

    name: str
    prompt: Tokens
    """Prompt tokens, one per row."""
    completion: Tokens
    """Completion tokens that the row will take; nobody knows them beforehand."""
    limit: Tokens
    """Most completion tokens the row asks for: what is known."""

    @property
    def rows(self) -> int:
        """Input rows."""
        return len(self.prompt)


def log_normal(rows: int, seed: int) -> Workload:
    """Log-normal prompts and completions; every row asks for the same most tokens."""
    dice = np.random.default_rng(seed)
    completion = _log_normal(dice, rows, _MEDIAN_COMPLETION, _MOST_COMPLETION)
    return Workload(
        name="log-normal",
        prompt=_log_normal(dice, rows, _MEDIAN_PROMPT, _MOST_PROMPT),
        completion=completion,
        limit=np.full(rows, _MOST_COMPLETION),
    )


def long_tail(rows: int, seed: int) -> Workload:
    """2 % of the rows, anywhere, take 30 times as many tokens; their limits tell which."""
    dice = np.random.default_rng(seed)
    factor = np.where(dice.random(rows) < _LONG_SHARE, _LONG_FACTOR, 1)
    completion = dice.integers(_TAIL_COMPLETION // 2, _TAIL_COMPLETION + 1, rows) * factor
    return Workload(
        name="long tail",
        prompt=_log_normal(dice, rows, _MEDIAN_PROMPT, _MOST_PROMPT),
        completion=completion,
        limit=_TAIL_COMPLETION * factor,
    )


def _log_normal(dice: np.random.Generator, rows: int, median: int, most: int) -> Tokens:
    drawn = np.rint(median * np.exp(_SIGMA * dice.standard_normal(rows)))
    tokens: Tokens = np.clip(drawn, 1, most).astype(np.int64)
    return tokens
