"""The main job: prompts and images in (Parquet or OpenAI batch JSONL), completions out.

``python -m jobs.nightly --config FILE [--set key.path=value ...] [--dry-run] [--retry WORDS] ...``

Uses the Ray cluster in ``RAY_ADDRESS``, else starts Ray in this process. The same command twice is
safe: it resumes what is left, or finds the run finished and generates nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotReadyError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jobs.cli import (
    Interrupted,
    first_signal,
    job_parser,
    name_run,
    raise_interrupted,
    run_job,
)
from pipeline import storage
from pipeline.capacity import NodeCapacity, missing, this_machine
from pipeline.commit import (
    Destination,
    PartStats,
    commit_outcomes,
    committed_shards,
    part_uri,
    read_stats,
)
from pipeline.config import JobConfig, load_config
from pipeline.deadline import resolve_deadline
from pipeline.engine import Engine, EngineSpec, VLLMEngine
from pipeline.errors import (
    AccountingError,
    CapacityError,
    ConfigError,
    InputError,
    LeaseLostError,
    PipelineError,
    StorageError,
)
from pipeline.fetch import ImageFetcher
from pipeline.journal import clear_journals
from pipeline.lease import Lease, check_not_driven
from pipeline.model import ImageFormat, ModelSpec, accepted_names, load_prompt_format
from pipeline.openai_output import OPENAI_FILES, write_openai_output
from pipeline.prepare import PrepareSpec
from pipeline.profile import EngineProfile, load_profile, locate_model
from pipeline.progress import ProgressDisplay
from pipeline.read import Input, open_input
from pipeline.reopen import parse_retry, reopen
from pipeline.replica import ReplicaLimits
from pipeline.report import Result, RunStatus, judge, total, write_report
from pipeline.run import Run, check_not_emptied, open_run, planned_files
from pipeline.watch import Reason, Watch
from pipeline.web import WebReader

if TYPE_CHECKING:
    from pipeline.flow import FlowSpec

log = logging.getLogger(__name__)

_PREPARE_CPUS = 1
"""CPUs that must be free beside the replicas, or no row would ever be prepared."""
_TOTALS_S = 3.0
"""What the totals of an interrupted run may take: it has to be gone by ``limits.drain_s``."""

_EPILOG = """\
exit codes: 0 done, 1 failed, 2 bad config or input, 3 above limits.max_error_rate,
            75 interrupted (run the same command again to resume) or past limits.deadline

examples:
  python -m jobs.nightly --config jobs/configs/sample.yaml --dry-run
  python -m jobs.nightly --config nightly.yaml --set output.uri=s3://batch/runs/today
  python -m jobs.nightly --config nightly.yaml --retry expired,timeout
  ray job submit --working-dir . -- python -m jobs.nightly --config nightly.yaml
"""


@dataclass(frozen=True)
class Job:
    """Everything the job settled before starting anything."""

    config: JobConfig
    profile: EngineProfile
    found: Input
    run: Run
    start_engine: Callable[[EngineSpec], Engine]
    started: float
    """By the monotonic clock."""
    deadline: datetime | None
    retry: Collection[str]
    """Statuses and error codes of records to do again."""
    open_run: Callable[[], Run]
    """Looks at the output folder anew."""
    wait: bool

    @property
    def to(self) -> Destination:
        """Where the records go."""
        return Destination(self.run.uri, self.run.id, self.run.manifest["model"]["name"])

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started


def nightly_parser(module: str) -> argparse.ArgumentParser:
    """The job's command line."""
    parser = job_parser(module, "Run a batch of prompts through the model.", _EPILOG)
    parser.add_argument(
        "--retry",
        metavar="WORDS",
        help="do these records again, finished run or not: expired, errored or error codes, e.g. "
        "expired,timeout; all others stay",
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait for another driver of the run, not fail"
    )
    parser.add_argument(
        "--new-run",
        action="store_true",
        help="discard the run that output.uri holds, and start over there",
    )
    parser.add_argument(
        "--accept-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although KEY (seed, sampling or model) changed; rows done stay (repeatable)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job; returns the exit code."""
    return run_job(nightly, nightly_parser("jobs.nightly"), argv)


def nightly(
    arguments: argparse.Namespace, *, start_engine: Callable[[EngineSpec], Engine] = VLLMEngine
) -> Result:
    """Settle the job, then run, resume, or only describe it.

    Args:
        arguments: as ``nightly_parser`` gives them.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError: config, input, output folder or cluster do not fit; nothing was started.
        PipelineError: the run failed; what is committed stays and the same command resumes.
    """
    job = settle(arguments, start_engine)
    name_run(job.run.uri)
    if arguments.dry_run:
        return _dry_run(job)
    if job.run.complete and not job.retry:
        log.info("%s is finished; nothing to generate", job.run.uri)
        if job.run.accepted:
            log.warning(
                "--accept-changed changes nothing: nothing is left to make with it, and it is not "
                "written down; give it together with --retry"
            )
        result = _finish(job, [])
    else:
        result = _execute(job)
    _summarize(result)
    return result


def settle(arguments: argparse.Namespace, start_engine: Callable[[EngineSpec], Engine]) -> Job:
    """Check everything that can be checked without an engine, a cluster or a write."""
    started = time.monotonic()
    config = load_config(arguments.config, arguments.overrides)
    retry = parse_retry(arguments.retry) if arguments.retry is not None else frozenset()
    if retry and arguments.new_run:
        raise ConfigError("give --retry or --new-run, not both.")
    profile = load_profile(config.engine.profile, overrides=config.engine.overrides)
    found = _find_input(config, new_run=arguments.new_run)
    for root in found.roots:
        _check_apart(config, root)
    deadline = config.limits.deadline

    def look() -> Run:
        return open_run(
            config,
            profile,
            found,
            new_run=arguments.new_run,
            accept_changed=arguments.accept_changed,
        )

    return Job(
        config=config,
        profile=profile,
        found=found,
        run=look(),
        start_engine=start_engine,
        started=started,
        deadline=resolve_deadline(deadline, started=datetime.now(UTC)) if deadline else None,
        retry=retry,
        open_run=look,
        wait=arguments.wait,
    )


def _find_input(config: JobConfig, *, new_run: bool) -> Input:
    try:
        return open_input(
            config.input.uri,
            renamed=config.input.columns,
            carry=config.output.carry,
            planned=() if new_run else planned_files(config.output.uri),
        )
    except InputError:
        if not new_run:
            check_not_emptied(config)
        raise


def _check_apart(config: JobConfig, source: str) -> None:
    """An output inside the input's folder would be read as input by the next run."""
    target = storage.absolute(config.output.uri).rstrip("/")
    if f"{target}/".startswith(f"{source}/") and "/_" not in target.removeprefix(source):
        raise ConfigError(
            f"output.uri {config.output.uri} lies inside input.uri {config.input.uri}: the next "
            "run would read it as input; put it beside, or below a folder that starts with _."
        )


def _dry_run(job: Job) -> Result:
    """What would run, and whether the cluster can hold it."""
    _check_capacity(job, _nodes())
    run = job.run
    rows_left = sum(shard.rows for shard in run.pending)
    log.info(
        "would run %d of %d rows in %d shards on %d x %s (%s) into %s",
        rows_left,
        run.plan.rows,
        len(run.pending),
        job.config.engine.replicas,
        job.config.engine.profile,
        run.manifest["model"]["name"],
        run.uri,
    )
    details = {"pending_rows": rows_left, "pending_shards": len(run.pending)}
    images = _image_format(job.profile)
    if images is not None:
        details["image_tokens_max"] = images.tiling.most_tokens
        log.info(
            "an image takes at most %d prompt tokens (%d tiles; "
            "engine.overrides.mm_processor_kwargs.max_patches lowers that)",
            images.tiling.most_tokens,
            images.tiling.max_tiles,
        )
    return Result(
        status=RunStatus.DRY_RUN,
        run=run.uri,
        rows_total=run.plan.rows,
        totals=total([]),
        seconds=job.seconds,
        details=details,
    )


def _image_format(profile: EngineProfile) -> ImageFormat | None:
    """How images stand in the model's prompts; None: a text model, or not to be had here."""
    try:
        return load_prompt_format(_model_spec(profile)).images
    except (ConfigError, OSError, ValueError) as error:  # the nodes may have what the driver lacks
        log.info("what an image costs is not known here: %s", error)
        return None


def _model_spec(profile: EngineProfile) -> ModelSpec:
    return ModelSpec.from_engine_args(profile.model, profile.revision, profile.engine_args)


def _execute(job: Job) -> Result:
    """Run what is pending. Nothing is written before the cluster is known to hold the replicas."""
    if job.run.plan.rows == 0 or not (job.run.pending or job.retry):
        with _owned(job) as (owned, lease):
            return _finish(owned, [_commit_empty(owned)] if owned.run.pending else [], lease)
    here = _local_node()
    if here is not None:
        _check_capacity(job, [here])  # before a Ray is started for it
    if not job.wait:
        check_not_driven(job.run.uri)
    # Read when ray is imported. Ranks log alike; and what is left of a stopped flow must not start
    # another Ray.
    os.environ.update(RAY_DEDUP_LOGS="0", RAY_ENABLE_AUTO_CONNECT="0")
    from pipeline.flow import cluster, cluster_nodes  # imports ray: 1-2 s that --help does without

    with cluster(local_cpus=_local_cpus()):
        signal.signal(signal.SIGTERM, raise_interrupted)  # ray.init replaced it
        _check_capacity(job, cluster_nodes())
        with _owned(job) as (owned, lease):
            return _generate(owned, lease)


@contextmanager
def _owned(job: Job) -> Iterator[tuple[Job, Lease]]:
    """The run is this driver's, looked at anew, started, and with the asked rows open again.

    Raises:
        RunBusyError: another driver is at it.
    """
    with Lease.acquire(job.run.uri, wait=job.wait) as lease:
        run = job.open_run()  # another driver may have gone on with it meanwhile
        job = replace(job, run=run)
        if job.retry or not run.complete:
            run.start(lease.confirm)
        if job.retry:
            count = reopen(job.to, run.plan, run.done, job.retry, lease.confirm)
            log.info("%d records are to be done again", count)
            left = frozenset(committed_shards(run.uri, run.plan))
            job = replace(job, run=replace(run, done=left, finished=False))
        yield job, lease


def _generate(job: Job, lease: Lease) -> Result:
    """Run the flow to its end; a failure or a signal on the way still leaves a report."""
    from pipeline.flow import run_shards

    run, limits = job.run, job.config.limits
    log.info("running %d of %d shards into %s", len(run.pending), len(run.plan.shards), run.uri)
    rows_done = run.plan.rows - sum(shard.rows for shard in run.pending)
    generated: list[PartStats] = []
    earlier = _Earlier(run)
    with ProgressDisplay(total=run.plan.rows, done=rows_done) as display:
        watch = Watch(
            max_error_rate=limits.max_error_rate,
            min_rows=limits.error_rate_min_rows,
            deadline=job.deadline,
            lease_lost=lambda: lease.lost,
            show=lambda seen: display.update(
                seen.tally, seen.engine_restarts + seen.replica_restarts
            ),
        )
        try:
            if run.pending and not watch.is_late():
                with first_signal(watch.interrupt):
                    # extend() takes them one by one: after a failure, those before it are there
                    generated.extend(run_shards(_flow_spec(job), run.pending, watch))
        except (PipelineError, Interrupted) as error:
            status = RunStatus.INTERRUPTED if isinstance(error, Interrupted) else RunStatus.FAILED
            return _broken(job, status, str(error), generated, earlier)
    return _conclude(job, lease, watch, generated, earlier)


def _conclude(
    job: Job, lease: Lease, watch: Watch, generated: list[PartStats], earlier: _Earlier
) -> Result:
    """What comes after the flow: the end, or what the reason to stop asks for."""
    match watch.stop and watch.stop.reason:
        case None:
            return _finish(job, generated, lease, earlier)
        case Reason.LEASE_LOST:
            assert watch.stop is not None
            raise LeaseLostError(watch.stop.message)
        case Reason.DEADLINE:
            return _expire(job, lease, generated, earlier)
        case reason:
            assert watch.stop is not None
            over = reason is Reason.ERROR_RATE
            status = RunStatus.OVER_ERROR_RATE if over else RunStatus.INTERRUPTED
            return _broken(job, status, watch.stop.message, generated, earlier)


def _expire(job: Job, lease: Lease, generated: list[PartStats], earlier: _Earlier) -> Result:
    """The deadline has passed: what is left becomes ``expired``, and the run ends as complete."""
    from pipeline.flow import expire_shards

    done = {stats.shard for stats in generated}
    left = [shard for shard in job.run.pending if shard.index not in done]
    log.info("the deadline has passed; %d open shards end as they are", len(left))
    lease.confirm()
    try:
        expired = list(expire_shards(_flow_spec(job), left)) if left else []
    except (PipelineError, Interrupted) as error:
        return _broken(job, RunStatus.INTERRUPTED, str(error), generated, earlier)
    return _finish(job, [*generated, *expired], lease, earlier, deadline_passed=True)


def _finish(
    job: Job,
    generated: Sequence[PartStats],
    lease: Lease | None = None,
    earlier: _Earlier | None = None,
    *,
    deadline_passed: bool = False,
) -> Result:
    """Account for every row, write the reports and, last, ``_SUCCESS``.

    Raises:
        AccountingError: rows are missing, or a part is of another run; no ``_SUCCESS`` is written.
        LeaseLostError: the run is another driver's by now.
    """
    parts = _all_parts(job.run, generated, earlier or _Earlier(job.run))
    totals = total(parts)
    result = Result(
        status=judge(job.run.plan.rows, totals, job.config.limits.max_error_rate),
        run=job.run.uri,
        rows_total=job.run.plan.rows,
        totals=totals,
        seconds=job.seconds,
        generated_rows=_rows_of(generated),
        deadline_passed=deadline_passed,
    )
    if lease is not None:
        if job.found.is_jsonl:
            log.info("writing %s of %d parts", " and ".join(OPENAI_FILES), len(parts))
            write_openai_output(job.to, len(parts), lease.confirm)
        lease.confirm()
        write_report(result, job.run.manifest)
        clear_journals(job.run.uri)
        job.run.mark_success()
    return result


def _broken(
    job: Job,
    status: RunStatus,
    error: str,
    generated: Sequence[PartStats],
    earlier: _Earlier,
) -> Result:
    """The result of a run that stopped half-way, with what the output folder holds by now."""
    known = {stats.shard: stats for stats in [*earlier.stats(_TOTALS_S), *generated]}
    result = Result(
        status=status,
        run=job.run.uri,
        rows_total=job.run.plan.rows,
        totals=total(known.values()),
        seconds=job.seconds,
        generated_rows=_rows_of(generated),
        error=error,
    )
    try:
        with storage.patience(_TOTALS_S):
            result = _with_all_parts(job, result, known)
            write_report(result, job.run.manifest)
    except StorageError as failure:  # perhaps what stopped the run; that is what is told
        log.warning("no report could be written: %s", failure)
    return result


def _with_all_parts(job: Job, result: Result, known: Mapping[int, PartStats]) -> Result:
    """The result with parts whose stats did not reach this driver, as far as they can be read."""
    committed = committed_shards(job.run.uri, job.run.plan)
    unknown = committed - set(known) - job.run.done
    late = read_stats(job.run.uri, sorted(unknown))
    parts = [*known.values(), *late]
    unread = len(committed) - len(parts)
    return replace(
        result,
        totals=total(parts),
        generated_rows=result.generated_rows + _rows_of(late),
        details={"parts_not_counted": unread} if unread else {},
    )


class _Earlier:
    """The stats of parts that were there before this start, read while the run goes on."""

    def __init__(self, run: Run) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._found: Future[list[PartStats]] = self._pool.submit(
            read_stats, run.uri, sorted(run.done)
        )

    def stats(self, timeout_s: float | None = None) -> list[PartStats]:
        """All of them; none if they are not there within ``timeout_s``."""
        try:
            return self._found.result(timeout_s)
        except NotReadyError:
            return []
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _all_parts(run: Run, generated: Sequence[PartStats], earlier: _Earlier) -> list[PartStats]:
    """One per shard; a shard that a lost node made twice counts once."""
    parts = {stats.shard: stats for stats in [*earlier.stats(), *generated]}
    if len(parts) != len(run.plan.shards):
        raise AccountingError(f"{len(run.plan.shards) - len(parts)} shards have no part")
    for stats in parts.values():
        if stats.run != run.id:
            uri = part_uri(run.uri, stats.shard)
            raise AccountingError(f"{uri} is of another run; delete it and run the command again")
    return list(parts.values())


def _rows_of(parts: Sequence[PartStats]) -> int:
    """Rows that were made: neither expired nor taken over from the journals of earlier attempts."""
    return sum(sum(part.rows.values()) - part.taken_over for part in parts)


def _commit_empty(job: Job) -> PartStats:
    """An input without rows: one empty part, so that the output opens like any other."""
    (shard,) = job.run.plan.shards
    return commit_outcomes(job.to, shard, [], job.found.columns.carried.empty_table())


def _flow_spec(job: Job) -> FlowSpec:
    from pipeline.actor import ReplicaSpec
    from pipeline.flow import FlowSpec

    config, profile = job.config, job.profile
    limits = config.limits
    prepare = PrepareSpec(
        model=_model_spec(profile),
        columns=job.found.columns,
        sampling=config.sampling,
        run_seed=config.seed,
        max_image_pixels=limits.max_image_pixels,
        **_max_images(profile),
        fetcher=_fetcher(job),
        model_names=accepted_names(locate_model(profile.model), profile.engine_args),
    )
    replica = ReplicaSpec(
        to=job.to,
        engine=EngineSpec(profile.model, profile.revision, profile.engine_args, profile.env),
        start_engine=job.start_engine,
        limits=ReplicaLimits(
            row_timeout_s=limits.row_timeout_s,
            stall_s=limits.stall_s,
            flush_s=limits.journal_s,
            flush_rows=limits.journal_rows,
        ),
    )
    return FlowSpec(
        replica=replica,
        prepare=prepare,
        columns=job.found.columns,
        files={file.uri: file for file in job.run.plan.files},
        duplicates=job.run.duplicates,
        replicas=config.engine.replicas,
        needs=profile.needs,
        stall_s=limits.stall_s,
        drain_s=limits.drain_s,
    )


def _fetcher(job: Job) -> ImageFetcher:
    allowed, limits = job.config.images, job.config.limits
    size, at_a_time = limits.max_image_bytes, limits.image_fetch_concurrency
    web = WebReader(tuple(allowed.domains), allowed.timeout_s, size, at_a_time)
    return ImageFetcher(job.found.roots[0], size, at_a_time, tuple(allowed.roots), web)


def _max_images(profile: EngineProfile) -> dict[str, int]:
    """The engine's own limit, where its profile sets one: a number, or vLLM's object of options."""
    limit = (profile.engine_args.get("limit_mm_per_prompt") or {}).get("image")
    count = limit.get("count") if isinstance(limit, Mapping) else limit
    return {} if count is None else {"max_images": int(count)}


def _local_cpus() -> int:
    """CPUs of a Ray started in this process: the machine's, and one more slot to prepare with, as
    a replica that takes all of them leaves them idle now and then."""
    return (os.cpu_count() or 1) + _PREPARE_CPUS


def _nodes() -> list[NodeCapacity]:
    """The nodes a run would have, with as little started as possible."""
    here = _local_node()
    if here is not None:
        return [here]
    from pipeline.flow import cluster, cluster_nodes

    with cluster(local_cpus=_local_cpus()):
        return cluster_nodes()


def _local_node() -> NodeCapacity | None:
    """The one node of a Ray in this process; None where only Ray can tell what there is."""
    return None if os.environ.get("RAY_ADDRESS") else this_machine(cpus=_local_cpus())


def _check_capacity(job: Job, nodes: Sequence[NodeCapacity]) -> None:
    lacking = missing(job.profile, job.config.engine.replicas, nodes)
    taken = job.config.engine.replicas * job.profile.needs.cpus_per_node * job.profile.needs.nodes
    if not lacking and sum(node.cpus for node in nodes) < taken + _PREPARE_CPUS:
        lacking = [f"{_PREPARE_CPUS} more CPU to prepare rows with, beside the replicas' {taken}"]
    if lacking:
        raise CapacityError(
            f"the cluster cannot hold {job.config.engine.replicas} x "
            f"{job.config.engine.profile}: {'; '.join(lacking)}."
        )


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


if __name__ == "__main__":
    sys.exit(main())
