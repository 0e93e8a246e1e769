"""The vocabulary of metrics, and where a process keeps them until they are exported.

In: what steps count, measure and set, by any thread. Out: ``Registry.take``, all that came since
the last call. Nothing here knows who exports: ``ray_metrics`` hands it to Ray, tests look at it.
Labels are closed sets, fixed with each metric: no row, shard or URI ever stands in one.

The process's own registry, ``REGISTRY``, is what the metrics below write to, as is usual for
metrics: what is counted deep in a step need not be passed down to it. Its size is bounded by the
vocabulary, so it may also be filled where nobody exports it. ``vllm_`` metrics are vLLM's, by
vLLM's names.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

EXPORTED_PREFIX = "ray_"
"""What Ray puts before each name; it also appends ``_total`` to those of counters."""


class Kind(StrEnum):
    """What becomes of a metric's values."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One metric, declared once; its methods write to the process's registry.

    Values of ``labels`` are given in their order.
    """

    kind: Kind
    name: str
    """As Ray gets it; times are in seconds."""
    help: str
    labels: tuple[str, ...] = ()
    """Beside those that tell the process: ``PROCESS_LABELS``."""
    buckets: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets, both rising and above 0; one without end follows."""

    @property
    def exported_name(self) -> str:
        """As Prometheus finds it at Ray's endpoints; a histogram's series have suffixes."""
        suffix = "_total" if self.kind is Kind.COUNTER else ""
        return f"{EXPORTED_PREFIX}{self.name}{suffix}"

    def add(self, amount: float, *labels: str) -> None:
        """Count ``amount`` more; what is not above 0 adds nothing."""
        REGISTRY.add(self, amount, labels)

    def set(self, value: float, *labels: str) -> None:
        """What is so from now on."""
        REGISTRY.set(self, value, labels)

    def observe(self, value: float, *labels: str) -> None:
        """One more event of this size."""
        REGISTRY.observe(self, value, labels)

    @contextmanager
    def timed(self, *labels: str) -> Iterator[None]:
        """Observe the seconds that the block takes, also if it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.observe(time.monotonic() - began, *labels)


@dataclass(frozen=True, slots=True)
class Sample:
    """What came together of one metric with one set of label values."""

    metric: Metric
    labels: tuple[str, ...]
    value: float = 0.0
    """A counter's increase since it was taken last, or a gauge's value."""
    counts: tuple[int, ...] = ()
    """A histogram's events since they were taken last, by bucket."""


_Key = tuple[Metric, tuple[str, ...]]


@dataclass
class Registry:
    """Values of metrics, kept until they are taken; thread-safe."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _grown: dict[_Key, float] = field(default_factory=dict)
    _set: dict[_Key, float] = field(default_factory=dict)
    _counts: dict[_Key, list[int]] = field(default_factory=dict)

    def add(self, metric: Metric, amount: float, labels: tuple[str, ...]) -> None:
        """See ``Metric.add``."""
        if amount > 0:
            key = (metric, labels)
            with self._lock:
                self._grown[key] = self._grown.get(key, 0.0) + amount

    def set(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        """See ``Metric.set``."""
        with self._lock:
            self._set[metric, labels] = value

    def observe(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        """See ``Metric.observe``."""
        bucket = bisect_left(metric.buckets, value)
        key = (metric, labels)
        with self._lock:
            counts = self._counts.get(key)
            if counts is None:
                counts = self._counts[key] = [0] * (len(metric.buckets) + 1)
            counts[bucket] += 1

    def take(self) -> list[Sample]:
        """Counters and histograms: what came since the last call. Gauges: all, each time."""
        with self._lock:
            grown, self._grown = self._grown, {}
            counts, self._counts = self._counts, {}
            gauges = dict(self._set)
        return [
            *(Sample(metric, labels, value) for (metric, labels), value in grown.items()),
            *(Sample(metric, labels, value) for (metric, labels), value in gauges.items()),
            *(Sample(metric, labels, counts=tuple(n)) for (metric, labels), n in counts.items()),
        ]


REGISTRY = Registry()
"""Of this process."""

PROCESS_LABELS = ("run", "replica")
"""Every metric has them: the config's ``name``, and the replica's id as in parts and logs, which is
empty for the driver. Ray adds its own; ``NodeAddress`` and ``WorkerId`` tell processes apart."""

_QUICK_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Of a request to an object store, which is tried for two minutes."""
_SLOW_S = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0)
"""Of what takes from seconds to an hour: a shard."""
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""vLLM's, for latencies of requests."""
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""vLLM's."""
_PER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
"""vLLM's."""

# The driver's, about the whole run.
RUN_ACTIVE = Metric(
    Kind.GAUGE, "maverick_run_active", "1 while a driver is at the run, 0 at its end"
)
RUN_ROWS = Metric(
    Kind.GAUGE,
    "maverick_run_rows",
    "Rows of the whole run, all starts together: planned, done (they ended), errored (of those)",
    ("state",),
)
ROWS = Metric(
    Kind.COUNTER,
    "maverick_rows",
    "Rows that ended in this start, those found in journals, too: succeeded, errored, expired",
    ("status",),
)
TOKENS = Metric(
    Kind.COUNTER,
    "maverick_tokens",
    "Tokens of this start's records: prompt, completion, cached (of the prompt), image (likewise)",
    ("kind",),
)
FAILURES = Metric(
    Kind.COUNTER, "maverick_failures", "This start's records without success", ("code",)
)
REPLICAS_WANTED = Metric(
    Kind.GAUGE, "maverick_replicas_wanted", "engine.replicas of the config, or its min"
)
REPLICAS_RUNNING = Metric(
    Kind.GAUGE, "maverick_replicas_running", "Replicas with an engine, heard of within 5 s"
)
REPLICA_RESTARTS = Metric(
    Kind.GAUGE,
    "maverick_replica_restarts",
    "Processes of this start that took a lost replica's place",
)
ENGINE_RESTARTS = Metric(
    Kind.GAUGE,
    "maverick_engine_restarts",
    "Engines that were started again in their replica, in this start",
)
DRIVER_LOOKED = Metric(
    Kind.GAUGE,
    "maverick_driver_looked_timestamp_seconds",
    "When the driver last looked after its replicas, about once a second; Unix time",
)
LEASE_RENEWED = Metric(
    Kind.GAUGE,
    "maverick_lease_renewed_timestamp_seconds",
    "When the driver last renewed its lease, every 5 s; Unix time",
)
LEASE_LOST = Metric(
    Kind.GAUGE,
    "maverick_lease_lost",
    "1 once another driver took this one's lease over, or it was deleted; else 0",
)

# A replica's.
REPLICA_STATE = Metric(
    Kind.GAUGE,
    "maverick_replica_state",
    "1 for the state a replica's process is in: starting, running or drained; 0 for the others",
    ("state",),
)
REPLICA_ROWS = Metric(Kind.COUNTER, "maverick_replica_rows", "Rows that ended in this replica")
REPLICA_TOKENS = Metric(
    Kind.COUNTER,
    "maverick_replica_completion_tokens",
    "Completion tokens of this replica's records",
)
WINDOW_LIMIT = Metric(
    Kind.GAUGE, "maverick_window_limit", "Requests that the replica may have in its engine"
)
WINDOW_REQUESTS = Metric(
    Kind.GAUGE, "maverick_window_requests", "Requests that it has there, or on their way"
)
BACKLOG_REQUESTS = Metric(
    Kind.GAUGE, "maverick_backlog_requests", "Requests of open shards that wait for the window"
)
OPEN_SHARDS = Metric(Kind.GAUGE, "maverick_open_shards", "Shards that the replica is working on")
ENGINE_START_SECONDS = Metric(
    Kind.GAUGE,
    "maverick_engine_start_seconds",
    "How long the replica's last engine took to start, or to fail to",
)
SHARD_SECONDS = Metric(
    Kind.HISTOGRAM,
    "maverick_shard_seconds",
    "From a shard's arrival at its replica until its part is committed",
    buckets=_SLOW_S,
)
JOURNAL_SECONDS = Metric(
    Kind.HISTOGRAM,
    "maverick_journal_seconds",
    "One write to a shard's journal, encoding and retries included",
    buckets=_QUICK_S,
)
COMMIT_SECONDS = Metric(
    Kind.HISTOGRAM,
    "maverick_commit_seconds",
    "The commit of one part, encoding and retries included",
    buckets=_QUICK_S,
)

# Of the driver and of replicas.
STORE_SECONDS = Metric(
    Kind.HISTOGRAM,
    "maverick_store_seconds",
    "One operation of the object store, retries included: read, write, list, look or delete",
    ("operation",),
    _QUICK_S,
)
STORE_RETRIES = Metric(
    Kind.COUNTER, "maverick_store_retries", "Requests to the object store that were made again"
)

# vLLM's own, by its names, with "_" for the ":" that Ray does not take.
_ENGINE = ("model_name", "engine")
VLLM_RUNNING = Metric(
    Kind.GAUGE,
    "vllm_num_requests_running",
    "Number of requests in model execution batches.",
    _ENGINE,
)
VLLM_WAITING = Metric(
    Kind.GAUGE, "vllm_num_requests_waiting", "Number of requests waiting to be processed.", _ENGINE
)
VLLM_KV_CACHE = Metric(
    Kind.GAUGE, "vllm_kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", _ENGINE
)
VLLM_PREFIX_QUERIES = Metric(
    Kind.COUNTER,
    "vllm_prefix_cache_queries",
    "Prefix cache queries, in terms of number of queried tokens.",
    _ENGINE,
)
VLLM_PREFIX_HITS = Metric(
    Kind.COUNTER,
    "vllm_prefix_cache_hits",
    "Prefix cache hits, in terms of number of cached tokens.",
    _ENGINE,
)
VLLM_PREEMPTIONS = Metric(
    Kind.COUNTER,
    "vllm_num_preemptions",
    "Cumulative number of preemption from the engine.",
    _ENGINE,
)
VLLM_PROMPT_TOKENS = Metric(
    Kind.COUNTER, "vllm_prompt_tokens", "Number of prefill tokens processed.", _ENGINE
)
VLLM_GENERATION_TOKENS = Metric(
    Kind.COUNTER, "vllm_generation_tokens", "Number of generation tokens processed.", _ENGINE
)
VLLM_SUCCESS = Metric(
    Kind.COUNTER,
    "vllm_request_success",
    "Count of successfully processed requests.",
    (*_ENGINE, "finished_reason"),
)
VLLM_LATENCY = Metric(
    Kind.HISTOGRAM,
    "vllm_e2e_request_latency_seconds",
    "Histogram of e2e request latency in seconds.",
    _ENGINE,
    _REQUEST_S,
)
VLLM_QUEUE_TIME = Metric(
    Kind.HISTOGRAM,
    "vllm_request_queue_time_seconds",
    "Histogram of time spent in WAITING phase for request.",
    _ENGINE,
    _REQUEST_S,
)
VLLM_FIRST_TOKEN = Metric(
    Kind.HISTOGRAM,
    "vllm_time_to_first_token_seconds",
    "Histogram of time to first token in seconds.",
    _ENGINE,
    _FIRST_TOKEN_S,
)
VLLM_PER_TOKEN = Metric(
    Kind.HISTOGRAM,
    "vllm_request_time_per_output_token_seconds",
    "Histogram of time_per_output_token_seconds per request.",
    _ENGINE,
    _PER_TOKEN_S,
)


def vocabulary() -> Sequence[Metric]:
    """Every metric there is, in the order of this module."""
    return [value for value in globals().values() if isinstance(value, Metric)]
