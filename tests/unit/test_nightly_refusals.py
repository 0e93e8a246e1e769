"""What a user can get wrong is refused with exit 2 and one sentence, before anything starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.lease import Lease


def run(tmp_path: Path, document: object, *arguments: str) -> tuple[int, dict[str, Any], str]:
    path = tmp_path / "broken.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # nobody listens there
        "AWS_ACCESS_KEY_ID": "planted-access",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
    }
    done = subprocess.run(
        [sys.executable, "-m", "jobs.nightly", "--config", str(path), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=250,
    )
    (line,) = done.stdout.splitlines()
    assert "planted" not in done.stdout + done.stderr
    return done.returncode, json.loads(line), done.stderr


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "in").mkdir()
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "run.json").touch()
    for folder in ("in", "run/data"):
        pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / folder / "a.parquet")
    return {
        "input": {"uri": f"{tmp_path}/in"},
        "output": {"uri": f"{tmp_path}/out"},
        "engine": {"profile": "mini-maverick"},
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sede": 1}, "unknown key 'sede'; did you mean 'seed'?"),
        ({"input": {"uri": "/nowhere/at/all"}}, "input.uri /nowhere/at/all: there is no file"),
        ({"input": {"uri": "s3://bucket/prompts/"}}, "s3://bucket/prompts/: the bucket cannot be"),
        ({"output": {"uri": "s3://bucket/out"}}, "s3://bucket/out: the bucket cannot be reached"),
        ({"output": {"uri": "TMP/in/out"}}, "lies inside input.uri"),
        (
            {"input": {"uri": "TMP/in/a.parquet"}, "output": {"uri": "TMP/in"}},
            "is the folder of input.uri",
        ),
        (
            {"input": {"uri": "TMP/run/data/a.parquet"}, "output": {"uri": "TMP/run/data/out"}},
            "lies among the parts of the run at file://TMP/run",
        ),
        ({"output": {"uri": "s3://"}}, "s3://: names no bucket"),
        ({"output": {"uri": "TMP/broken.yaml/x"}}, "is a file, not a folder"),
        ({"engine": {"profile": "mini-mavrick"}}, "did you mean 'mini-maverick'?"),
        (
            {"engine": {"profile": "mini-maverick", "overrides": {"max_num_sqs": 1}}},
            "vLLM has no engine argument 'max_num_sqs'; did you mean 'max_num_seqs'?",
        ),
    ],
)
def test_a_wrong_config_is_one_clear_sentence(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    document = yaml.safe_load(yaml.safe_dump({**good, **change}).replace("TMP", str(tmp_path)))
    code, result, stderr = run(tmp_path, document)
    assert (code, result["status"], result["exit_code"]) == (2, "invalid", 2)
    assert words.replace("TMP", str(tmp_path)) in result["error"]
    assert result["error"] in stderr
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert not (tmp_path / "out").exists()


def test_an_output_beside_a_single_input_file_is_fine(tmp_path: Path, good: dict[str, Any]) -> None:
    beside = {"input": {"uri": f"{tmp_path}/in/a.parquet"}, "output": {"uri": f"{tmp_path}/in/out"}}
    code, result, stderr = run(tmp_path, {**good, **beside}, "--dry-run")
    assert (code, result["rows"]["total"]) == (0, 1), stderr


def test_a_dry_run_tells_which_files_of_the_input_it_leaves_out(
    tmp_path: Path, good: dict[str, Any]
) -> None:
    (tmp_path / "in" / "b.parquet.gz").write_bytes(b"?")
    code, result, stderr = run(tmp_path, good, "--dry-run")
    (left_out,) = result["left_out"]
    assert (code, left_out["files"]) == (0, 1)
    assert left_out["examples"] == [f"file://{tmp_path}/in/b.parquet.gz"]
    assert f"1 file left out (file://{tmp_path}/in/b.parquet.gz): they are compressed" in stderr


def test_a_wrong_argument_is_told_in_the_same_form(tmp_path: Path, good: dict[str, Any]) -> None:
    code, result, _ = run(tmp_path, good, "--foo")
    assert (code, result["status"]) == (2, "invalid")
    assert "unrecognized arguments: --foo" in result["error"]


def test_a_ray_address_without_a_cluster_is_refused_in_seconds(
    tmp_path: Path, good: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, result, _ = run(tmp_path, good)
    assert (code, result["status"]) == (2, "invalid")
    assert "RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there" in result["error"]
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_driver_has_is_refused_before_a_cluster_is_asked(
    tmp_path: Path, good: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # no cluster: who gets there is told that
    uri = f"file://{tmp_path}/out"
    with Lease.acquire(uri, wait=False, renewal_s=0.2):
        code, result, stderr = run(tmp_path, good)
        waiting, waited, _ = run(tmp_path, good, "--wait")
    assert (code, result["status"], result["run"]) == (1, "failed", uri), stderr
    assert f"is being run by another driver (host {socket.gethostname()}" in result["error"]
    assert (waiting, waited["run"]) == (2, uri)
    assert "RAY_ADDRESS" in waited["error"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_lease.json"]


@pytest.fixture
def finished(tmp_path: Path, good: dict[str, Any]) -> dict[str, Any]:
    """A finished run of an input without rows, which takes no cluster."""
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "in" / "a.parquet")
    code, _, stderr = run(tmp_path, good)
    assert code == 0, stderr
    return good


def test_a_change_accepted_for_a_finished_run_is_told_to_change_nothing(
    tmp_path: Path, finished: dict[str, Any]
) -> None:
    manifest = tmp_path / "out" / "run.json"
    before = manifest.read_bytes()
    change = ("--set", "seed=8", "--accept-changed", "seed")
    for retry in ((), ("--retry", "expired")):  # which finds nothing to do again
        code, _, stderr = run(tmp_path, finished, *change, *retry)
        assert code == 0, stderr
        assert "--accept-changed changes nothing" in stderr
        assert manifest.read_bytes() == before


@pytest.mark.parametrize("left", [[], ["readme.txt"], ["b.parquet"]])
def test_an_input_that_was_emptied_under_its_run_is_told_as_that(
    tmp_path: Path, finished: dict[str, Any], left: list[str]
) -> None:
    (tmp_path / "in" / "a.parquet").unlink()
    for name in left:
        (tmp_path / "in" / name).write_text("no Parquet")
    code, result, _ = run(tmp_path, finished)
    assert (code, result["status"]) == (2, "invalid")
    assert f"the run in file://{tmp_path}/out was planned for: 1 file gone" in result["error"]
    assert f"{tmp_path}/in/a.parquet" in result["error"]
    code, result, _ = run(tmp_path, finished, "--new-run")
    assert (code, "planned for" in result["error"]) == (2, False)


def test_an_unreadable_input_beside_the_runs_own_is_named_itself(
    tmp_path: Path, finished: dict[str, Any]
) -> None:
    (tmp_path / "in" / "b.parquet").write_text("no Parquet")
    code, result, _ = run(tmp_path, finished)
    assert code == 2
    assert "b.parquet: is not a readable Parquet file" in result["error"]


@pytest.mark.parametrize(("cap", "tokens"), [(None, 87), (4, 27), (1, 7)])
def test_a_dry_run_tells_what_an_image_costs_under_the_tile_cap(
    tmp_path: Path, good: dict[str, Any], cap: int | None, tokens: int
) -> None:
    overrides = {} if cap is None else {"mm_processor_kwargs": {"max_patches": cap}}
    document = {**good, "engine": {"profile": "mini-maverick", "overrides": overrides}}
    code, result, stderr = run(tmp_path, document, "--dry-run")
    assert (code, result["status"], result["image_tokens_max"]) == (0, "dry_run", tokens), stderr
    assert f"an image takes at most {tokens} prompt tokens" in stderr
    assert "mm_processor_kwargs.max_patches lowers that" in stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    code, result, _ = run(tmp_path, "", "--config", "nowhere.yaml")
    assert code == 2
    assert "nowhere.yaml: no such config file" in result["error"]


def test_help_teaches_and_neither_it_nor_a_refusal_imports_the_heavy_libraries() -> None:
    code = (
        "import sys, jobs.nightly\n"
        "heavy = [m for m in ('ray', 'torch', 'vllm', 'transformers') if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "jobs.nightly", "--help"], capture_output=True, text=True, check=True
    )
    assert "exit codes" in done.stdout
    assert "ray job submit" in done.stdout
