"""``jobs.plan`` on a real Ray, and the run that it was the plan of; the engine alone is a fake.

Not covered: rates, which are a profile's own; the real engine.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.integration import fake_job
from tests.unit.test_prepare import png

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("one_ray")]

CAPS = (16, 40, 400)
IMAGE = png(56, 56)


def put_rows(folder: Path, first: int, rows: int) -> None:
    """Prompts of several lengths and caps; every fiftieth is bad, every tenth has an image."""
    folder.mkdir()
    numbers = range(first, first + rows)
    table = pa.table(
        {
            "custom_id": [f"row-{i}" for i in numbers],
            "prompt": [None if i % 50 == 7 else "Say " + "so " * (i % 40) for i in numbers],
            "images": [[IMAGE] if i % 10 == 0 else [] for i in numbers],
            "sampling": [f'{{"max_completion_tokens": {CAPS[i % 3]}}}' for i in numbers],
        }
    )
    pq.write_table(table, folder / "a.parquet", row_group_size=100)


def put_config(folder: Path, name: str, rows: int, first: int) -> Path:
    put_rows(folder / f"in-{name}", first, rows)
    config = {
        "input": {"uri": str(folder / f"in-{name}")},
        "output": {"uri": str(folder / "runs" / name)},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"max_error_rate": 0.1, "shard_rows": 50},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def plan(config: Path) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.plan", "--config", str(config)],
        capture_output=True,
        text=True,
        env=fake_job.environment(),
        timeout=400,
    )
    (line,) = done.stdout.splitlines()
    return done.returncode, json.loads(line), done.stderr


def nightly(config: Path) -> dict[str, Any]:
    code, result, stderr = fake_job.nightly(config, FAKE_ENGINE_FAULT="lengths")
    assert code == 0, stderr
    return result


def test_a_plan_meets_the_following_runs_tokens(tmp_path: Path) -> None:
    nightly(put_config(tmp_path, "yesterday", rows=500, first=0))
    config = put_config(tmp_path, "today", rows=900, first=10_000)
    code, result, stderr = plan(config)
    assert code == 0, stderr
    assert not (tmp_path / "runs" / "today").exists(), "a plan writes nothing"
    planned = result["plan"]
    assert planned["completion_source"]["run"] == f"file://{tmp_path}/runs/yesterday"

    followed = nightly(config)
    images = planned["images"]["value"]
    text = planned["tokens"]["prompt"]["value"] - planned["tokens"]["image"]["value"]
    assert text == followed["tokens"]["prompt"] - images  # the fake counts one token an image
    assert planned["tokens"]["image"]["value"] == followed["tokens"]["image"]
    assert planned["rows"]["bad"]["value"] == followed["rows"]["errored"] == 18
    assert planned["completions"]["value"] == followed["rows"]["succeeded"]
    completion, truth = planned["tokens"]["completion"], followed["tokens"]["completion"]
    assert abs(completion["value"] / truth - 1) < 0.15
    assert completion["low"] <= truth <= completion["high"]
    report = json.loads((tmp_path / "runs" / "today" / "report.json").read_text())
    assert report["money"]["cluster"] is None, "no GPUs"
    charged = followed["tokens"]["prompt"] - followed["tokens"]["image"]
    hosted = (charged * 0.17 + truth * 0.85) / 1e6 + images * 0.6684 / 1e3
    assert images == 90
    assert report["money"]["hosted"][0]["cost"] == pytest.approx(hosted, abs=1e-6)


def test_a_plan_that_is_interrupted_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    config = put_config(tmp_path, "long", rows=20_000, first=0)
    log = tmp_path / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "jobs.plan", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=fake_job.environment(),
        ) as process,
    ):
        try:
            while "Progress bars disabled" not in log.read_text():  # Ray Data begins
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    result = json.loads(stdout)
    assert (process.returncode, result["status"]) == (75, "interrupted"), log.read_text()
    assert "the same command starts anew" in result["error"]
    assert not (tmp_path / "runs").exists()
