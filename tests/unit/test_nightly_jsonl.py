"""How a run of batch JSONL ends, with its parts there already: no Ray, no engine is started."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from jobs.settle import Options, describe, settle
from pipeline.commit import Destination, commit_outcomes
from pipeline.config import load_config
from pipeline.engine import VLLMEngine
from pipeline.profile import load_profile
from pipeline.read import open_input
from pipeline.records import Completion
from pipeline.run import open_run


def nightly(config: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.nightly", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def completion(row: int) -> Completion:
    return Completion(row, f"id-{row}", 0, "Hi.", "stop", 3, 1, 0, 0, 1, 0.1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    document = {
        "input": {"uri": [f"{tmp_path}/in/*.jsonl"]},
        "output": {"uri": f"{tmp_path}/out"},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"shard_rows": 4},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "job.yaml"


def commit_all(config_path: Path) -> None:
    """Start the run and commit its parts, as replicas would."""
    config = load_config(config_path)
    found = open_input(config.input.uri, renamed={}, carry=None)
    run = open_run(config, load_profile(config.engine.profile), found)
    run.start()
    for shard in run.plan.shards:
        rows = range(shard.first_row, shard.first_row + shard.rows)
        urls = pa.table({"url": ["/v1/completions"] * shard.rows})
        to = Destination(run.uri, run.id, "mini-maverick")
        commit_outcomes(to, shard, [completion(row) for row in rows], urls)


def state(out: Path) -> dict[str, tuple[bytes, int]]:
    paths = [path for path in out.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_openais_files_come_with_the_end_marker_and_are_then_left_alone(config: Path) -> None:
    out = config.parent / "out"
    (config.parent / "in" / "a.jsonl").write_text("{}\n" * 10)
    commit_all(config)
    (out / "errors.jsonl").write_text("of an earlier start, before --retry")
    assert nightly(config)["rows"]["succeeded"] == 10
    lines = (out / "output.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [f"id-{row}" for row in range(10)]
    assert (out / "errors.jsonl").read_bytes() == b""
    assert (out / "_SUCCESS").exists()

    before = state(out)
    assert nightly(config)["generated_rows"] == 0
    assert state(out) == before

    (out / "_SUCCESS").unlink()
    (out / "output.jsonl").write_text("half")
    nightly(config)
    again = (out / "output.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in again] == [json.loads(line)["id"] for line in lines]


@pytest.mark.parametrize("content", [b"", b"\r\n\r\n"])
def test_a_batch_without_lines_ends_with_empty_files(config: Path, content: bytes) -> None:
    (config.parent / "in" / "a.jsonl").write_bytes(content)
    assert nightly(config)["rows"]["total"] == 0
    assert (config.parent / "out" / "output.jsonl").read_bytes() == b""
    assert (config.parent / "out" / "errors.jsonl").read_bytes() == b""
    assert (config.parent / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize("limit", [None, 100])
def test_a_dry_run_says_how_long_lines_without_a_limit_may_get(
    config: Path, caplog: pytest.LogCaptureFixture, limit: int | None
) -> None:
    (config.parent / "in" / "a.jsonl").write_text("{}\n")
    job = settle(
        load_config(config, [f"sampling.max_completion_tokens={limit}"] if limit else []),
        Options(dry_run=True),
        VLLMEngine,
    )
    with caplog.at_level(logging.INFO):
        describe(job)
    said = "lines without max_tokens may go on to the end of the context (max_model_len, "
    assert any(said in each.getMessage() for each in caplog.records) is (limit is None)
