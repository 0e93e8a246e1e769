"""``python -m jobs.bench``: measure, side by side and in turns, and write ``docs/benchmarks.md``.

Each measurement is a line of ``results.jsonl`` as soon as it is taken, and is not taken again: a
bench that was cut short goes on where it stopped, as long as code, machine and rows are the same.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.bench import report
from jobs.bench.contenders import Contender
from jobs.bench.machine import code, machine
from jobs.bench.measure import BenchError, measure, prepare
from jobs.bench.results import Measurement, Setting, Store, of_setting, same_work
from jobs.bench.workloads import WORKLOADS, Workload
from pipeline.children import end_all
from pipeline.errors import ExitCode, PipelineError
from pipeline.hardware import gpus
from pipeline.profile import REPO_ROOT

NULL = "null"
"""The workload without an engine; what it measures is not compared with anyone."""
_DOCS = REPO_ROOT / "docs"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__)
    made.add_argument(
        "--workload",
        action="append",
        choices=[*WORKLOADS, NULL],
        help="what to run (repeatable; default: all that this machine can)",
    )
    made.add_argument("--contenders", default="", help="comma-separated; default: all")
    made.add_argument("--rounds", type=int, default=3, help="of each contender (default: 3)")
    made.add_argument("--rows", type=int, help="instead of each workload's own number")
    made.add_argument("--out", type=Path, default=Path("out/bench"), help="default: out/bench")
    made.add_argument(
        "--report", action="store_true", help="measure nothing: write docs/benchmarks.md"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, then tell; returns the exit code."""
    arguments = parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    console = Console(stderr=True)
    out: Path = arguments.out.absolute()
    store = Store(out / "results.jsonl")
    failed = 0
    try:
        if not arguments.report:
            wanted = _contenders(arguments.contenders)
            for workload in _workloads(arguments.workload):
                count = arguments.rows or workload.rows
                failed += _bench(workload, count, arguments.rounds, wanted, out, store, console)
            if not arguments.workload or NULL in arguments.workload:
                _ceilings(arguments.rows, out)
    except PipelineError as error:
        console.print(str(error), markup=False, style="red")
        return ExitCode.FAILED
    found = store.read()
    report.write(found, out, _DOCS)
    console.print(report.console_table(found))
    console.print(f"written: {_DOCS / report.REPORT}", markup=False)
    if failed:
        console.print(f"{failed} measurements failed; the same command takes them again")
    return ExitCode.FAILED if failed else ExitCode.DONE


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """Signal handler: end what is being measured, and this process."""
    os.write(2, b"stopped; the same command goes on with what is left\n")
    end_all()
    os._exit(ExitCode.INTERRUPTED)


def turns(contenders: Sequence[Contender], rounds: int) -> list[tuple[int, Contender]]:
    """Who is measured when: each once a round, each round beginning with the next one."""
    return [
        (number, contenders[(place + number) % len(contenders)])
        for number in range(rounds)
        for place in range(len(contenders))
    ]


def _bench(
    workload: Workload,
    count: int,
    rounds: int,
    wanted: frozenset[Contender],
    out: Path,
    store: Store,
    console: Console,
) -> int:
    """Take what is not taken yet; returns how many failed, which does not stop the others."""
    setting = Setting(workload.name, count, code(), machine())
    contenders = [who for who in workload.contenders if not wanted or who in wanted]
    done = of_setting(store.read(), setting)
    left = [(n, who) for n, who in turns(contenders, rounds) if n not in done.get(who, {})]
    if not left:
        return 0
    failed = 0
    prepared = prepare(workload, count, out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(workload.name, total=len(left))
        for number, contender in left:
            progress.update(task, description=f"{workload.name}, round {number + 1}: {contender}")
            try:
                one = measure(prepared, contender, number, setting, out)
            except BenchError as error:
                failed += 1
                progress.console.print(str(error), markup=False, style="red")
            else:
                store.add(one)
                progress.console.print(_line(one), markup=False)
            progress.advance(task)
    _warn_of_other_work(of_setting(store.read(), setting), console)
    return failed


def _ceilings(rows: int | None, out: Path) -> None:
    """The pipeline alone, with an engine that answers at once.

    Raises:
        BenchError: a run failed; it has said why on stderr.
    """
    for name in report.CEILINGS:
        command = [sys.executable, "-m", "jobs.bench.ceiling", "--workload", name]
        command += ["--out", str(out), *(["--rows", str(rows)] if rows else [])]
        if subprocess.run(command, cwd=REPO_ROOT, check=False).returncode != 0:
            raise BenchError(f"the null engine's {name} run failed")


def _line(one: Measurement) -> str:
    return (
        f"{one.setting.workload} {one.contender} round {one.round + 1}: "
        f"{one.tokens_per_s:.1f} tok/s, {one.rows_per_s:.2f} rows/s, {one.prompt_tokens} prompt "
        f"and {one.completion_tokens} completion tokens, {one.seconds:.1f} of {one.whole_s:.1f} s"
    )


def _warn_of_other_work(groups: dict[Contender, dict[int, Measurement]], console: Console) -> None:
    ours = groups.get(Contender.PIPELINE, {})
    for contender, theirs in groups.items():
        if not same_work(ours, theirs):
            told = f"{contender} made other numbers of tokens than pipeline: no fair comparison"
            console.print(told, style="yellow")


def _workloads(names: Sequence[str] | None) -> list[Workload]:
    if names:
        return [WORKLOADS[name] for name in names if name != NULL]
    here = bool(gpus())
    return [workload for workload in WORKLOADS.values() if here or not workload.needs_gpu]


def _contenders(words: str) -> frozenset[Contender]:
    try:
        return frozenset(Contender(word.strip()) for word in words.split(",") if word.strip())
    except ValueError as error:
        raise PipelineError(f"{error}; known are {', '.join(Contender)}") from None


if __name__ == "__main__":
    sys.exit(main())
