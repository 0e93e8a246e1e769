"""A look before a run: what an input holds, how long it will take, and what it will cost.

``python -m jobs.plan --config FILE [--set key.path=value ...] [--sample N|SHARE] ...``

Takes the config of ``jobs.nightly``. Reads, validates and tokenizes rows as the run will, on CPUs
(the cluster in ``RAY_ADDRESS``, else this machine), with neither engine nor GPU; the output folder
is looked at and not touched.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from jobs import signals
from jobs.cli import job_parser, name_run, run_job
from jobs.forecast import Forecast, make_forecast
from jobs.forecast_table import show
from jobs.settle import (
    Job,
    Options,
    describe,
    flow_spec,
    lacking,
    local_cpus,
    settle,
    waiting,
)
from pipeline import storage
from pipeline.config import load_config
from pipeline.count import ShardCounts
from pipeline.engine import VLLMEngine
from pipeline.errors import ConfigError, StorageError
from pipeline.lengths import Caps, FromRun, Given, OutputModel
from pipeline.previous import find_previous, learn_lengths, open_previous
from pipeline.redact import redacted
from pipeline.report import Result, RunStatus, total
from pipeline.survey import Pick, Survey, pick_all, pick_evenly

log = logging.getLogger(__name__)

_LINE_INTERVAL_S = 10.0
_PROBE_S = 5.0
"""What a store gets to take the probe of ``--out``."""

Looked = tuple[list[str], Iterator[ShardCounts]]
"""What the cluster lacks for the replicas, and the counts as they come."""
Look = Callable[[Job, Sequence[Pick]], AbstractContextManager[Looked]]

_EPILOG = """\
Every row is validated and its prompt counted, so images are fetched as the run would fetch them;
--sample looks at a part of the rows, spread evenly, and tells 95 % ranges for the whole.

How long completions will be is taken, in this order, from --previous or --expected-tokens, from the
newest finished run of the same model in or beside output.uri, or from the caps (an upper bound).
There is no engine here to try: for a sample of lengths, run jobs.nightly on a few hundred of the
rows into a folder beside output.uri first.

Prices are those of cluster/prices.yaml, or of the config's prices.file and prices.gpu_hour.

exit codes: 0 done, 1 failed, 2 bad config or input, 3 more bad rows than limits.max_error_rate,
            75 interrupted

examples:
  python -m jobs.plan --config nightly.yaml
  python -m jobs.plan --config nightly.yaml --sample 0.01 --set engine.profile=maverick-fp8-8xh100
  python -m jobs.plan --config nightly.yaml --previous s3://batch/runs/yesterday --out plan.json
"""


def plan_parser(module: str) -> argparse.ArgumentParser:
    """The job's command line."""
    parser = job_parser(module, "Count rows and tokens, and tell time and price.", _EPILOG)
    parser.add_argument(
        "--sample",
        metavar="N|SHARE",
        help="look at about N rows (2000), or at a share of them (0.01), the same ones every time",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--previous", metavar="URI", help="the finished run to take completion lengths from"
    )
    source.add_argument(
        "--expected-tokens",
        metavar="X",
        help="completion tokens of a sample, on average; its cap if that is less",
    )
    parser.add_argument(
        "--new-run",
        action="store_true",
        help="as if the run in output.uri were to be discarded; nothing is",
    )
    parser.add_argument("--out", metavar="FILE", help="also write the plan there, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and make the plan; returns the exit code."""
    remedy = "a plan keeps nothing, the same command starts anew"
    return run_job(partial(plan, look=look_on_ray), plan_parser("jobs.plan"), argv, remedy=remedy)


def plan(arguments: argparse.Namespace, *, look: Look) -> Result:
    """Make the plan that the command line asks for.

    Args:
        arguments: as ``plan_parser`` gives them.
        look: counts the picked shards.

    Raises:
        UsageError: config, input, previous run or a cluster's address do not fit.
        StorageError: an input file cannot be read, or ``--out`` not be written.
    """
    rows_of = _parse_sample(arguments.sample)
    given = _parse_tokens(arguments.expected_tokens)
    config = load_config(arguments.config, arguments.overrides)
    options = Options(new_run=arguments.new_run, dry_run=arguments.dry_run)
    job = settle(config, options, VLLMEngine)
    name_run(job.run.uri)
    if arguments.dry_run:
        return describe(job)
    if arguments.out:
        _check_out(arguments.out)
    output = given or _lengths(job, arguments.previous)
    forecast = _survey(job, rows_of(job.run.plan.rows), output, look)
    show(forecast)
    if arguments.out:
        text = json.dumps(redacted(forecast.to_json()), indent=2) + "\n"
        storage.put_bytes(storage.absolute(arguments.out), text.encode())
        log.info("written: %s", arguments.out)
    return _result(job, forecast)


def _check_out(uri: str) -> None:
    """Before the survey, which may take hours, rather than after it."""
    storage.check_reachable(uri)
    try:
        with storage.patience(_PROBE_S):
            storage.check_writable(storage.absolute(uri))
    except StorageError as error:
        raise ConfigError(f"--out {uri}: {error}.") from None


def _parse_sample(text: str | None) -> Callable[[int], int | None]:
    """Rows to look at of so many; None: of any number all."""
    if text is None:
        return lambda _: None
    try:
        if text.isascii() and text.isdecimal() and int(text) >= 1:
            return lambda _: int(text)
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(
            f"--sample {text}: must be a number of rows from 1, or a share between 0 and 1."
        )
    return lambda rows: max(1, round(rows * share))


def _parse_tokens(text: str | None) -> Given | None:
    if text is None:
        return None
    try:
        tokens = float(text)
    except ValueError:
        tokens = -1.0
    if not 0 <= tokens < float("inf"):
        raise ConfigError(f"--expected-tokens {text}: must be a number from 0.")
    return Given(tokens)


def _lengths(job: Job, previous: str | None) -> OutputModel:
    """From the run that was named, or the newest that is found, or from the caps."""
    model = job.run.manifest["model"]["name"]
    if previous is not None:
        run = open_previous(previous)
        learnt = learn_lengths(run)
        if learnt is None:
            raise ConfigError(f"--previous {previous}: has no completion to learn from.")
        if run.model != model:
            log.warning("%s is a run of %s, not of %s", run.uri, run.model, model)
        return learnt
    return _found_lengths(job, model) or Caps()


def _found_lengths(job: Job, model: str) -> FromRun | None:
    """Of the newest finished run beside the output; a damaged one is no reason to fail."""
    run = find_previous(job.run.uri, model)
    if run is None:
        return None
    try:
        return learn_lengths(run)
    except ConfigError as error:
        log.warning("%s", error)
        return None


def _survey(job: Job, rows: int | None, output: OutputModel, look: Look) -> Forecast:
    shards = job.run.plan.shards
    picks = pick_all(shards) if rows is None else pick_evenly(shards, rows)
    survey = Survey(picks, job.run.plan.rows, output)
    lacks: list[str] | None = None
    if picks:
        told = _Told(picks)
        with look(job, picks) as (lacks, counted):
            for counts in counted:
                survey.add(counts)
                told.add(counts)
    return make_forecast(job, survey, output, picks, lacks)


@contextmanager
def look_on_ray(job: Job, picks: Sequence[Pick]) -> Iterator[Looked]:
    """Within, the cluster in ``RAY_ADDRESS``, else a Ray in this process, counts.

    Raises:
        UsageError, PipelineError: as ``flow.cluster`` and ``flow.count_shards``.
    """
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = (
        "0"  # what is left of a stopped flow starts no other Ray
    )
    from pipeline.flow import cluster, cluster_grows, cluster_nodes, count_shards  # ray: 1-2 s

    with cluster(local_cpus=local_cpus()):
        signals.insist()
        lacks = lacking(job.config, job.profile, cluster_nodes())
        if cluster_grows():
            lacks = waiting(lacks)
        yield lacks, count_shards(flow_spec(job), picks)


class _Told:
    """A plain line of progress every 10 s."""

    def __init__(self, picks: Sequence[Pick]) -> None:
        self._total = sum(pick.rows for pick in picks)
        self._rows = self._bad = 0
        self._started = self._last = time.monotonic()

    def add(self, counts: ShardCounts) -> None:
        """Take in one shard's counts."""
        self._rows += counts.rows
        self._bad += counts.bad
        now = time.monotonic()
        if now - self._last >= _LINE_INTERVAL_S:
            self._last = now
            left = (self._total - self._rows) * (now - self._started) / self._rows
            log.info("rows %d/%d  bad %d  ETA %.0f s", self._rows, self._total, self._bad, left)


def _result(job: Job, forecast: Forecast) -> Result:
    over = forecast.error_rate > job.config.limits.max_error_rate
    return Result(
        status=RunStatus.OVER_ERROR_RATE if over else RunStatus.PLAN,
        run=job.run.uri,
        rows_total=job.run.plan.rows,
        totals=total([]),
        seconds=job.seconds,
        error=forecast.verdict if over else None,
        details={"plan": forecast.to_json()},
    )


if __name__ == "__main__":
    sys.exit(main())
