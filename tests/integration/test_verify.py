"""A run with the real engine, its audit, and a replay of all its records: equal to the token.

One engine start for the run, one for the replay. Not covered: GPUs, a replay on a cluster, JSONL
(tests/unit/test_verify_choose.py has where its rows are).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.sample.make import OUT

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(1800)]

IMAGE_ROWS = 24
COUNTS = 12


def job(module: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, last line and log of a job on a Ray of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1, (done.stdout, done.stderr[-5000:])
    return done.returncode, json.loads(lines[0]), done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: images and text, stop strings, several samples, own seeds, one
    row that must fail."""
    folder = tmp_path_factory.mktemp("verify")
    columns = ["custom_id", "prompt", "messages", "images", "sampling", "label"]
    sample = pq.read_table(OUT / "prompts-1.parquet", columns=columns)
    good = [row for row in sample.to_pylist() if not row["custom_id"].startswith("bad")]
    asked: list[dict[str, Any]] = [
        {"stop": ["3"]},
        {"n": 3},
        {"seed": 11},
        {"logprobs": True, "top_logprobs": 2},
    ]
    counts = [
        {
            "custom_id": f"count-{row}",
            "prompt": f"Count to {5 + row}.",
            "messages": None,
            "images": None,
            "sampling": json.dumps(asked[row % len(asked)]),
            "label": "",
        }
        for row in range(COUNTS)
    ]
    refused = {**counts[0], "custom_id": "refused", "sampling": json.dumps({"temperature": "hot"})}
    (folder / "in").mkdir()
    rows = [*good[:IMAGE_ROWS], *counts, refused]
    pq.write_table(pa.Table.from_pylist(rows, schema=sample.schema), folder / "in" / "a.parquet")
    config = {
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "seed": 20261125,
        "sampling": {"temperature": 0.7, "max_completion_tokens": 32},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"shard_rows": 8, "max_error_rate": 0.5},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    code, _, log = job("jobs.nightly", "--config", str(folder / "job.yaml"))
    assert code == 0, log[-5000:]
    return folder / "out"


def test_the_engines_counts_are_those_of_the_records_and_every_check_passes(out: Path) -> None:
    code, result, log = job("jobs.verify", str(out), "--audit-only")
    assert code == 0, log
    states = {name: check["state"] for name, check in result["checks"].items()}
    assert states.pop("replay") == "skipped"
    assert set(states.values()) == {"ok"}, log
    records = pq.read_table(out / "data")
    completed = records.filter(records.column("finish_reason").is_valid())
    for kind in ("prompt", "completion"):
        count = sum(completed.column(f"{kind}_tokens").to_pylist())
        assert f"{count:,} {kind}" in result["checks"]["engine_tokens"]["note"]


def test_every_record_is_the_same_when_it_is_generated_again(out: Path) -> None:
    code, result, log = job("jobs.verify", str(out), "--sample", "1000")
    assert code == 0, (result, log[-5000:])
    replay = result["replay"]
    records = IMAGE_ROWS + COUNTS + 2 * COUNTS // 4
    assert (replay["sampled"], replay["text_equal"], replay["token_equal"]) == (records,) * 3
    assert (replay["mismatches"], replay["environment"], replay["requests"]) == ([], [], [])
    verdict = json.loads((out / "_verify" / "verify.json").read_text())
    assert verdict["replay"]["sampled"] == records
    left = [path for path in (out / "_verify").rglob("*") if path.is_file()]
    assert left == [out / "_verify" / "verify.json"]
