"""What the driver measures of a run: how far it is, what ended how, and that somebody looks.

In: what the driver sees of its replicas, once a second, and how the start ended. Out: metrics of
the run. Counters never fall: records that a lost replica had not journaled are counted once, with
their second making left out until the first is reached again.
"""

from __future__ import annotations

import time
from collections import Counter

from pipeline import metrics
from pipeline.metrics import Metric
from pipeline.records import Status
from pipeline.report import Result
from pipeline.roster import Snapshot
from pipeline.totals import Totals


class RunMetrics:
    """Of one start of a run."""

    def __init__(self, *, planned: int, before: int, replicas: int) -> None:
        """``planned`` rows in the run, ``before`` of them done before this start."""
        self._before = before
        self._counted: Counter[tuple[Metric, str]] = Counter()
        metrics.RUN_ACTIVE.set(1)
        metrics.DRIVER_LOOKED.set(time.time())
        metrics.RUN_ROWS.set(planned, "planned")
        metrics.RUN_ROWS.set(before, "done")
        metrics.REPLICAS_WANTED.set(replicas)
        metrics.REPLICAS_RUNNING.set(0)

    def tell(self, seen: Snapshot, earlier: Totals | None) -> None:
        """What the driver just saw; ``earlier`` are the parts before this start, once known."""
        tally = seen.tally
        metrics.DRIVER_LOOKED.set(time.time())
        metrics.REPLICAS_RUNNING.set(seen.running)
        metrics.REPLICA_RESTARTS.set(seen.replica_restarts)
        metrics.ENGINE_RESTARTS.set(seen.engine_restarts)
        metrics.RUN_ROWS.set(self._before + tally.rows, "done")
        errored = earlier.rows[Status.ERRORED] if earlier is not None else 0
        metrics.RUN_ROWS.set(errored + tally.failed, "errored")
        self._reach(metrics.ROWS, Status.SUCCEEDED, tally.rows - tally.failed)
        self._reach(metrics.ROWS, Status.ERRORED, tally.failed)
        self._reach(metrics.TOKENS, "prompt", tally.prompt_tokens)
        self._reach(metrics.TOKENS, "completion", tally.tokens)
        self._reach(metrics.TOKENS, "cached", tally.cached_tokens)
        self._reach(metrics.TOKENS, "image", tally.image_tokens)
        for code, count in tally.errors.items():
            self._reach(metrics.FAILURES, code, count)

    def conclude(self, result: Result, earlier: Totals | None) -> None:
        """How the start ended: what its parts hold beyond what the driver has seen."""
        totals = result.totals
        metrics.RUN_ROWS.set(totals.ended, "done")
        metrics.RUN_ROWS.set(totals.rows[Status.ERRORED], "errored")
        if earlier is None:  # what is this start's cannot be told
            return
        for metric, now, then in (
            (metrics.ROWS, totals.rows, earlier.rows),
            (metrics.TOKENS, totals.tokens, earlier.tokens),
            (metrics.FAILURES, totals.errors, earlier.errors),
        ):
            for label, count in now.items():
                self._reach(metric, label, count - then.get(label, 0))

    def end(self) -> None:
        """The driver leaves the run."""
        metrics.RUN_ACTIVE.set(0)
        metrics.REPLICAS_RUNNING.set(0)

    def _reach(self, metric: Metric, label: str, total: int) -> None:
        """Count up to ``total`` for this start."""
        grown = total - self._counted[metric, label]
        if grown > 0:
            metric.add(grown, label)
            self._counted[metric, label] = total
