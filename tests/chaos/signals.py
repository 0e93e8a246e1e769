"""Every job, stopped by SIGTERM or SIGINT at a random moment, many times over.

    python -m tests.chaos.signals --count 200 --seed 1 [--jobs plan,verify] [--markdown FILE]

Each time the job must exit with 75, or as if no signal had come; its one line on stdout must be
whole and say the same; no stack trace may stand in its log; nothing that it started may be left.
Jobs that resume go on with the same folder until it is finished, then with another. Exit code 0:
that held every time; 1: the table says where not. One signal in six is followed by a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cluster.sample import SAMPLE_FOLDER
from pipeline.lease import Lease
from pipeline.profile import REPO_ROOT
from tests import quiz
from tests.variables import without_ray

MARK = "SIGNALS_CAMPAIGN"
"""The variable by which whatever a job starts is found."""
_TRACES = ("Traceback", "defect", "SIGABRT", "*** SIG", "terminate called", "Fatal Python error")
_END_S = 120.0
_GONE_S = 20.0
"""What Ray's own processes may take to notice that their job is gone."""
_SECOND = 1 / 6
_START_S = 12.0
"""The most delicate part, Ray's start, comes within; half of all signals do."""
_ENGINE = {"profile": "mini-maverick-tp1"}


@dataclass
class Target:
    """A job that signals are sent to."""

    name: str
    command: Callable[[int], Sequence[str]]
    """By the number of the folder it works in."""
    resumes: bool
    finished: frozenset[int] = frozenset({0})
    """Its exit codes when nothing stops it."""
    variables: Mapping[str, str] = field(default_factory=dict)
    folder: int = 0
    seconds: float = 40.0
    """From when it listens to its end: a guess, then as it last was."""


@dataclass(frozen=True)
class Shot:
    """One signal, and what came of it."""

    target: str
    number: signal.Signals
    after_s: float
    twice: bool
    code: int
    ended_s: float
    """From the signal to the end."""
    faults: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    given = _parse(arguments)
    folder = given.keep or Path(tempfile.mkdtemp(prefix="signals-"))
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(given.seed)
    shots: list[Shot] = []
    with staged(folder, given.jobs.split(",") if given.jobs else None) as targets:
        until = time.monotonic() + given.minutes * 60
        while len(shots) < given.count and time.monotonic() < until:
            target = targets[len(shots) % len(targets)]
            shot = shoot(target, rng, folder)
            if shot is not None:
                shots.append(shot)
                print(_line(shot), file=sys.stderr, flush=True)
    table = to_markdown(shots)
    print(table)
    if given.markdown:
        given.markdown.write_text(table)
    return 1 if any(shot.faults for shot in shots) else 0


def shoot(target: Target, rng: Random, folder: Path) -> Shot | None:
    """Start the job, send it a signal while it runs, and judge its end; None if it was faster."""
    mark = uuid.uuid4().hex
    log = folder / "stderr"
    environment = {**without_ray(), **target.variables, MARK: mark}
    moment = rng.uniform(0, rng.choice((target.seconds, min(target.seconds, _START_S))))
    number, twice = rng.choice((signal.SIGTERM, signal.SIGINT)), rng.random() < _SECOND
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            target.command(target.folder),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            cwd=REPO_ROOT,
        ) as process,
    ):
        wait_until_it_listens(process)
        listens = time.monotonic()
        _sleep_beside(process, moment)
        alive = process.poll() is None
        sent = time.monotonic()
        if alive:
            process.send_signal(number)
        if alive and twice:
            _sleep_beside(process, rng.uniform(0, 3))
            process.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
        try:
            stdout, _ = process.communicate(timeout=_END_S if alive else 600)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, _ = process.communicate()
    ended = time.monotonic()
    faults = [
        *judge(process.returncode, stdout, log.read_text(), target.finished),
        *left_running(mark),
    ]
    if process.returncode in target.finished:
        target.seconds = target.seconds if alive else ended - listens
        target.folder += 1
    elif not target.resumes:
        target.folder += 1
    if faults:
        shutil.copy(log, folder / f"stderr-{target.name}-{mark}")
        (folder / f"stdout-{target.name}-{mark}").write_text(stdout)
    if not alive and not faults:
        return None
    return Shot(
        target.name, number, sent - listens, twice, process.returncode, ended - sent, tuple(faults)
    )


def judge(code: int, stdout: str, stderr: str, finished: Collection[int]) -> Iterator[str]:
    """What is wrong with the end of a job."""
    if code not in {75, *finished}:
        yield f"exit code {code}"
    lines = stdout.splitlines()
    if len(lines) != 1:
        yield f"{len(lines)} lines on stdout"
    try:
        document: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        yield "the last line is no JSON"
    else:
        if document.get("exit_code", code) != code:
            yield f"the last line says {document['exit_code']}, the exit code is {code}"
        if missing := {"status", "run", "rows", "tokens", "seconds"} - document.keys():
            yield f"the last line lacks {sorted(missing)}"
    yield from (f"{word!r} on stderr" for word in _TRACES if word in stderr)


def left_running(mark: str) -> Iterator[str]:
    """Processes with this mark that do not end; they are killed."""
    until = time.monotonic() + _GONE_S
    while left := [process for process in psutil.process_iter() if _marked(process, mark)]:
        if time.monotonic() > until:
            for process in left:
                yield f"left running: {process.pid} {' '.join(process.cmdline())[:80]}"
                process.kill()
            return
        time.sleep(0.2)


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return False


def wait_until_it_listens(process: subprocess.Popen[str]) -> None:
    """Python's own start, 50 ms, has no say in what signals do."""
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
        if int(mask, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


def _sleep_beside(process: subprocess.Popen[str], seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


@contextmanager
def staged(folder: Path, names: Sequence[str] | None) -> Iterator[list[Target]]:
    """The jobs, with something to do."""
    _put_prompts(folder / "in", 400)
    _put_prompts(folder / "few", 40)
    quiz.write_arc(folder / "quiz")
    shutil.copytree(SAMPLE_FOLDER.parent / "digits", folder / "digits")
    ended, seen = str(folder / "ended"), folder / "seen"
    tests = [sys.executable, "-m", "tests.integration.nightly_with_fake_engine"]
    _put_prompts(folder / "none", 0)
    _run(_nightly(folder, "none", str(seen)))
    if names is None or "verify" in names:
        _run(_nightly(folder, "few", ended))
    (seen / "_SUCCESS").unlink()
    (seen / "_lease.json").unlink()

    def job(name: str, *words: str) -> list[str]:
        return [sys.executable, "-m", name, *words]

    out = str(folder / "out-{}-{}").format
    targets = [
        Target(
            "nightly (echo engine)",
            lambda n: [*tests, "--config", _nightly(folder, "in", out("echo", n))],
            resumes=True,
            variables={"FAKE_ENGINE_DELAY_S": "0.1"},
        ),
        Target(
            "plan",
            lambda n: job("jobs.plan", "--config", _nightly(folder, "in", out("p", n))),
            resumes=False,
        ),
        Target(
            "nightly",
            lambda n: job("jobs.nightly", "--config", _nightly(folder, "few", out("real", n))),
            resumes=True,
        ),
        Target(
            "verify",
            lambda _: job("jobs.verify", ended, "--sample", "20"),
            resumes=False,
            finished=frozenset({0, 1}),
        ),
        Target(
            "annotate",
            lambda n: job("jobs.annotate", "--config", _annotate(folder, n)),
            resumes=True,
        ),
        Target(
            "status", lambda _: job("jobs.status", str(seen), "--watch"), resumes=False, seconds=8
        ),
        Target(
            "evaluate",
            lambda n: job("jobs.evaluate", "--config", _evaluate(folder, n)),
            resumes=True,
        ),
        Target(
            "preflight",
            lambda n: job("cluster.preflight", "--config", _nightly(folder, "few", out("pre", n))),
            resumes=False,
            finished=frozenset({0, 1}),
        ),
    ]
    chosen = [each for each in targets if names is None or each.name in names]
    with Lease.acquire(f"file://{seen}", wait=False):
        yield chosen


def _run(config: str) -> None:
    """The nightly job, to its end."""
    command = [sys.executable, "-m", "jobs.nightly", "--config", config]
    output = subprocess.DEVNULL
    subprocess.run(command, env=without_ray(), stdout=output, cwd=REPO_ROOT, check=True)


def _nightly(folder: Path, rows: str, out: str) -> str:
    limits = {"shard_rows": 8, "journal_s": 1}
    return _put(
        folder,
        {
            "input": {"uri": str(folder / rows)},
            "output": {"uri": out},
            "sampling": {"max_completion_tokens": 16},
            "engine": _ENGINE,
            "limits": limits,
        },
    )


def _annotate(folder: Path, number: int) -> str:
    labels = {"type": "object", "properties": {"label": {"enum": [str(n) for n in range(10)]}}}
    return _put(
        folder,
        {
            "input": {"uri": str(folder / "digits"), "columns": {"custom_id": "scan_id"}},
            "output": {"uri": str(folder / f"out-annotate-{number}")},
            "sampling": {"temperature": 1.0, "max_completion_tokens": 4},
            "engine": _ENGINE,
            "limits": {"max_error_rate": 1.0, "shard_rows": 16},
            "task": {
                "prompt": "Which digit?",
                "images": ["image"],
                "votes": 1,
                "retries": 1,
                "answer": {"form": "value", "schema": labels},
            },
        },
    )


def _evaluate(folder: Path, number: int) -> str:
    return _put(
        folder,
        {
            "tasks": [
                {"name": "digits", "chat": True, "limit": 20, "subject": "answer"},
                {"name": "arc_easy", "data": str(folder / "quiz"), "limit": 6},
            ],
            "output": {"uri": str(folder / f"out-evaluate-{number}")},
            "engine": _ENGINE,
        },
    )


def _put(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    return str(path)


def _put_prompts(folder: Path, rows: int) -> None:
    folder.mkdir()
    prompts = pa.array([f"Say {n}." for n in range(rows)], pa.string())
    pq.write_table(pa.table({"prompt": prompts}), folder / "a.parquet")


def to_markdown(shots: Sequence[Shot]) -> str:
    """What was sent to which job, and how it ended."""
    rows = [
        "| job | signals | twice | exit 75 | finished | longest end, s | faults |",
        "|---" * 7 + "|",
    ]
    for name in dict.fromkeys(shot.target for shot in shots):
        of = [shot for shot in shots if shot.target == name]
        codes = Counter(shot.code for shot in of)
        rows.append(
            f"| {name} | {len(of)} | {sum(shot.twice for shot in of)} | {codes[75]} "
            f"| {len(of) - codes[75]} | {max(shot.ended_s for shot in of):.1f} "
            f"| {sum(bool(shot.faults) for shot in of)} |"
        )
    return "\n".join([*rows, ""])


def _line(shot: Shot) -> str:
    twice = " twice" if shot.twice else ""
    told = f"{shot.target}: {shot.number.name}{twice} after {shot.after_s:.1f} s"
    return f"{told}: {shot.code} in {shot.ended_s:.1f} s {'; '.join(shot.faults) or 'ok'}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.signals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", help="their names, with commas between; default: all")
    parser.add_argument("--minutes", type=float, default=240, help="end sooner than --count")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new one; else a temporary one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
