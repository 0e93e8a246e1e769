"""How long completions will be: from those of an earlier run, from a given mean, or from the caps.

In: samples by kind and cap, and completions of an earlier run (``previous``). Out: the expected
completion tokens, with a range. A completion that was cut by its cap says only that it would have
been at least that long, so lengths are a survival curve (Kaplan & Meier, 1958) and what is expected
under another cap c is the area below it up to c: E[min(L, c)] = integral of S(t) from 0 to c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Z95 = 1.96
"""Standard deviations to each side that hold 95 % of a normal distribution."""
_LEAST_COMPLETIONS = 30
"""Completions of a kind below which a broader kind is asked."""
_CAP_BITS = 7
"""Significant bits of a cap: within 0.8 %, and the caps people write (64, 100, 2000) stay exact."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a sample before it is generated; coarse, so that there are few."""

    with_images: bool
    cap_bits: int
    """Bit length of ``max_completion_tokens`` as asked for: it often tells what is expected."""
    prompt_bits: int
    """Bit length of the prompt's number of tokens."""

    def broader(self) -> Iterator[tuple[int, ...]]:
        """Groups it belongs to, the narrowest first and that of all samples last."""
        whole = (int(self.with_images), self.cap_bits, self.prompt_bits)
        return (whole[:size] for size in range(len(whole), -1, -1))


Cells = Mapping[tuple[Kind, int], float]
"""Samples by kind and cap: the most tokens that one can have, as ``rounded_cap`` gives it."""


def rounded_cap(cap: int) -> int:
    """``cap`` to seven significant bits."""
    shift = max(0, cap.bit_length() - _CAP_BITS)
    return (cap + (1 << shift >> 1)) >> shift << shift


@dataclass(frozen=True, slots=True)
class Range:
    """An expected value and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


class OutputModel(Protocol):
    """What completion tokens are expected from."""

    def mean(self, kind: Kind, cap: int) -> float:
        """Expected tokens of one sample."""

    def total(self, cells: Cells, most: float, sampling_sd: float) -> Range:
        """Expected tokens of all ``cells``, at ``most`` so many; ``sampling_sd`` is the standard
        error, in tokens, of having counted a part of the input only."""

    def describe(self) -> dict[str, object]:
        """Where the figures come from."""


@dataclass(frozen=True, slots=True)
class Caps:
    """Nothing is known: every completion is as long as it may be."""

    def mean(self, kind: Kind, cap: int) -> float:
        del kind
        return float(cap)

    def total(self, cells: Cells, most: float, sampling_sd: float) -> Range:
        del cells
        return Range(most, 0.0, most + Z95 * sampling_sd)

    def describe(self) -> dict[str, object]:
        return {
            "kind": "caps",
            "text": "an upper bound: each completion as long as max_completion_tokens allows; a "
            "finished run of the same model beside output.uri, --previous or --expected-tokens "
            "gives an estimate",
        }


@dataclass(frozen=True, slots=True)
class Given:
    """The user's own mean."""

    tokens: float
    """Completion tokens of a sample, on average."""

    def mean(self, kind: Kind, cap: int) -> float:
        del kind
        return min(self.tokens, float(cap))

    def total(self, cells: Cells, most: float, sampling_sd: float) -> Range:
        value = sum(samples * self.mean(*cell) for cell, samples in cells.items())
        return Range(value, 0.0, most + Z95 * sampling_sd)

    def describe(self) -> dict[str, object]:
        return {
            "kind": "expected_tokens",
            "tokens": self.tokens,
            "text": f"--expected-tokens {self.tokens:g} a completion, or its cap if that is less; "
            "the range ends at the caps, as a mean says nothing of the spread",
        }


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Completions of an earlier run; arrays of the same length, one item per completion."""

    tokens: npt.NDArray[np.int64]
    cut: npt.NDArray[np.bool_]
    """Whether it was cut by its cap (``finish_reason`` length)."""
    kinds: npt.NDArray[np.int64]
    """Shape (completions, 3): ``Kind``'s fields."""


@dataclass(frozen=True, slots=True)
class _Mean:
    """Of min(length, cap)."""

    value: float
    sd: float
    """Of one completion."""
    low: float
    """If all that were cut at the longest caps had ended right there."""
    high: float
    """If none of them ever ended."""


class Curve:
    """The share of completions that are longer than t tokens, from lengths of which some are cut.

    Beyond the longest length seen the curve falls with the mean rate (Brown, Hollander & Korwar,
    1974); how far off that may be is told by ``low`` and ``high``.
    """

    def __init__(self, tokens: npt.NDArray[np.int64], cut: npt.NDArray[np.bool_]) -> None:
        times, places, here = np.unique(tokens, return_inverse=True, return_counts=True)
        ended = np.bincount(places, weights=~cut, minlength=len(times))
        at_risk = len(tokens) - np.cumsum(here) + here
        self.completions = len(tokens)
        self._starts = np.concatenate([[0.0], times])
        self._shares = np.concatenate([[1.0], np.cumprod(1 - ended / at_risk)])
        exposure = float(tokens.sum())
        self._rate = float(ended.sum()) / exposure if exposure else math.inf
        self.within = lru_cache(maxsize=None)(self._within)

    def _within(self, cap: int) -> _Mean:
        """Tokens of a completion that may have at most ``cap``."""
        edges = np.minimum(self._starts, cap)
        ends, shares = edges[1:], self._shares[:-1]
        mean = float(shares @ (ends - edges[:-1]))
        square = float(shares @ (ends**2 - edges[:-1] ** 2))  # E[L^2] = integral of 2 t S(t)
        last, left = float(self._starts[-1]), float(self._shares[-1])
        beyond = max(0.0, cap - last)
        tail = left * _exponential(beyond, self._rate)
        square += tail * (2 * last + beyond)  # as if it fell evenly there
        value = mean + tail
        sd = math.sqrt(max(0.0, square - value**2))
        return _Mean(value, sd, mean, mean + left * beyond)


def _exponential(width: float, rate: float) -> float:
    """Integral of exp(-rate t) from 0 to ``width``."""
    if rate == 0:
        return width
    return 0.0 if math.isinf(rate) else -math.expm1(-rate * width) / rate


class FromRun:
    """Lengths like those of an earlier run, kind by kind; of a kind that it has fewer than 30 of,
    like those of a broader one."""

    def __init__(self, observed: Observed, *, run: str, finished_at: str, records: int) -> None:
        """``observed`` must not be empty; ``records`` is how many the whole run has."""
        assert len(observed.tokens), "a run without completions tells nothing"
        self._observed = observed
        self._origin = {"run": run, "finished_at": finished_at, "records": records}
        self._curve = lru_cache(maxsize=None)(self._make_curve)

    def mean(self, kind: Kind, cap: int) -> float:
        return self._curve(self._group(kind)).within(cap).value

    def total(self, cells: Cells, most: float, sampling_sd: float) -> Range:
        """The range adds up what the earlier run's completions leave open of each mean (of one
        group all err alike), the chance in the new ones, and the part not counted."""
        value = low = high = chance = 0.0
        errors: dict[tuple[int, ...], float] = {}
        for (kind, cap), samples in cells.items():
            group = self._group(kind)
            curve = self._curve(group)
            each = curve.within(cap)
            value += samples * each.value
            low += samples * each.low
            high += samples * each.high
            chance += samples * each.sd**2
            error = samples * each.sd / math.sqrt(curve.completions)
            errors[group] = errors.get(group, 0.0) + error
        squares = chance + sum(error**2 for error in errors.values()) + sampling_sd**2
        spread = Z95 * math.sqrt(squares)
        return Range(value, max(0.0, low - spread), min(most + Z95 * sampling_sd, high + spread))

    def describe(self) -> dict[str, object]:
        seen = len(self._observed.tokens)
        mean = self._curve(()).within(int(self._observed.tokens.max()) or 1).value
        return {
            "kind": "previous_run",
            **self._origin,
            "completions": seen,
            "mean_tokens": round(mean, 1),
            "text": f"like the {seen} completions read of {self._origin['run']} (finished "
            f"{self._origin['finished_at']}), by images, cap and prompt length; the range holds if "
            "rows and parameters are alike",
        }

    @cached_property
    def _sizes(self) -> dict[tuple[int, ...], int]:
        sizes: dict[tuple[int, ...], int] = {}
        kinds, counts = np.unique(self._observed.kinds, axis=0, return_counts=True)
        for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            for size in range(len(kind) + 1):
                group = tuple(kind[:size])
                sizes[group] = sizes.get(group, 0) + count
        return sizes

    def _group(self, kind: Kind) -> tuple[int, ...]:
        """The narrowest group of ``kind`` with completions enough."""
        enough = (g for g in kind.broader() if self._sizes.get(g, 0) >= _LEAST_COMPLETIONS)
        return next(enough, ())

    def _make_curve(self, group: tuple[int, ...]) -> Curve:
        inside = (self._observed.kinds[:, : len(group)] == group).all(axis=1)
        return Curve(self._observed.tokens[inside], self._observed.cut[inside])
