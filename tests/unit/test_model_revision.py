"""Which model a run was made with: a branch of the hub is resolved once, and kept."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.profile import REPO_ROOT, is_commit, load_profile

FIRST, SECOND = "1" * 40, "2" * 40
MODEL = "maverick-batch-tests/mini"
SETTLE = """
import json, sys
from jobs.settle import Options, settle
from pipeline.config import load_config
from pipeline.engine import VLLMEngine

job = settle(load_config(sys.argv[1]), Options(), VLLMEngine)
job.run.start()
print(json.dumps([job.run.manifest["model"], job.profile.revision]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job whose model is a branch of the hub, and a cache of the hub's client that has it."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "in" / "a.parquet")
    source = REPO_ROOT / "cluster" / "engines" / "mini-maverick-tp1.yaml"
    profile = {**yaml.safe_load(source.read_text()), "model": MODEL, "revision": "main"}
    (tmp_path / "engine.yaml").write_text(yaml.safe_dump(profile))
    job = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": str(tmp_path / "engine.yaml")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


def put_branch(folder: Path, commit: str) -> None:
    cached = folder / "hf" / "hub" / f"models--{MODEL.replace('/', '--')}"
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (cached / "refs").mkdir(exist_ok=True)
    (cached / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")


NO_HUB = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
"""A hub that nobody reaches."""


def settled(folder: Path, **variables: str) -> tuple[dict[str, Any], str | None, str]:
    """The manifest's model, the revision engines load, and the log."""
    done = subprocess.run(
        [sys.executable, "-c", SETTLE, str(folder / "job.yaml")],
        cwd=REPO_ROOT,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    model, revision = json.loads(done.stdout)
    return model, revision, done.stderr


def test_a_branch_is_recorded_and_loaded_as_its_commit(folder: Path) -> None:
    put_branch(folder, FIRST)
    model, revision, _ = settled(folder)
    assert (model["name"], model["revision"], model["branch"]) == (MODEL, FIRST, "main")
    assert revision == FIRST
    manifest = json.loads((folder / "out" / "run.json").read_text())
    assert manifest["engine"]["revision"] == FIRST


def test_a_resume_keeps_the_commit_it_began_with_when_the_branch_has_moved(folder: Path) -> None:
    put_branch(folder, FIRST)
    settled(folder)
    put_branch(folder, SECOND)
    model, revision, _ = settled(folder)
    assert (model["revision"], revision) == (FIRST, FIRST)


def test_a_run_of_an_earlier_version_that_recorded_the_branch_resumes(folder: Path) -> None:
    model, revision, log = settled(folder)
    assert (model["revision"], revision) == ("main", "main")
    assert "is not known here" in log
    put_branch(folder, FIRST)
    assert settled(folder)[:2] == (model, "main")


def test_a_hub_that_cannot_be_reached_leaves_the_branch_and_says_so(folder: Path) -> None:
    model, revision, log = settled(folder, **NO_HUB)
    assert (model["revision"], revision) == ("main", "main")
    assert "is not known here (ConnectError)" in log


def test_preflight_says_that_the_hub_cannot_be_reached(folder: Path) -> None:
    code = (
        "from cluster.preflight.weight_files import look_at_weights\n"
        f"print(look_at_weights({MODEL!r}, 'main', needs_tensors=True, checksums=False).problems)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO_ROOT,
        env={**os.environ, "HF_HOME": str(folder / "hf"), **NO_HUB},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "the hub cannot be reached from there (ConnectError)" in done.stdout, done.stderr


def test_a_commit_stays_as_it_is_and_asks_nobody(caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.model import model_revision

    with caplog.at_level(logging.WARNING):
        assert model_revision("maverick-batch-tests/none", FIRST) == FIRST
    assert not caplog.records
    assert is_commit(FIRST)
    assert not is_commit("main")
    assert load_profile("mini-maverick-tp1").at("sha256:5").revision is None
