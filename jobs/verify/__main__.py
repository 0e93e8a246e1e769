"""Audit a finished run, replay a sample of it, or show one row as the engine saw it.

``python -m jobs.verify RUN_URI [--sample N] [--audit-only] [--row ID] [--out URI]``

The audit needs the run's folder alone; a replay also its input and its model. Uses the Ray cluster
in ``RAY_ADDRESS``, else starts Ray in this process.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from jobs.cli import add_config_arguments, name_run, plain_parser, run_job
from jobs.verify.audit import Audit, audit
from jobs.verify.checks import Check, CheckName, State
from jobs.verify.choose import choose, read_chosen
from jobs.verify.compare import Replay
from jobs.verify.outcome import replay_check, show_checks, show_row, to_result, write_verdict
from jobs.verify.recorded import Recorded, open_recorded
from pipeline import storage
from pipeline.config import load_config
from pipeline.engine import Engine, VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import ConfigError, StorageError
from pipeline.report import Result, RunStatus, total

log = logging.getLogger(__name__)

_PROBE_S = 5.0
"""What a look at whether a folder takes objects may take."""
_EPILOG = """\
exit codes: 0 every check passed and the replay was equal, 1 a check found faults, a record came
            out otherwise, or the run is not finished, 2 no such run or row, 75 interrupted

examples:
  python -m jobs.verify s3://batch/runs/quickstart
  python -m jobs.verify s3://batch/runs/quickstart --audit-only
  python -m jobs.verify s3://batch/runs/quickstart --row prompts-1.parquet:17
  python -m jobs.verify --config jobs/configs/quickstart.yaml --sample 1000 --out s3://mine/verify
"""


def verify_parser(module: str) -> argparse.ArgumentParser:
    """The job's command line."""
    parser = plain_parser(module, "Audit a run, and replay a sample of it.", _EPILOG)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the run's folder (its output.uri)")
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--sample",
        type=_count,
        default=100,
        metavar="N",
        help="records to generate again, spread over the run (default 100)",
    )
    parser.add_argument(
        "--audit-only", action="store_true", help="check what is stored; start no engine"
    )
    parser.add_argument(
        "--row",
        metavar="ID",
        help="show one row as the engine saw it, by custom_id or file:row, and check nothing",
    )
    parser.add_argument(
        "--out",
        metavar="URI",
        help="where verify.json and the replay's own parts go, if not below the run's folder",
    )
    parser.add_argument(
        "--max-mismatch",
        type=_rate,
        default=0.0,
        metavar="RATE",
        help="share of replayed records that may come out otherwise, as on GPUs whose numbers "
        "depend on the batch (default 0)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job; returns the exit code."""
    remedy = "the same command starts over"
    return run_job(verify, verify_parser("jobs.verify"), argv, remedy=remedy)


def verify(
    arguments: argparse.Namespace, *, start_engine: Callable[[EngineSpec], Engine] = VLLMEngine
) -> Result:
    """Do what the command line asks for.

    Args:
        arguments: as ``verify_parser`` gives them.
        start_engine: builds the replay's engine on its node; must be picklable.

    Raises:
        UsageError: there is no such run or row, or it cannot be read.
        PipelineError: the store does not answer, or the replay's engine failed.
    """
    started = time.monotonic()
    recorded = _open(arguments)
    name_run(recorded.run.uri)
    if arguments.row is not None:
        return _show(recorded, arguments.row, started)
    found = audit(recorded)
    folder = _output_folder(recorded, arguments.out)
    refusal = "--audit-only" if arguments.audit_only else _no_replay(recorded, found)
    replayed = None
    if refusal is None:
        replayed = _replay(recorded, found, arguments.sample, folder, start_engine)
    last = (
        Check(CheckName.REPLAY, State.SKIPPED, refusal or "nothing succeeded")
        if replayed is None
        else replay_check(replayed, arguments.max_mismatch)
    )
    checks = (*found.checks, last)
    result = to_result(recorded, found, checks, replayed, time.monotonic() - started)
    show_checks(checks)
    if folder is not None:
        log.info("details: %s", write_verdict(folder, recorded, result, replayed))
    return result


def _open(arguments: argparse.Namespace) -> Recorded:
    if arguments.config is None:
        if arguments.run is None:
            raise ConfigError("name the run's folder, or the job's --config FILE.")
        if arguments.overrides:
            raise ConfigError("--set is for --config; there is none.")
        return open_recorded(arguments.run)
    config = load_config(arguments.config, arguments.overrides)
    return open_recorded(arguments.run or config.output.uri, config)


def _show(recorded: Recorded, row_id: str, started: float) -> Result:
    from jobs.verify.row import describe_row

    document = describe_row(recorded, row_id)
    show_row(document)
    return Result(
        status=RunStatus.COMPLETE,
        run=recorded.run.uri,
        rows_total=recorded.run.plan.rows,
        totals=total([]),
        seconds=time.monotonic() - started,
        details={"row": document},
    )


def _no_replay(recorded: Recorded, found: Audit) -> str | None:
    """Why there is nothing to replay; None if there is."""
    if not recorded.run.complete:
        return "the run is not finished"
    if not found.input_intact:
        return "the input is not the one that the run was made of"
    return None


def _output_folder(recorded: Recorded, out: str | None) -> str | None:
    """Where to write; None if the run's folder takes nothing and no other was named.

    Raises:
        ConfigError: ``out`` takes nothing.
    """
    folder = storage.absolute(out or storage.join(recorded.run.uri, "_verify")).rstrip("/")
    try:
        with storage.patience(_PROBE_S):
            storage.check_writable(storage.join(folder, "verify.json"))
    except StorageError as error:
        if out is not None:
            raise ConfigError(f"--out {out}: {error}.") from None
        log.warning("nothing is written: %s; give --out to keep the result", error)
        return None
    return folder


def _replay(
    recorded: Recorded,
    found: Audit,
    sample: int,
    folder: str | None,
    start_engine: Callable[[EngineSpec], Engine],
) -> Replay | None:
    """The replay; None if no record can be replayed.

    Raises:
        ConfigError: the cluster's nodes have no place to write to.
    """
    from jobs.verify.replay import replay

    if folder is None and os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"{recorded.run.uri} takes no objects, so the cluster has no place for what it "
            "replays; give --out, a folder that all nodes can write to, or --audit-only."
        )
    usable = {number: part.succeeded for number, part in found.parts.items() if part.sound}
    chosen = read_chosen(recorded.run.uri, choose(recorded.run.id, usable, sample))
    if not chosen:
        return None
    return replay(recorded, chosen, out=folder, start_engine=start_engine)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a share from 0 to 1")
    return rate


if __name__ == "__main__":
    sys.exit(main())
