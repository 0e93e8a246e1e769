"""Run folders of earlier versions go on: they are resumed, retried, reported and verified.

``tests/data/runs/`` holds folders as commit 4fb1002 (2026-11-30) wrote them, below ``s3://old/``:
``finished``, ``half`` (a part, and half of the other shard's journal), ``retried`` (reopened for
``invalid_messages``), ``lines`` and ``half-lines`` (of JSONL), ``template`` (half, of a template).
Each has 2 files of 12 rows, as tests/recorded_runs.py makes them. Versions of objects in a store
follow from their content, so that the input is the planned one wherever it lies.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.batch import run_batch
from jobs.settle import Job, Options, settle
from jobs.verify.audit import audit
from jobs.verify.checks import State
from jobs.verify.recorded import open_recorded
from pipeline.commit import commit_outcomes
from pipeline.config import JobConfig, parse_config
from pipeline.engine import VLLMEngine
from pipeline.errors import RunMismatchError
from pipeline.journal import Journal
from pipeline.model import model_revision
from pipeline.profile import load_profile, locate_model
from pipeline.report import RunStatus
from tests import recorded_runs
from tests.fake_s3 import FakeS3, fake_s3

FOLDERS = Path(__file__).parents[1] / "data" / "runs"
ROWS = {"total": 24, "succeeded": 21, "errored": 3, "expired": 0, "cancelled": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeS3]:
    with fake_s3() as server:
        server.buckets.add("old")
        yield server


@pytest.fixture(autouse=True)
def old_runs(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """All folders as they were, but for the revision of a model that may be trained anew."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server.objects.clear()
    profile = load_profile("mini-maverick-tp1")
    revision = model_revision(locate_model(profile.model), profile.revision)
    for path in FOLDERS.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "run.json":
                manifest = json.loads(content)
                manifest["model"]["revision"] = revision
                content = json.dumps(manifest).encode()
            server.objects[f"old/{path.relative_to(FOLDERS)}"] = content


def config(name: str, **changes: Any) -> JobConfig:
    document = json.loads((FOLDERS / name / "job.json").read_bytes())
    return parse_config({**document, **changes}, source="test")


def job(name: str) -> Job:
    return settle(config(name), Options(), VLLMEngine)


def finish(name: str) -> Job:
    """Make what is left of a half-done run, taking over what its journal has."""
    begun = job(name)
    (shard,) = begun.run.pending
    known = {outcome.key: outcome for outcome in Journal(begun.to, shard).read()}
    assert len(known) == 4
    rows = range(shard.rows)
    made = [each for row in rows for each in recorded_runs._outcomes(shard, row)]
    outcomes = list({**{outcome.key: outcome for outcome in made}, **known}.values())
    carried = recorded_runs._carried(shard, jsonl=shard.uri.endswith(".jsonl"))
    commit_outcomes(begun.to, shard, outcomes, carried, known=known)
    return begun


@pytest.mark.parametrize("name", ["finished", "lines"])
def test_a_finished_run_is_found_finished_and_sound(name: str, server: FakeS3) -> None:
    before = dict(server.objects)
    result = run_batch(config(name), Options())
    assert (result.status, result.generated_rows) == (RunStatus.COMPLETE, 0)
    assert server.objects == before
    found = audit(open_recorded(f"s3://old/{name}/out"))
    assert [check.name for check in found.checks if check.state is State.FAULT] == []
    assert found.totals.rows == {key: ROWS[key] for key in found.totals.rows}


@pytest.mark.parametrize("name", ["half", "half-lines", "template"])
def test_a_half_done_run_goes_on_from_its_part_and_its_journal(name: str, server: FakeS3) -> None:
    finish(name)
    result = run_batch(config(name), Options())
    assert (result.status, result.generated_rows) == (RunStatus.COMPLETE, 0)
    report = json.loads(server.objects[f"old/{name}/out/report.json"])
    assert report["rows"] == ROWS
    assert f"old/{name}/out/_SUCCESS" in server.objects
    assert not any("_journal" in key for key in server.objects if key.startswith(f"old/{name}/"))


def test_a_run_that_was_retried_has_the_other_records_in_its_journal() -> None:
    begun = job("retried")
    assert begun.run.done == frozenset()
    known = [o for shard in begun.run.pending for o in Journal(begun.to, shard).read()]
    assert len(known) == 26 - 2
    retried = begun.run.retry({"duplicate_custom_id"}, ())
    left = [o for shard in retried.pending for o in Journal(retried.to, shard).read()]
    assert len(left) == len(known) - 1
    assert job("retried").run.to == retried.to


def test_a_change_of_an_older_run_is_named() -> None:
    changed = config("half", sampling={"temperature": 0.5, "max_completion_tokens": 65})
    with pytest.raises(
        RunMismatchError, match=r"run with another sampling\.max_completion_tokens: 64 there, 65 he"
    ):
        settle(changed, Options(), VLLMEngine)
