"""The job: a run over the dataset, further runs over rows without a valid answer, the dataset.

In: an ``AnnotateConfig`` and the start's ``Options``. Out: a ``Result`` of the whole, tokens of all
attempts included. Each attempt is a batch run like any other (``jobs.batch``), with its resume,
journal and identity; what this module adds is in object storage as well, so the same command goes
on from wherever it was stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from jobs import signals
from jobs.annotate.answer import Answer, settle_answer
from jobs.annotate.attempts import (
    FIRST_RUN,
    Attempt,
    Feed,
    discard_feeds,
    load_attempt,
    mark_feed,
    read_feed,
    run_uri,
)
from jobs.annotate.config import AnnotateConfig
from jobs.annotate.dataset import (
    Assembly,
    Counts,
    assemble,
    check_only_ours,
    count_rows,
    discard_dataset,
    look,
    name_columns,
)
from jobs.annotate.feed import Dataset, relative_paths, write_feed
from jobs.annotate.preview import show_first_row
from jobs.annotate.runs import first_config, later_config
from jobs.annotate.votes import INVALID
from jobs.batch import acquired, confirming, run_batch
from jobs.cli import end_budget, name_run
from jobs.settle import Job, Options, check_place, describe, settle
from pipeline import storage
from pipeline.config import JobConfig
from pipeline.engine import Engine, VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import (
    ConfigError,
    ErrorCode,
    LeaseLostError,
    RunBusyError,
    RunMismatchError,
    StorageError,
)
from pipeline.lease import Lease, check_not_driven
from pipeline.plan import InputFile
from pipeline.records import Status
from pipeline.redact import redacted
from pipeline.report import Result, RunStatus, Totals, judge, write_report
from pipeline.template import compact_json

log = logging.getLogger(__name__)

_JOB = "annotate"
_REPORT_S = 3.0
"""What the report of a stopped start may take: it has to be gone by ``limits.drain_s``."""
StartEngine = Callable[[EngineSpec], Engine]


@dataclass(frozen=True)
class _Work:
    """What one start settled."""

    config: AnnotateConfig
    first: JobConfig
    """Of attempt 0."""
    answer: Answer
    dataset: Dataset
    uri: str
    options: Options
    start_engine: StartEngine
    started: float


@dataclass(frozen=True)
class _Done:
    """What the attempts came to, by attempt."""

    feeds: list[Feed]
    results: list[Result]
    attempts: list[Attempt]
    """Those that are whole: of a start that was stopped, not the last."""

    @property
    def is_whole(self) -> bool:
        """Whether every row of every attempt has its record."""
        return len(self.attempts) == len(self.results)


def annotate(
    config: AnnotateConfig,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    start_engine: StartEngine = VLLMEngine,
) -> Result:
    """Annotate a dataset, go on with one, or only say what would be done.

    Args:
        config: the job.
        options: of this start. ``retry`` is for rows that failed otherwise than by their answer.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError: config, input, output folder or cluster do not fit; nothing was started.
        PipelineError: an attempt, or the writing, failed; the same command goes on.
    """
    started = time.monotonic()
    answer = settle_answer(config.task.answer)
    _check_examples(config, answer)
    options = replace(options, retry=_retryable(options.retry))
    first = first_config(config, answer)
    storage.check_reachable(config.output.uri)
    uri = storage.absolute(config.output.uri).rstrip("/")
    name_run(uri)
    _check_folder(uri, new_run=options.new_run)
    job = settle(first, options, start_engine)
    check_place(config, job.found)
    _check_carry(config, job)
    if options.dry_run:
        show_first_row(job)
        return replace(describe(job), run=uri)
    dataset = Dataset(
        files=job.found.files,
        paths=relative_paths([file.uri for file in job.found.files], job.found.roots),
        root=job.found.roots[0],
        names=job.found.names,
        has_key="custom_id" in config.input.columns,
    )
    work = _Work(config, first, answer, dataset, uri, options, start_engine, started)
    if options.new_run:
        _discard(work)
    done = _run(work)
    result = _finish(work, done) if done.is_whole else _stopped(work, done)
    _summarize(result)
    return result


def _run(work: _Work) -> _Done:
    """All attempts, as far as they are not done already."""
    dataset, batch = work.dataset, partial(run_batch, start_engine=work.start_engine)
    rows = {dataset.paths[file.uri]: file.rows for file in dataset.files}
    done = _Done([Feed(0, FIRST_RUN, rows)], [], [])
    done.results.append(batch(work.first, work.options))
    while _is_whole(done.results[-1]):
        done.attempts.append(load_attempt(work.uri, done.feeds[-1], dataset.paths))
        if done.results[-1].deadline_passed:
            break
        feed = _next_feed(work, done.attempts)
        if feed is None:
            break
        log.info("attempt %d: %d rows without a valid answer", feed.number, feed.rows)
        config = later_config(work.config, work.first, feed, dataset.root)
        done.feeds.append(feed)
        done.results.append(batch(config, replace(work.options, new_run=False)))
    return done


def _is_whole(result: Result) -> bool:
    """Whether every row of the attempt has its record, many errors or not."""
    if result.error is not None:
        return False
    return result.status in (RunStatus.COMPLETE, RunStatus.OVER_ERROR_RATE)


def _next_feed(work: _Work, attempts: Sequence[Attempt]) -> Feed | None:
    """The feed of the next attempt: the one there, or a new one; None if no row wants it."""
    number, task = len(attempts), work.config.task
    known = read_feed(work.uri, number)
    if known is not None or task.retries == 0:
        return known
    with _owned(work) as confirm:
        feed = write_feed(work.uri, number, work.dataset, attempts, work.answer, task)
        if not feed.files:
            return None
        confirm()
        mark_feed(work.uri, feed)
    return feed


def _finish(work: _Work, done: _Done) -> Result:
    """Write of the dataset what is missing or outdated; then the reports and, last, ``_SUCCESS``.

    Raises:
        AccountingError: rows in and rows out do not add up.
    """
    carry = work.config.output.carry
    taken = sorted(work.dataset.names if carry is None else carry)
    columns = name_columns(work.answer, taken, work.config.task.prefix)
    assembly = Assembly(work.uri, work.dataset, done.attempts, work.answer, columns, carry)
    found = look(assembly)
    if None not in found.values() and storage.exists(storage.join(work.uri, "_SUCCESS")):
        log.info("%s is finished; nothing to generate or to write", work.uri)
        return _result(work, done, found)
    with _owned(work) as confirm:
        _withdraw(work)
        result = _result(work, done, assemble(assembly, found, confirm))
        confirm()
        manifest = _write_manifest(work)
        write_report(result, manifest)
        storage.put_bytes(storage.join(work.uri, "_SUCCESS"), b"")
    return result


def _result(work: _Work, done: _Done, made: Mapping[InputFile, Counts | None]) -> Result:
    counted = Counts.total([counts for counts in made.values() if counts is not None])
    rows_in = sum(file.rows for file in work.dataset.files)
    totals = _totals(done.results, counted, len(made))
    return Result(
        status=judge(rows_in, totals, work.config.limits.max_error_rate),
        run=work.uri,
        rows_total=rows_in,
        totals=totals,
        seconds=time.monotonic() - work.started,
        generated_rows=sum(each.generated_rows for each in done.results),
        deadline_passed=any(each.deadline_passed for each in done.results),
        details=_details(done, counted),
    )


def _stopped(work: _Work, done: _Done) -> Result:
    """The result of a start whose last attempt did not end: its report, and no ``_SUCCESS``. Data
    files of an earlier start stay as they are."""
    last = done.results[-1]
    result = replace(
        last,
        run=work.uri,
        rows_total=sum(file.rows for file in work.dataset.files),
        totals=_totals(done.results, None, 0),
        seconds=time.monotonic() - work.started,
        generated_rows=sum(each.generated_rows for each in done.results),
        details={**last.details, **_details(done, Counts())},
    )
    try:
        with (
            storage.patience_in_all(end_budget().left(_REPORT_S)),
            Lease.acquire(work.uri, wait=False, pause=_give_up) as lease,
        ):
            _withdraw(work)
            lease.confirm()
            write_report(result, _write_manifest(work))
    except (StorageError, RunBusyError, LeaseLostError) as failure:
        # perhaps what stopped the attempt; that is what is told
        log.warning("no report could be written: %s", failure)
    return result


@contextmanager
def _owned(work: _Work) -> Iterator[Callable[[], None]]:
    """Within, the dataset is this start's; what confirms that is a place to stop at a signal."""
    with (
        signals.deferred(work.config.limits.drain_s),
        acquired(work.uri, wait=work.options.wait) as lease,
    ):
        yield confirming(lease)


def _give_up(_: float) -> NoReturn:
    raise RunBusyError("another start is at the dataset")


def _totals(results: Sequence[Result], counted: Counts | None, files: int) -> Totals:
    """Rows and errors of the dataset, or of the first attempt while there is none; tokens and what
    else was spent, of all attempts."""
    each = [result.totals for result in results]

    def summed(of: Callable[[Totals], Mapping[str, Any]]) -> dict[str, Any]:
        sums: Counter[str] = Counter()
        for totals in each:
            sums.update(of(totals))
        return dict(sums)

    spent = replace(
        each[0],
        tokens=summed(lambda totals: totals.tokens),
        finish_reasons=summed(lambda totals: totals.finish_reasons),
        lengths=summed(lambda totals: totals.lengths),
        cpu_s=summed(lambda totals: totals.cpu_s),
    )
    if counted is None:
        return spent
    rows = count_rows(counted)
    return replace(spent, rows=rows, records=sum(rows.values()), errors=counted.errors, parts=files)


def _details(done: _Done, counted: Counts) -> dict[str, Any]:
    answered = counted.rows.get(Status.SUCCEEDED, 0)
    return {
        "attempts": [
            {
                "attempt": feed.number,
                "run": result.run,
                "rows": feed.rows,
                "succeeded": result.totals.rows[Status.SUCCEEDED],
                "errored": result.totals.rows[Status.ERRORED],
                "tokens": dict(result.totals.tokens),
            }
            for feed, result in zip(done.feeds, done.results, strict=True)
        ],
        "agreement": {
            "mean": round(counted.agreement / answered, 4) if answered else None,
            "unanimous": counted.unanimous,
        },
        "retried": {"rows": counted.retried, "mended": counted.mended},
    }


def _retryable(words: Collection[str]) -> frozenset[str]:
    """``--retry``'s words for the attempts' runs: an invalid answer is another attempt's matter.

    Raises:
        ConfigError: it names the codes of invalid answers.
    """
    invalid = sorted(INVALID & set(words))
    if invalid:
        raise ConfigError(
            f"--retry {invalid[0]}: raise task.retries instead, which tries such rows again with "
            "other seeds."
        )
    if Status.ERRORED not in words:
        return frozenset(words)
    codes = {str(code) for code in ErrorCode} - INVALID - {ErrorCode.BATCH_EXPIRED}
    return frozenset(words) - {Status.ERRORED} | codes


def _check_examples(config: AnnotateConfig, answer: Answer) -> None:
    for number, example in enumerate(config.task.examples):
        said = example.answer
        fault = answer.fault(said if isinstance(said, str) else compact_json(said))
        if fault:
            raise ConfigError(f"task.examples[{number}].answer {said!r:.80}: {fault}.")


def _check_carry(config: AnnotateConfig, job: Job) -> None:
    unknown = sorted(set(config.output.carry or ()) - job.found.names)
    if unknown:
        raise ConfigError(
            f"output.carry: no input file has a column {unknown[0]!r}; there are "
            f"{', '.join(sorted(job.found.names))}."
        )


def _check_folder(uri: str, *, new_run: bool) -> None:
    """Refuse a folder that holds something else."""
    manifest = storage.join(uri, "run.json")
    try:
        document = json.loads(storage.read_bytes(manifest))
    except FileNotFoundError:
        document = {"job": _JOB}
    except ValueError:
        document = {"job": _JOB if new_run else None}
    if not isinstance(document, dict) or document.get("job") != _JOB:
        raise RunMismatchError(f"{manifest} is not of an annotated dataset; use another folder.")
    check_only_ours(uri)


def _discard(work: _Work) -> None:
    """Give up what the folder holds; the attempts' first run is discarded by itself.

    Raises:
        RunBusyError: another driver is at one of its runs.
    """
    check_not_driven(run_uri(work.uri, FIRST_RUN))
    number = 1
    while (feed := read_feed(work.uri, number)) is not None:
        check_not_driven(run_uri(work.uri, feed.run))
        number += 1
    with _owned(work) as confirm:
        _withdraw(work)
        discard_feeds(work.uri)
        confirm()
        discard_dataset(work.uri)


def _withdraw(work: _Work) -> None:
    """The dataset is about to change: what says that it is whole goes first."""
    storage.delete(storage.join(work.uri, "_SUCCESS"))


def _write_manifest(work: _Work) -> Mapping[str, Any]:
    """The dataset's ``run.json``: that of attempt 0, with the whole config."""
    first = json.loads(storage.read_bytes(storage.join(run_uri(work.uri, FIRST_RUN), "run.json")))
    config = redacted(work.config.model_dump(mode="json"))
    manifest = {**first, "config": config, "job": _JOB}
    data = (json.dumps(manifest, indent=2) + "\n").encode()
    storage.put_bytes(storage.join(work.uri, "run.json"), data)
    return manifest


def _summarize(result: Result) -> None:
    log.info(
        "%s: %d rows, %d with an answer, %d attempts; %s",
        result.status,
        result.rows_total,
        result.totals.rows[Status.SUCCEEDED],
        len(result.details["attempts"]),
        storage.join(result.run or "", "data"),
    )
