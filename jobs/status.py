"""How a run stands, or all runs in a folder: from object storage alone, from any machine.

``python -m jobs.status URI [--watch] [--json] [--fail-unless-done]``

Needs no Ray, engine or config, and writes nothing. The table goes to stderr; the last line on
stdout is one JSON object, as with every job: its ``status`` is the run's.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.live import Live

from jobs import signals
from jobs.cli import name_run, plain_parser, run_job
from jobs.status_view import one_line, page
from pipeline import storage
from pipeline.errors import ExitCode, InputError, StorageError
from pipeline.observe import view_run, view_runs
from pipeline.status import RunView, State

log = logging.getLogger(__name__)

_INTERVAL_S = 5.0
_LAST_LOOK_S = 10.0
"""What a look may take on after a signal, so that it can be shown."""
_PLAIN_WIDTH = 120
"""Columns of a page where no terminal says."""
_EPILOG = """\
status: complete, over_error_rate, starting, running, draining, dead (its driver gives no sign of
        life), interrupted, failed, empty, unreadable, gone; of a folder of runs: runs
exit codes: 0 the status was told, 2 no run there or storage cannot be reached,
            1 with --fail-unless-done, if a run is not complete

examples:
  python -m jobs.status s3://batch/runs/2026-11-22 --watch
  python -m jobs.status s3://batch/runs/
  python -m jobs.status s3://batch/runs/$(date -u +%F) --fail-unless-done || page-someone
"""


def status_parser(module: str) -> argparse.ArgumentParser:
    """The job's command line."""
    parser = plain_parser(module, "Tell how runs stand.", _EPILOG)
    parser.add_argument("uri", metavar="URI", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--watch", action="store_true", help="go on telling until no run is at work; Ctrl-C leaves"
    )
    parser.add_argument(
        "--json", action="store_true", help="no table; all there is in the last line"
    )
    parser.add_argument(
        "--fail-unless-done", action="store_true", help="exit with 1 unless every run is complete"
    )
    return parser


@dataclass(frozen=True)
class Told:
    """What was found at a URI: one run, or several."""

    uri: str
    views: tuple[RunView, ...]
    one: bool
    """Whether the URI is a run, not a folder of runs."""
    whole: bool = False
    """Whether the last line holds everything."""
    strict: bool = False
    """Whether a run that is not complete is a failure."""
    error: None = None

    @property
    def live(self) -> bool:
        """Whether a driver is at work."""
        return any(view.state.live for view in self.views)

    @property
    def status(self) -> str:
        """The run's state; ``runs`` of several."""
        return self.views[0].state if self.one else "runs"

    @property
    def exit_code(self) -> ExitCode:
        """0, unless asked to be strict."""
        done = all(view.state in (State.COMPLETE, State.GONE) for view in self.views)
        return ExitCode.FAILED if self.strict and not done else ExitCode.DONE

    @cached_property
    def totals(self) -> dict[str, Any]:
        """Sums over the runs, as in every job's last line."""
        rows, tokens = Counter[str](), Counter[str]()
        for view in self.views:
            summary = view.summary()
            rows.update(summary["rows"])
            tokens.update(summary["tokens"])
        return {"rows": dict(rows), "tokens": dict(tokens)}

    def to_json(self) -> dict[str, Any]:
        """The last line."""
        if self.one:
            view = self.views[0]
            told = view.to_json() if self.whole else view.summary()
            return {**told, "exit_code": int(self.exit_code)}
        document: dict[str, Any] = {
            "status": self.status,
            "run": self.uri,
            **self.totals,
            "seconds": round(sum(view.seconds for view in self.views), 3),
            "exit_code": int(self.exit_code),
            "runs_by_status": dict(Counter(view.state for view in self.views)),
        }
        if self.whole:
            document["runs"] = [view.to_json() for view in self.views]
        return document


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job; returns the exit code."""
    return run_job(status, status_parser("jobs.status"), argv)


def status(arguments: argparse.Namespace) -> Told:
    """Tell what the command line asks for.

    Raises:
        UsageError: there is no run, it is damaged, or its storage cannot be reached.
    """
    uri = storage.absolute(arguments.uri).rstrip("/")
    name_run(uri)
    storage.check_reachable(uri)

    def look() -> Told:
        return _look(uri, whole=arguments.json, strict=arguments.fail_unless_done)

    if arguments.watch:
        return _watch(look, quiet=arguments.json)
    try:
        told = look()
    except StorageError as error:
        raise InputError(str(error)) from error
    if not arguments.json:
        _console().print(page(told.views, one=told.one))
    return told


def _look(uri: str, *, whole: bool, strict: bool) -> Told:
    """What is there now.

    Raises:
        InputError: neither a run nor a folder of runs.
        RunMismatchError: the run is damaged.
        StorageError: the store does not tell.
    """
    view = view_run(uri)
    if view is not None:
        return Told(uri, (view,), one=True, whole=whole, strict=strict)
    views = view_runs(uri)
    if not views:
        raise InputError(
            f"{uri}: there is no run (no run.json), and none in the folders directly below it."
        )
    return Told(uri, tuple(views), one=False, whole=whole, strict=strict)


def _watch(look: Callable[[], Told], *, quiet: bool) -> Told:
    """Look again and again until no driver is at work, or somebody has seen enough."""
    told: Told | None = None
    console = _console()
    display = Live(console=console, auto_refresh=False)
    on_terminal = console.is_terminal and not quiet
    try:
        if on_terminal:
            display.start()
        with signals.deferred(_LAST_LOOK_S):
            while told is None or (told.live and not signals.pause(_INTERVAL_S)):
                told = _again(look, told)
                if on_terminal:
                    display.update(page(told.views, one=told.one), refresh=True)
                elif not quiet:
                    log.info("%s", one_line(told.views))
    finally:
        display.stop()
    return told


def _again(look: Callable[[], Told], before: Told | None) -> Told:
    """The next look; while the store does not answer, the last one stands."""
    try:
        return look()
    except StorageError as error:
        if before is None:
            raise InputError(str(error)) from error
        log.warning("the store does not tell, trying on: %s", error)
        return before


def _console() -> Console:
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, width=_PLAIN_WIDTH)


if __name__ == "__main__":
    sys.exit(main())
