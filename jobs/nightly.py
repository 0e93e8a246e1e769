"""The main job: Parquet prompts and images in, completions in object storage out.

``python -m jobs.nightly --config FILE [--set key.path=value ...] [--dry-run]``

Uses the Ray cluster in ``RAY_ADDRESS``, else starts Ray in this process. The same command twice is
safe: it resumes what is left, or finds the run finished and generates nothing.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.cli import Interrupted, job_parser, raise_interrupted, run_job
from pipeline import storage
from pipeline.capacity import NodeCapacity, missing, this_machine
from pipeline.commit import PartStats, commit_part, committed_shards, read_stats, summarize
from pipeline.config import JobConfig, load_config
from pipeline.engine import Engine, EngineSpec, VLLMEngine
from pipeline.errors import AccountingError, CapacityError, ConfigError, PipelineError
from pipeline.fetch import ImageFetcher, input_root
from pipeline.model import ModelSpec
from pipeline.prepare import PrepareSpec
from pipeline.profile import EngineProfile, load_profile
from pipeline.progress import ProgressDisplay
from pipeline.read import Input, open_input
from pipeline.records import part_table
from pipeline.report import Result, RunStatus, judge, total, write_report
from pipeline.run import Run, open_run

if TYPE_CHECKING:
    from pipeline.flow import FlowSpec

log = logging.getLogger(__name__)

_WINDOW_PER_SEQUENCE = 1.25
"""Requests kept in the engine per sequence it runs: a few wait, so that no slot is ever empty."""
_PREPARE_CPUS = 1
"""CPUs that must be free beside the replicas, or no row would ever be prepared."""

_EPILOG = """\
exit codes: 0 done, 1 failed, 2 bad config or input, 3 above limits.max_error_rate,
            75 interrupted (run the same command again to resume)

examples:
  python -m jobs.nightly --config jobs/configs/sample.yaml --dry-run
  python -m jobs.nightly --config nightly.yaml --set output.uri=s3://batch/runs/today
  ray job submit --working-dir . -- python -m jobs.nightly --config nightly.yaml
"""


@dataclass(frozen=True)
class Job:
    """Everything the job settled before starting anything."""

    config: JobConfig
    profile: EngineProfile
    found: Input
    run: Run
    root: str
    """The input's folder: relative image URIs start there."""
    start_engine: Callable[[EngineSpec], Engine]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job; returns the exit code."""
    parser = job_parser("jobs.nightly", "Run a batch of prompts through the model.", _EPILOG)
    return run_job(nightly, parser, argv)


def nightly(
    arguments: argparse.Namespace, *, start_engine: Callable[[EngineSpec], Engine] = VLLMEngine
) -> Result:
    """Settle the job, then run, resume, or only describe it.

    Args:
        arguments: as ``job_parser`` gives them.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError: config, input, output folder or cluster do not fit; nothing was started.
        PipelineError: the run failed; what is committed stays and the same command resumes.
    """
    started = time.monotonic()
    job = settle(load_config(arguments.config, arguments.overrides), start_engine)
    if arguments.dry_run:
        return _dry_run(job, started)
    if job.run.complete:
        log.info("%s is finished; nothing to generate", job.run.uri)
    result = _execute(job, started)
    _summarize(result)
    return result


def settle(config: JobConfig, start_engine: Callable[[EngineSpec], Engine]) -> Job:
    """Check everything that can be checked without an engine, a cluster or a write."""
    profile = load_profile(config.engine.profile, overrides=config.engine.overrides)
    found = open_input(config.input.uri, renamed=config.input.columns, carry=config.output.carry)
    root = input_root(config.input.uri, found.files[0].uri)
    _check_apart(config, root)
    return Job(config, profile, found, open_run(config, profile, found), root, start_engine)


def _check_apart(config: JobConfig, source: str) -> None:
    """An output inside the input's folder would be read as input by the next run."""
    target = storage.absolute(config.output.uri).rstrip("/")
    if f"{target}/".startswith(f"{source}/") and "/_" not in target.removeprefix(source):
        raise ConfigError(
            f"output.uri {config.output.uri} lies inside input.uri {config.input.uri}: the next "
            "run would read it as input; put it beside, or below a folder that starts with _."
        )


def _dry_run(job: Job, started: float) -> Result:
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
    return Result(
        status=RunStatus.DRY_RUN,
        run=run.uri,
        rows_total=run.plan.rows,
        totals=total([]),
        seconds=time.monotonic() - started,
        details={"pending_rows": rows_left, "pending_shards": len(run.pending)},
    )


def _execute(job: Job, started: float) -> Result:
    """Run what is pending. Nothing is written before the cluster is known to hold the replicas."""
    if not job.run.pending:
        return _finish(job, [], started)
    if job.run.plan.rows == 0:
        job.run.start()
        return _finish(job, [_commit_empty(job)], started)
    here = _local_node()
    if here is not None:
        _check_capacity(job, [here])  # before a Ray is started for it
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # ranks log alike; read when ray is imported
    from pipeline.flow import cluster, cluster_nodes  # imports ray: 1-2 s that --help does without

    with cluster(local_cpus=_local_cpus()):
        signal.signal(signal.SIGTERM, raise_interrupted)  # ray.init replaced it
        _check_capacity(job, cluster_nodes())
        job.run.start()
        return _generate(job, started)


def _generate(job: Job, started: float) -> Result:
    """Run the flow to its end; a failure or a signal on the way still leaves a report."""
    from pipeline.flow import run_shards

    run = job.run
    log.info("running %d of %d shards into %s", len(run.pending), len(run.plan.shards), run.uri)
    rows_done = run.plan.rows - sum(shard.rows for shard in run.pending)
    generated: list[PartStats] = []
    try:
        with ProgressDisplay(total=run.plan.rows, done=rows_done) as display:
            # extend() takes them one by one: after a failure, those before it are in the list
            generated.extend(run_shards(_flow_spec(job), run.pending, display.update))
        return _finish(job, generated, started)
    except (PipelineError, Interrupted) as error:
        status = RunStatus.INTERRUPTED if isinstance(error, Interrupted) else RunStatus.FAILED
        return _broken(job, status, str(error), started)


def _finish(job: Job, generated: Sequence[PartStats], started: float) -> Result:
    """Account for every row, write the reports and, last, ``_SUCCESS``.

    Raises:
        AccountingError: rows are missing; no ``_SUCCESS`` is written.
    """
    parts = _all_parts(job.run, generated)
    if len(parts) != len(job.run.plan.shards):
        raise AccountingError(f"{len(job.run.plan.shards) - len(parts)} shards have no part")
    totals = total(parts)
    result = Result(
        status=judge(job.run.plan.rows, totals, job.config.limits.max_error_rate),
        run=job.run.uri,
        rows_total=job.run.plan.rows,
        totals=totals,
        seconds=time.monotonic() - started,
        generated_rows=_rows_of(generated),
    )
    if not job.run.complete:
        write_report(result, job.run.manifest, parts)
        job.run.mark_success()
    return result


def _broken(job: Job, status: RunStatus, error: str, started: float) -> Result:
    """The result of a run that stopped half-way, with what the output folder holds by now."""
    committed = committed_shards(job.run.uri, job.run.plan)
    parts = read_stats(job.run.uri, sorted(committed))
    result = Result(
        status=status,
        run=job.run.uri,
        rows_total=job.run.plan.rows,
        totals=total(parts),
        seconds=time.monotonic() - started,
        generated_rows=_rows_of(part for part in parts if part.shard not in job.run.done),
        error=error,
    )
    write_report(result, job.run.manifest, parts)
    return result


def _all_parts(run: Run, generated: Sequence[PartStats]) -> list[PartStats]:
    """One per shard; a shard that a lost node made twice counts once."""
    latest = {stats.shard: stats for stats in generated}
    return [*read_stats(run.uri, sorted(run.done - set(latest))), *latest.values()]


def _rows_of(parts: Iterable[PartStats]) -> int:
    return sum(sum(part.rows.values()) for part in parts)


def _commit_empty(job: Job) -> PartStats:
    """An input without rows: one empty part, so that the output opens like any other."""
    (shard,) = job.run.plan.shards
    stats = summarize(shard.index, [], 0.0)
    table = part_table(
        shard, [], job.found.columns.carried.empty_table(), model=job.run.manifest["model"]["name"]
    )
    commit_part(job.run.uri, table, shard, stats)
    return stats


def _flow_spec(job: Job) -> FlowSpec:
    from pipeline.flow import FlowSpec

    config, profile = job.config, job.profile
    limits = config.limits
    prepare = PrepareSpec(
        model=ModelSpec.from_engine_args(profile.model, profile.revision, profile.engine_args),
        columns=job.found.columns,
        sampling=config.sampling,
        run_seed=config.seed,
        max_image_pixels=limits.max_image_pixels,
        fetcher=ImageFetcher(job.root, limits.max_image_bytes, limits.image_fetch_concurrency),
    )
    sequences = profile.engine_args["max_num_seqs"] * profile.data_parallel_size
    return FlowSpec(
        output_uri=job.run.uri,
        model_name=job.run.manifest["model"]["name"],
        columns=job.found.columns,
        prepare=prepare,
        engine=EngineSpec(profile.model, profile.revision, profile.engine_args, profile.env),
        window=math.ceil(_WINDOW_PER_SEQUENCE * sequences),
        replicas=config.engine.replicas,
        needs=profile.needs,
        start_engine=job.start_engine,
    )


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
