"""Signals in the moments that used to end a job with a stack trace: while it starts Ray, mostly.

The long form, with every job and random moments, is ``python -m tests.chaos.signals``.
"""

import subprocess
import time
import uuid
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.chaos.signals import MARK, judge, left_running, wait_until_it_listens
from tests.integration.fake_job import RUNNER, environment
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    (folder / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["Say so."] * 20}), folder / "in" / "a.parquet")
    document = {
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "engine": {"profile": "mini-maverick-tp1"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return folder / "config.yaml"


@pytest.mark.parametrize(
    ("program", "after_s", "number"),
    [
        (None, 0.2, SIGINT),
        ("gcs_server", 0.0, SIGTERM),
        ("raylet", 0.0, SIGTERM),
        ("raylet", 0.3, SIGTERM),
        ("raylet", 0.6, SIGTERM),
        ("raylet", 0.9, SIGINT),
    ],
)
def test_a_job_that_is_starting_ends_with_its_line_and_leaves_nothing(
    program: str | None, after_s: float, number: Signals, config: Path, tmp_path: Path
) -> None:
    mark, log = uuid.uuid4().hex, tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*RUNNER, "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**environment(), MARK: mark},
        ) as process,
    ):
        try:
            wait_until_it_listens(process)
            if program is not None:
                wait_until(lambda: program in programs_of(process.pid), 120)
            time.sleep(after_s)
            process.send_signal(number)
            stdout, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75, log.read_text()
    assert not list(judge(process.returncode, stdout, log.read_text(), ()))
    assert not list(left_running(mark))


def programs_of(pid: int) -> set[str]:
    """What the process has started."""
    found = set()
    for child in psutil.Process(pid).children():
        try:
            found.add(child.name())
        except psutil.Error:
            continue
    return found
