"""The evaluation's config and command line: what is wrong is refused at once, in one sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.evaluate.config import EvaluateConfig
from pipeline.config import load_config_as
from pipeline.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "tasks": [{"name": "digits", "chat": True}],
    "output": {"uri": "out"},
    "engine": {"profile": "mini-maverick"},
}


def load(tmp_path: Path, **changes: Any) -> EvaluateConfig:
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return load_config_as(EvaluateConfig, path)


def test_the_run_is_nightlys_with_the_feed_as_its_input(tmp_path: Path) -> None:
    config = load(tmp_path, seed=4, limits={"max_error_rate": 0.2})
    job = config.job("s3://b/run/_feed/x.jsonl")
    assert (job.input.uri, job.output.uri, job.seed) == ("s3://b/run/_feed/x.jsonl", "out", 4)
    assert (job.name, job.limits.max_error_rate) == ("evaluate", 0.2)
    assert job.sampling.model_dump(exclude_none=True) == {}  # tasks say how they sample
    assert job.engine.overrides == {"generation_config": "vllm"}  # and the model does not


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"name": "gsm8k", "shots": 5}]}, "unknown key 'tasks.0.shots'"),
        ({"tasks": [{"name": "gsm8k"}, {"name": "gsm8k"}]}, "gsm8k stands there twice"),
        ({"tasks": [{"name": "../gsm8k"}]}, "tasks.0.name"),
        ({"tasks": [{"name": "gsm8k", "limit": 0}]}, "tasks.0.limit"),
        ({"tasks": [{"name": "gsm8k", "system": " "}]}, "system is empty"),
        ({"output": {"uri": "out", "carry": ["a"]}}, "output.carry"),
        ({"input": {"uri": "in"}}, "unknown key 'input'"),
        ({"sampling": {"temperature": 1}}, "unknown key 'sampling'"),
    ],
)
def test_a_wrong_config_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, **changes)


def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_task_without_data_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    uri = str(tmp_path / "run")
    path.write_text(yaml.safe_dump({**MINIMAL, "output": {"uri": uri}}))
    code, result, stderr = run("--config", str(path), "--set", "tasks=[{name: gsm8k}]")
    assert (code, result["status"], result["run"]) == (2, "invalid", f"file://{uri}"), stderr
    assert "task gsm8k: data is missing" in result["error"]
    assert "openai/gsm8k" in result["error"]
    assert "Traceback" not in stderr
    code, result, stderr = run("--config", str(path), "--dry-run")
    assert (code, result["status"], result["pending_rows"]) == (0, "dry_run", 397), stderr
    assert result["requests"] == {"asked": 397, "distinct": 397, "saved": 0}
    assert not (tmp_path / "run").exists()


def test_help_names_the_leave_to_run_code_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, jobs.evaluate.__main__\n"
        "heavy = [m for m in ('ray', 'torch', 'vllm', 'lm_eval', 'datasets') if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--allow-code-execution" in done.stdout
    assert "exit codes" in done.stdout
