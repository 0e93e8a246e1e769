"""Runs of ``jobs.nightly`` with the echo engine, each in a process of its own.

And in a Ray of its own, unless ``one_ray`` holds.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds

from cluster.lifecycle import ClusterOptions, LocalCluster
from tests.variables import without_ray

RUNNER = [sys.executable, "-m", "tests.integration.nightly_with_fake_engine"]
Outcome = tuple[int, dict[str, Any], str]
"""Exit code, the object on stdout's only line, and stderr."""


_shared: dict[str, str] = {}
"""What makes jobs join the Ray of ``one_ray``."""


def environment(**variables: str) -> dict[str, str]:
    return {**without_ray(), **_shared, **variables}


@contextmanager
def one_ray(folder: Path) -> Iterator[LocalCluster]:
    """Jobs join one Ray meanwhile, which saves each a third of its CPU time.

    It is a mini-cluster of one node, so that they see its S3 server's variables, too.
    """
    with LocalCluster(folder, ClusterOptions(nodes=0, cpus_per_node=3)) as cluster:
        _shared.update(cluster.state.environment())
        try:
            yield cluster
        finally:
            _shared.clear()


def workers(cluster: LocalCluster, mark: str) -> list[tuple[str, psutil.Process]]:
    """The cluster's processes that do this, and their nodes (the names of working folders)."""
    directory = cluster.state.directory
    found = []
    for process in psutil.process_iter():
        try:
            folder = Path(process.cwd())
            doing = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if folder.is_relative_to(directory) and mark in doing:
            found.append((folder.name, process))
    return found


def nightly(config: Path, *arguments: str, **variables: str) -> Outcome:
    """Run the job to its end."""
    done = subprocess.run(
        [*RUNNER, "--config", str(config), *arguments],
        capture_output=True,
        text=True,
        env=environment(**variables),
        timeout=800,
    )
    return done.returncode, _result(done.returncode, done.stdout, done.stderr), done.stderr


class RunningJob:
    """A job that was started and can be sent signals."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process = process
        self.log = log

    def wait_for(self, text: str) -> None:
        """Until the job's log has ``text``."""
        self._wait(lambda: text in self.log.read_text())

    def wait_for_files(self, folder: Path, pattern: str) -> None:
        """Until the folder has such a file."""
        self._wait(lambda: any(folder.glob(pattern)))

    def wait_for_new_files(self, folder: Path, pattern: str, count: int) -> None:
        """Until so many more such files have come, although others, or they, go meanwhile."""
        before = set(folder.glob(pattern))
        seen: set[Path] = set()

        def enough() -> bool:
            seen.update(folder.glob(pattern))
            return len(seen - before) >= count

        self._wait(enough)

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def end(self, timeout_s: float = 300) -> Outcome:
        """Wait for the job's end."""
        stdout, _ = self.process.communicate(timeout=timeout_s)
        text = self.log.read_text()
        code = self.process.returncode
        return code, _result(code, stdout, text), text


@contextmanager
def started(config: Path, log: Path, *arguments: str, **variables: str) -> Iterator[RunningJob]:
    """Start the job; it is killed at the end if it still runs."""
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*RUNNER, "--config", str(config), *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(**variables),
        ) as process,
    ):
        try:
            yield RunningJob(process, log)
        finally:
            process.kill()


def records(run: Path) -> list[dict[str, Any]]:
    """All records of a run folder."""
    rows: list[dict[str, Any]] = ds.dataset(run / "data").to_table().to_pylist()
    return rows


def _result(code: int, stdout: str, stderr: str) -> dict[str, Any]:
    lines = stdout.splitlines()
    assert len(lines) == 1, (code, stdout, stderr)
    result: dict[str, Any] = json.loads(lines[0])
    return result
