"""A job's end: whose parts count, and a retry that has nothing to do."""

import json
from pathlib import Path

import pytest

from jobs.batch import run_batch
from jobs.settle import Options
from pipeline.config import load_config
from pipeline.errors import AccountingError
from pipeline.report import RunStatus
from tests.recorded_runs import make_run


def test_a_retry_of_nothing_starts_no_cluster_and_leaves_the_run_finished(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    config = load_config(tmp_path / "job.yaml")
    result = run_batch(config, Options(retry=frozenset({"timeout", "expired"})))
    assert (result.status, result.generated_rows) == (RunStatus.COMPLETE, 0)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_part_that_came_late_with_retried_records_is_no_success(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    manifest = json.loads((out / "run.json").read_text())
    manifest["retries"] = [{"what": ["invalid_messages"], "at": "2026-12-01T00:00:00+00:00"}]
    (out / "run.json").write_text(json.dumps(manifest))
    (out / "_SUCCESS").unlink()
    with pytest.raises(AccountingError, match=r"part-000000\.parquet has records that were to be"):
        run_batch(load_config(tmp_path / "job.yaml"), Options())
    assert not (out / "_SUCCESS").exists()
