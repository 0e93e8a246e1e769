"""Hands a process's metrics to Ray, whose agent on each node exports them to Prometheus.

In: ``metrics.REGISTRY``. Out: Ray's counters, gauges and histograms, once a second, by a thread of
its own, so that steps pay a microsecond and no more.

Ray sends them on to the node's agent every ``RAY_metrics_report_interval_ms`` (10 s unless the
cluster was started with another), and when a process ends in order. A process that is killed takes
what it had not sent with it; a gauge that is no longer set is gone after two intervals. The agent
knows a histogram's events by bucket only and gives each the middle of its bucket: quantiles are as
exact as the buckets are, sums and averages are not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ray.util import metrics as ray_metrics

from pipeline.metrics import PROCESS_LABELS, REGISTRY, Kind, Metric, Sample

_INTERVAL_S = 1.0
_LAST_S = 5.0
"""What the end waits for a last hand-over."""


class Exporter:
    """Exports this process's metrics while it is open; a context manager, or ``close`` it."""

    def __init__(
        self, *, run: str, replica: str = "", look: Callable[[], None] = lambda: None
    ) -> None:
        """Begin. ``look`` is called before each hand-over: it sets what is so just then."""
        self._tags = dict(zip(PROCESS_LABELS, (run, replica), strict=True))
        self._look = look
        self._known: dict[Metric, Any] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._export_on, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand over what is left, and end; twice is fine."""
        self._over.set()
        self._thread.join(_LAST_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _export_on(self) -> None:
        while True:
            last = self._over.wait(_INTERVAL_S)
            self._look()
            for sample in REGISTRY.take():
                self._export(sample)
            if last:
                return

    def _export(self, sample: Sample) -> None:
        metric = sample.metric
        known = self._known.get(metric)
        if known is None:
            known = self._known[metric] = _declared(metric)
        tags = {**self._tags, **dict(zip(metric.labels, sample.labels, strict=True))}
        match metric.kind:
            case Kind.COUNTER:
                known.inc(sample.value, tags)
            case Kind.GAUGE:
                known.set(sample.value, tags)
            case Kind.HISTOGRAM:
                for value, count in zip(_within(metric.buckets), sample.counts, strict=True):
                    for _ in range(count):
                        known.observe(value, tags)


def _declared(metric: Metric) -> Any:
    tag_keys = (*PROCESS_LABELS, *metric.labels)
    match metric.kind:
        case Kind.COUNTER:
            return ray_metrics.Counter(metric.name, metric.help, tag_keys)
        case Kind.GAUGE:
            return ray_metrics.Gauge(metric.name, metric.help, tag_keys)
        case Kind.HISTOGRAM:
            return ray_metrics.Histogram(metric.name, metric.help, list(metric.buckets), tag_keys)


def _within(buckets: tuple[float, ...]) -> list[float]:
    """A value of each bucket: its upper end, which it includes; twice the last one's for what is
    above it."""
    return [*buckets, 2 * buckets[-1]]
