"""One batch run, from a config to its result: what every job that generates goes through.

In: a ``JobConfig`` and ``Options``. Out: a ``Result``; the records, reports and ``_SUCCESS`` are in
the run folder. The run is owned by its lease, resumed where it stood, run through the flow, and
accounted for; a failure or a signal on the way still leaves a report.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotReadyError
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jobs import signals
from jobs.cli import end_budget, name_run
from jobs.settle import (
    Job,
    Options,
    check_capacity,
    describe,
    flow_spec,
    local_cpus,
    local_node,
    settle,
)
from pipeline import logs, storage
from pipeline.budget import Budget
from pipeline.commit import (
    PartStats,
    commit_outcomes,
    committed_shards,
    counts,
    part_uri,
    read_stats,
)
from pipeline.config import JobConfig
from pipeline.engine import Engine, VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import AccountingError, LeaseLostError, PipelineError, StorageError
from pipeline.journal import clear_journals
from pipeline.lease import Lease, check_not_driven
from pipeline.live import About, LiveRun
from pipeline.openai_output import OPENAI_FILES, write_openai_output
from pipeline.prices import Usage, money
from pipeline.progress import ProgressDisplay
from pipeline.reopen import matches_any, reopen
from pipeline.report import Result, RunStatus, judge, write_report
from pipeline.roster import Snapshot
from pipeline.run import Run
from pipeline.totals import Sums, Totals
from pipeline.watch import Reason, Watch

log = logging.getLogger(__name__)

_REPORT_S = 4.0
"""What the totals and the report of an interrupted run may take: of ``limits.drain_s``, little is
left by then."""
_LATER_S = 2.0
"""What follows the report within the same time: a last look at progress, the lease, Ray."""


def run_batch(
    config: JobConfig,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    start_engine: Callable[[EngineSpec], Engine] = VLLMEngine,
) -> Result:
    """Settle the job, then run, resume, or only describe it.

    Args:
        config: the job.
        options: of this start.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError: config, input, output folder or cluster do not fit; nothing was started.
        PipelineError: the run failed; what is committed stays and the same command resumes.
    """
    logs.name_process(run=config.name)
    job = settle(config, options, start_engine)
    name_run(job.run.uri)
    if options.dry_run:
        return describe(job)
    job = _without_idle_retry(job)
    if job.run.complete and not job.options.retry:
        log.info("%s is finished; nothing to generate", job.run.uri)
        if job.run.accepted:
            log.warning(
                "--accept-changed changes nothing: nothing is left to make with it, and it is not "
                "written down; give it together with a --retry that matches records"
            )
        result = _finish(job, _Parts(job.run))
    else:
        result = _execute(job)
    _summarize(result)
    return result


def _without_idle_retry(job: Job) -> Job:
    """The job without its ``--retry`` if all rows have a record, and none is one to retry."""
    run, what = job.run, job.options.retry
    if not what or run.pending or matches_any(run.to, run.done, what):
        return job
    log.info("no record of %s is %s: nothing to retry", run.uri, " or ".join(sorted(what)))
    return replace(job, options=replace(job.options, retry=frozenset()))


def _execute(job: Job) -> Result:
    """Run what is pending. Nothing is written before the cluster is known to hold the replicas."""
    if job.run.plan.rows == 0 or not (job.run.pending or job.options.retry):
        with _owned(job) as (owned, lease), _told(owned, lease) as (live, parts):
            if owned.run.pending:
                parts.add(_commit_empty(owned))
            return live.conclude(_finish(owned, parts, lease))
    here = local_node()
    if here is not None:
        check_capacity(job, [here])  # before a Ray is started for it
    if not job.options.wait:
        check_not_driven(job.run.uri)
    with (
        connected(job),
        _owned(job) as (owned, lease),
        _told(owned, lease) as (live, parts),
    ):
        return live.conclude(_generate(owned, lease, live, parts))


@contextmanager
def connected(job: Job) -> Iterator[None]:
    """Within, Ray is there, and its nodes are known to hold the job's replicas.

    Raises:
        CapacityError: the cluster cannot be reached, or is too small.
        EngineError: Ray does not start here.
    """
    # Read when ray is imported. Ranks log alike; and what is left of a stopped flow must not start
    # another Ray.
    os.environ.update(RAY_DEDUP_LOGS="0", RAY_ENABLE_AUTO_CONNECT="0")
    # imports ray: 1-2 s that --help does without
    from pipeline.flow import cluster, cluster_grows, cluster_nodes
    from pipeline.ray_metrics import Exporter

    with cluster(local_cpus=local_cpus(), budget=end_budget), Exporter(run=job.config.name):
        signals.insist()
        check_capacity(job, cluster_nodes(), grows=cluster_grows())
        yield


@contextmanager
def _owned(job: Job) -> Iterator[tuple[Job, Lease]]:
    """The run is this driver's, looked at anew, started, and with the asked rows open again.

    Raises:
        RunBusyError: another driver is at it.
        Interrupted: a signal came before it was.
    """
    with (
        signals.deferred(job.config.limits.drain_s, "keeping what is finished, then exit"),
        acquired(job.run.uri, wait=job.options.wait) as lease,
    ):
        confirm = confirming(lease)
        run = job.open_run()  # another driver may have gone on with it meanwhile
        job = replace(job, run=run)
        if job.options.retry or not run.complete:
            run.start(confirm)
        if job.options.retry:
            what = job.options.retry
            found = reopen(job.to, run.plan, run.done, what, confirm)
            log.info("%d records are to be done again", found.records)
            confirm()
            job = replace(job, run=run.retry(what, found.shards))
        yield job, lease


def acquired(uri: str, *, wait: bool) -> Lease:
    """The lease of what is at ``uri``; a signal ends the wait for it, and bounds its release.

    Raises:
        Interrupted, RunBusyError, StorageError: see ``Lease.acquire``.
    """
    return Lease.acquire(uri, wait=wait, pause=signals.pause_or_stop, budget=end_budget)


def confirming(lease: Lease) -> Callable[[], None]:
    """What confirms the lease between two steps of long work, and is a place to stop at a signal.

    Its errors are ``Interrupted`` and those of ``Lease.confirm``.
    """

    def confirm() -> None:
        signals.check()
        lease.confirm()

    return confirm


@contextmanager
def _told(job: Job, lease: Lease) -> Iterator[tuple[LiveRun, _Parts]]:
    """Within, ``_progress.json`` tells of this start, with what the parts before it hold."""
    run, config = job.run, job.config
    parts = _Parts(run)
    about = About(
        uri=run.uri,
        id=run.id,
        name=config.name,
        profile=config.engine.profile,
        model=run.manifest["model"]["name"],
        replicas=config.engine.most_replicas,
        rows_total=run.plan.rows,
        rows_before=run.plan.rows - sum(shard.rows for shard in run.pending),
        parts_before=len(run.done),
        owner=lease.owner,
        fewest_replicas=config.engine.fewest_replicas,
    )
    try:
        with LiveRun(
            about,
            earlier_totals=parts.earlier,
            lease_lost=lambda: lease.lost,
            budget=end_budget,
        ) as live:
            yield live, parts
    finally:
        parts.stop()


def _generate(job: Job, lease: Lease, live: LiveRun, parts: _Parts) -> Result:
    """Run the flow to its end; a failure or a signal on the way still leaves a report."""
    from pipeline.flow import run_shards

    run, limits = job.run, job.config.limits
    log.info("running %d of %d shards into %s", len(run.pending), len(run.plan.shards), run.uri)
    rows_done = run.plan.rows - sum(shard.rows for shard in run.pending)
    with ProgressDisplay(total=run.plan.rows, done=rows_done) as display:
        watch = Watch(
            max_error_rate=limits.max_error_rate,
            min_rows=limits.error_rate_min_rows,
            deadline=job.deadline,
            lease_lost=lambda: lease.lost,
            drain_s=limits.drain_s,
            interrupted=_interruption,
            show=lambda seen: display.update(
                seen.tally,
                running=seen.running,
                restarts=seen.engine_restarts + seen.replica_restarts,
                lacking=seen.lacking,
            ),
        )

        def look(seen: Snapshot) -> Budget | None:
            stop = watch(seen)
            live.tell(seen, draining=stop is not None)
            return stop

        try:
            if run.pending and not watch.is_late():
                for stats in run_shards(flow_spec(job), run.pending, look):
                    parts.add(stats)
        except PipelineError as error:
            return _broken(job, lease, RunStatus.FAILED, str(error), parts)
    return _conclude(job, lease, watch, parts)


def _conclude(job: Job, lease: Lease, watch: Watch, parts: _Parts) -> Result:
    """What comes after the flow: the end, or what the reason to stop asks for."""
    match watch.stop and watch.stop.reason:
        case None:
            return _finish(job, parts, lease)
        case Reason.LEASE_LOST:
            assert watch.stop is not None
            raise LeaseLostError(watch.stop.message)
        case Reason.DEADLINE:
            return _expire(job, lease, parts)
        case reason:
            assert watch.stop is not None
            over = reason is Reason.ERROR_RATE
            status = RunStatus.OVER_ERROR_RATE if over else RunStatus.INTERRUPTED
            return _broken(job, lease, status, watch.stop.message, parts)


def _expire(job: Job, lease: Lease, parts: _Parts) -> Result:
    """The deadline has passed: what is left becomes ``expired``, and the run ends as complete."""
    from pipeline.flow import expire_shards

    left = [shard for shard in job.run.pending if shard.index not in parts.sums]
    log.info("the deadline has passed; %d open shards end as they are", len(left))
    lease.confirm()
    try:
        for stats in expire_shards(flow_spec(job), left) if left else ():
            parts.add(stats)
            signals.check()
    except (PipelineError, signals.Interrupted) as error:
        return _broken(job, lease, RunStatus.INTERRUPTED, str(error), parts)
    return _finish(job, parts, lease, deadline_passed=True)


def _finish(
    job: Job, parts: _Parts, lease: Lease | None = None, *, deadline_passed: bool = False
) -> Result:
    """Account for every row, write the reports and, last, ``_SUCCESS``.

    Raises:
        AccountingError: rows are missing, or a part is of another run; no ``_SUCCESS`` is written.
        LeaseLostError: the run is another driver's by now.
    """
    totals = _all_parts(job.run, parts)
    result = Result(
        status=judge(job.run.plan.rows, totals, job.config.limits.max_error_rate),
        run=job.run.uri,
        rows_total=job.run.plan.rows,
        totals=totals,
        seconds=job.seconds,
        generated_rows=parts.generated_rows,
        deadline_passed=deadline_passed,
    )
    if lease is not None:
        if job.found.is_jsonl:
            log.info("writing %s of %d parts", " and ".join(OPENAI_FILES), totals.parts)
            try:
                write_openai_output(job.to, totals.parts, confirming(lease))
            except signals.Interrupted as error:
                return _broken(job, lease, RunStatus.INTERRUPTED, str(error), parts)
        lease.confirm()
        write_report(result, job.run.manifest, _money(job, result))
        clear_journals(job.run.uri, lease.confirm)
        lease.confirm()
        job.run.mark_success()
    return result


def _broken(job: Job, lease: Lease, status: RunStatus, error: str, parts: _Parts) -> Result:
    """The result of a run that stopped half-way, with what the output folder holds by now.

    Raises:
        LeaseLostError: the run is another driver's by now, and so is its report.
    """
    budget = Budget.of(end_budget().left(_REPORT_S, keep=_LATER_S))
    parts.wait(budget.left() / 2)
    result = Result(
        status=status,
        run=job.run.uri,
        rows_total=job.run.plan.rows,
        totals=parts.sums.totals(),
        seconds=job.seconds,
        generated_rows=parts.generated_rows,
        error=error,
    )
    try:
        with storage.patience_in_all(budget.left()):
            result = _with_all_parts(job, result, parts)
            lease.confirm()
            write_report(result, job.run.manifest, _money(job, result))
    except LeaseLostError:
        log.error("the run had stopped: %s", error)  # nobody else tells
        raise
    except StorageError as failure:  # perhaps what stopped the run; that is what is told
        log.warning("no report could be written: %s", failure)
    return result


def _money(job: Job, result: Result) -> Mapping[str, Any]:
    """What the GPUs cost, all starts together, and what the same tokens would elsewhere."""
    tokens = result.totals.tokens
    usage = Usage(
        prompt_tokens=tokens["prompt"],
        image_tokens=tokens["image"],
        completion_tokens=tokens["completion"],
        images=result.totals.images,
        seconds=max(result.seconds, result.totals.history.active_s()),
    )
    return money(job.prices, job.profile, job.config.engine.most_replicas, usage)


def _with_all_parts(job: Job, result: Result, parts: _Parts) -> Result:
    """The result with parts whose stats did not reach this driver, as far as they can be read."""
    committed = committed_shards(job.run.uri, job.run.plan)
    unknown = {shard for shard in committed - job.run.done if shard not in parts.sums}
    for stats in read_stats(job.run.uri, sorted(unknown)):
        parts.add(stats)
    totals = parts.sums.totals()
    unread = len(committed) - totals.parts
    return replace(
        result,
        totals=totals,
        generated_rows=parts.generated_rows,
        details={"parts_not_counted": unread} if unread else {},
    )


class _Parts:
    """Sums of the run's parts: of this start's as they are committed, of earlier ones as a thread
    reads their footers while the run goes on."""

    def __init__(self, run: Run) -> None:
        self.sums = Sums()
        """Of all parts known so far."""
        self.generated_rows = 0
        """Rows that this start made: neither expired nor taken over from earlier journals."""
        self._outdated: list[int] = []
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._reading: Future[Totals | None] = self._pool.submit(self._read, run)

    def add(self, stats: PartStats) -> None:
        """Count a part of this start; a shard that a lost node made twice counts once."""
        if self.sums.add(stats):
            self.generated_rows += stats.generated_rows

    def earlier(self) -> Totals | None:
        """The sums of the parts before this start; None until all are read, or if one cannot be."""
        found = self._reading
        is_known = found.done() and not found.cancelled() and found.exception() is None
        return found.result() if is_known else None

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the earlier parts are read; after ``timeout_s`` the rest is given up.

        Raises:
            StorageError: one of them cannot be read, and there is no ``timeout_s``.
        """
        try:
            self._reading.result(timeout_s)
        except (NotReadyError, StorageError):
            if timeout_s is None:
                raise
        finally:
            self.stop()

    def outdated(self) -> int | None:
        """A shard whose earlier part is not this run's, or has records that were retried since."""
        return next(iter(self._outdated), None)

    def stop(self) -> None:
        """Read no more of the earlier parts, but for the few that are being read."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, run: Run) -> Totals | None:
        """The sums of all earlier parts; None if it was stopped before it had read them."""
        earlier = Sums()
        for stats in read_stats(run.uri, sorted(run.done)):
            if self._stopped.is_set():
                return None
            if not counts(run.to, stats):
                self._outdated.append(stats.shard)
            earlier.add(stats)
            self.sums.add(stats)
        return earlier.totals()


def _interruption() -> tuple[str, float] | None:
    """The signal that was noted, and by when it wants an end."""
    heard = signals.heard()
    return None if heard is None else (heard.name, signals.end_by())


def _all_parts(run: Run, parts: _Parts) -> Totals:
    """The totals of the whole run.

    Raises:
        AccountingError: a shard has no part, or one of another run or from before a retry.
    """
    parts.wait()
    totals = parts.sums.totals()
    if totals.parts != len(run.plan.shards):
        raise AccountingError(f"{len(run.plan.shards) - totals.parts} shards have no part")
    if (shard := parts.sums.foreign(run.id)) is not None:
        uri = part_uri(run.uri, shard)
        raise AccountingError(f"{uri} is of another run; delete it and run the command again")
    if (shard := parts.outdated()) is not None:
        uri = part_uri(run.uri, shard)
        raise AccountingError(
            f"{uri} has records that were to be done again, by an attempt from before --retry; "
            "delete it and run the command again"
        )
    return totals


def _commit_empty(job: Job) -> PartStats:
    """An input without rows: one empty part, so that the output opens like any other."""
    (shard,) = job.run.plan.shards
    return commit_outcomes(job.to, shard, [], job.found.columns.carried.empty_table())


def _summarize(result: Result) -> None:
    rows = ", ".join(f"{count} {status}" for status, count in result.totals.rows.items() if count)
    log.info(
        "%s: %d rows (%s), %d completion tokens, %.1f s; report: %s",
        result.status,
        result.rows_total,
        rows or "none",
        result.totals.tokens["completion"],
        result.seconds,
        storage.join(result.run or "", "report.html"),
    )
