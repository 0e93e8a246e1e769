"""Charts as geometry: values -> bars, ticks and spans in percent of the plot's width and height.

The page draws them as SVG that is stretched to the reader's screen, and their labels as text beside
it, which therefore keeps its size on any of them. Nothing here knows of HTML.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline import formats
from pipeline.histogram import latency_bounds, latency_bucket, length_bounds, length_bucket

_GAP = 3.0  # percent of the width, of a pause
_MOST_GAPS_SHARE = 30.0  # percent of the width, of all pauses together
_CHARACTER = 2.4  # percent of the width that one takes on a telephone
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
_MINUTE_S, _DAY_S = 60, 86400
_SECONDS_SHOWN_S = 600
"""Times of a shorter run are told with their seconds."""
_TIME_TICKS = 6
_VALUE_TICKS = 4
_EDGE_TICKS = 6
_LEAST_BARS = 6
"""So that a single value is a bar among empty places, not a wall."""
_MOST_BARS = 40


@dataclass(frozen=True, slots=True)
class Bar:
    """One value."""

    left: float
    width: float
    height: float
    value: float
    title: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at a place of an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the time axis."""

    left: float
    width: float
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars over an axis."""

    bars: Sequence[Bar]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    pauses: Sequence[Span] = ()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of time, and where it lies on the axis."""

    start: float
    end: float
    left: float
    width: float


class TimeAxis:
    """Time from left to right, with pauses cut down to narrow gaps."""

    def __init__(self, throughput: Mapping[str, Any]) -> None:
        """``throughput`` as report.json has it."""
        bin_s = throughput["bin_s"]
        stretches = [
            (formats.epoch(stretch["start"]), len(stretch["rows"]) * bin_s)
            for stretch in throughput["stretches"]
        ]
        gaps = max(0, len(stretches) - 1)
        self._gap = min(_GAP, _MOST_GAPS_SHARE / gaps) if gaps else 0.0
        self._seconds = sum(seconds for _, seconds in stretches)
        scale = (100 - gaps * self._gap) / self._seconds if self._seconds else 0.0
        self._pieces: list[_Piece] = []
        left = 0.0
        for start, seconds in stretches:
            self._pieces.append(_Piece(start, start + seconds, left, seconds * scale))
            left += seconds * scale + self._gap

    def at(self, moment: float) -> float:
        """Where a point in time lies; one within a pause, where that begins."""
        place = 0.0
        for piece in self._pieces:
            if moment < piece.start:
                return place
            reached = min(moment, piece.end) - piece.start
            place = piece.left + piece.width * reached / (piece.end - piece.start)
        return place

    def pauses(self) -> list[Span]:
        """The gaps."""
        return [
            Span(
                before.left + before.width,
                self._gap,
                f"Nothing ran for {formats.duration(after.start - before.end)}, from "
                f"{formats.moment(before.end)} to {formats.moment(after.start)}",
            )
            for before, after in pairwise(self._pieces)
        ]

    def ticks(self) -> list[Tick]:
        """Where each stretch begins, and round times within; no label touches another."""
        step = next((s for s in _STEPS_S if s * _TIME_TICKS >= self._seconds), _DAY_S)
        begins = [piece.start for piece in self._pieces]
        within = [moment for piece in self._pieces for moment in _round_times(piece, step)]
        labels = _clock_labels(sorted({*begins, *within}), with_seconds=step < _MINUTE_S)
        ticks: list[Tick] = []
        for moment in (*begins, *within):
            tick = Tick(self.at(moment), labels[moment])
            if tick.at + _room(tick) <= 100 + _CHARACTER and not any(
                abs(tick.at - other.at) < _room(tick) + _room(other) for other in ticks
            ):
                ticks.append(tick)
        return sorted(ticks, key=lambda tick: tick.at)

    def ends(self) -> tuple[str, str]:
        """The times it begins and ends at; empty if there are none."""
        if not self._pieces:
            return "", ""
        first, last = self._pieces[0].start, self._pieces[-1].end
        with_seconds = last - first < _SECONDS_SHOWN_S
        texts = [formats.clock(moment, with_seconds=with_seconds) for moment in (first, last)]
        if formats.day(first) != formats.day(last):
            texts = [
                f"{formats.day(at)} {text}" for at, text in zip((first, last), texts, strict=True)
            ]
        return texts[0], texts[1]


def _round_times(piece: _Piece, step: int) -> list[float]:
    first = math.floor(piece.start / step) * step + step
    return [float(first + n * step) for n in range(math.ceil((piece.end - first) / step))]


def _clock_labels(moments: Sequence[float], *, with_seconds: bool) -> dict[float, str]:
    """Times of day; of several days, the first of each has its date."""
    labels: dict[float, str] = {}
    several = len({formats.day(moment) for moment in moments}) > 1
    day = ""
    for moment in moments:
        dated = f"{formats.day(moment)} " if several and formats.day(moment) != day else ""
        day = formats.day(moment)
        labels[moment] = dated + formats.clock(moment, with_seconds=with_seconds)
    return labels


def _room(tick: Tick) -> float:
    """What a label takes to each side of its place."""
    return _CHARACTER * (len(tick.label) + 1) / 2


def throughput_chart(throughput: Mapping[str, Any], axis: TimeAxis) -> Chart:
    """Completion tokens per second over time; rows per second if there are no tokens."""
    bin_s, by_rows = throughput["bin_s"], not throughput["completion_tokens"]
    bins = [
        (formats.epoch(stretch["start"]) + number * bin_s, rows / bin_s, tokens / bin_s)
        for stretch in throughput["stretches"]
        for number, (rows, tokens) in enumerate(
            zip(stretch["rows"], stretch["completion_tokens"], strict=True)
        )
    ]
    values = [rows if by_rows else tokens for _, rows, tokens in bins]
    top = nice_ceiling(max(values, default=0))
    bars = [
        Bar(
            left=axis.at(start),
            width=axis.at(start + bin_s) - axis.at(start),
            height=100 * value / top,
            value=value,
            title=f"{formats.moment(start)}, {bin_s} s: {formats.rate(tokens)} tokens/s, "
            f"{formats.rate(rows)} rows/s",
        )
        for (start, rows, tokens), value in zip(bins, values, strict=True)
    ]
    return Chart(bars, axis.ticks(), _value_ticks(top), axis.pauses())


def length_chart(buckets: Sequence[Mapping[str, Any]], of: str) -> Chart:
    """Texts by length; each bar's texts are up to twice as long as those of the bar before."""
    counts = {length_bucket(bucket["to"]): bucket[of] for bucket in buckets}
    slots = _places(counts, least=0)
    bounds = [length_bounds(slot) for slot in slots]
    ranges = [
        formats.integer(low)
        if low == high
        else f"{formats.integer(low)} to {formats.integer(high)}"
        for low, high in bounds
    ]
    return _histogram(
        [counts.get(slot, 0) for slot in slots],
        [f"{text} tokens" for text in ranges],
        of,
        [formats.compact(low) for low, _ in bounds],
    )


def latency_chart(histogram: Sequence[Mapping[str, Any]]) -> Chart:
    """Completions by latency; buckets are joined where there would be too many bars to see."""
    buckets = {latency_bucket(0.999 * each["to"]): each["completions"] for each in histogram}
    joined = max(1, math.ceil(len(_places(buckets)) / _MOST_BARS))
    counts: Counter[int] = Counter()
    for bucket, count in buckets.items():
        counts[bucket // joined] += count
    slots = _places(counts)
    bounds = [
        (latency_bounds(slot * joined)[0], latency_bounds(slot * joined + joined - 1)[1])
        for slot in slots
    ]
    return _histogram(
        [counts.get(slot, 0) for slot in slots],
        [f"{formats.latency(low)} to {formats.latency(high)}" for low, high in bounds],
        "completions",
        [formats.latency(low) for low, _ in bounds],
    )


def nice_ceiling(value: float) -> float:
    """The least of 1, 2, 4, 5, 8, 10, 20, ... and 0.5, 0.4, ... that ``value`` does not exceed."""
    if value <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(value))
    return next(n * size for n in (1, 2, 4, 5, 8, 10, 20) if n * size >= value * (1 - 1e-9))


def _places(counts: Mapping[int, int], least: int | None = None) -> range:
    """Where there are counts, what lies between, and some beside if that is little; none below
    ``least``."""
    if not counts:
        return range(0)
    first, last = min(counts), max(counts)
    lacking = max(0, _LEAST_BARS - (last - first + 1))
    start = first - lacking // 2
    start = start if least is None else max(least, start)
    return range(start, max(last + 1, start + _LEAST_BARS))


def _histogram(
    counts: Sequence[int], ranges: Sequence[str], of: str, edges: Sequence[str]
) -> Chart:
    """Bars of one width; ``edges`` are what they start at."""
    top = nice_ceiling(max(counts, default=0))
    width = 100 / max(1, len(counts))
    every = max(1, math.ceil(len(counts) / _EDGE_TICKS))
    bars = [
        Bar(
            number * width,
            width,
            100 * count / top,
            count,
            f"{text}: {formats.integer(count)} {of}",
        )
        for number, (count, text) in enumerate(zip(counts, ranges, strict=True))
    ]
    x_ticks = [Tick(n * width, edges[n]) for n in range(0, len(counts), every)]
    y_ticks = [tick for tick in _value_ticks(top) if "." not in tick.label or top >= _VALUE_TICKS]
    return Chart(bars, x_ticks, y_ticks)


def _value_ticks(top: float) -> list[Tick]:
    """From 0 to ``top``, in round steps."""
    steps = 5 if f"{top:e}".startswith("5") else _VALUE_TICKS
    return [Tick(100 * n / steps, formats.round_number(top * n / steps)) for n in range(steps + 1)]
