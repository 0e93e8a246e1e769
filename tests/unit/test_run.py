"""Runs: what is written when, what may resume, and what is refused with the difference named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse_config
from pipeline.errors import RunMismatchError
from pipeline.profile import load_profile
from pipeline.read import open_input
from pipeline.run import Run, open_run, redacted


def settle(tmp_path: Path, **changes: Any) -> Run:
    document = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": "mini-maverick-tp1"},
        **changes,
    }
    config = parse_config(document, source="test")
    profile = load_profile(config.engine.profile, overrides=config.engine.overrides)
    found = open_input(config.input.uri, renamed={}, carry=config.output.carry)
    return open_run(config, profile, found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in" / "a.parquet")
    return tmp_path


def test_nothing_is_written_before_the_start(folder: Path) -> None:
    settle(folder)
    assert not (folder / "out").exists()


def test_a_started_run_is_found_again_with_its_saved_plan(folder: Path) -> None:
    first = settle(folder)
    first.start()
    again = settle(folder, limits={"shard_rows": 1})
    assert again.exists
    assert again.plan == first.plan
    assert again.pending == first.plan.shards


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 8}, "another seed: 0 there, 8 here"),
        ({"sampling": {"temperature": 0.5}}, "another sampling"),
        ({"output": {"uri": "OUT", "carry": []}}, "another output.carry"),
    ],
)
def test_a_changed_request_is_refused_with_what_differs(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    settle(folder).start()
    if "output" in changes:
        changes = {"output": {"uri": str(folder / "out"), "carry": []}}
    with pytest.raises(RunMismatchError, match=named):
        settle(folder, **changes)


def test_changed_input_is_refused(folder: Path) -> None:
    settle(folder).start()
    pq.write_table(pa.table({"prompt": ["a", "b", "c"]}), folder / "in" / "b.parquet")
    with pytest.raises(RunMismatchError, match="another input files"):
        settle(folder)


def test_cluster_changes_may_resume(folder: Path) -> None:
    settle(folder).start()
    changed = {"profile": "mini-maverick", "replicas": 2, "overrides": {"max_num_seqs": 8}}
    assert settle(folder, engine=changed).exists


def test_a_missing_part_takes_the_end_marker_away_until_it_is_back(folder: Path) -> None:
    run = settle(folder)
    run.start()
    run.mark_success()
    again = settle(folder)
    assert again.finished
    assert not again.complete
    again.start()
    assert not (folder / "out" / "_SUCCESS").exists()


def test_parts_without_a_manifest_are_not_taken_for_this_run(folder: Path) -> None:
    (folder / "out" / "data").mkdir(parents=True)
    (folder / "out" / "data" / "part-000000.parquet").write_bytes(b"x")
    with pytest.raises(RunMismatchError, match=r"holds data/ but no run\.json"):
        settle(folder)


def test_the_manifest_says_what_ran_and_holds_no_secret(folder: Path) -> None:
    settle(
        folder,
        engine={"profile": "mini-maverick-tp1", "overrides": {"hf_token": "planted-secret"}},
    ).start()
    text = (folder / "out" / "run.json").read_text()
    assert "planted-secret" not in text
    manifest = json.loads(text)
    assert manifest["model"]["name"] == "mini-maverick"
    assert manifest["model"]["revision"].startswith("sha256:")
    assert manifest["input"]["rows"] == 2
    assert {"ray", "engine", "transformers"} <= set(manifest["versions"])


def test_only_secret_names_are_redacted() -> None:
    document = {"api_key": "x", "a": [{"db_password": "y"}], "max_tokens": 5, "token": ""}
    assert redacted(document) == {
        "api_key": "***",
        "a": [{"db_password": "***"}],
        "max_tokens": 5,
        "token": "",
    }
