"""What an annotation job refuses before anything is started or written, in one sentence."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.annotate.__main__ import annotate_job, annotate_parser
from jobs.annotate.config import AnnotateConfig
from pipeline.config import load_config_as
from pipeline.errors import ConfigError, UsageError
from pipeline.profile import REPO_ROOT

LABEL = {"type": "object", "properties": {"label": {"enum": ["a", "b"]}}}


def config(folder: Path, **task: Any) -> Path:
    (folder / "in").mkdir(exist_ok=True)
    table = pa.table({"text": ["x", None], "id": ["1", None]})
    pq.write_table(table, folder / "in" / "a.parquet")
    document = {
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "engine": {"profile": "mini-maverick-tp1"},
        "task": {"prompt": "{{ text }}", "answer": {"schema": LABEL}, **task},
    }
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def refusal(path: Path, *arguments: str) -> str:
    """Without --dry-run: refused in any case, before a write."""
    parsed = annotate_parser("test").parse_args(["--config", str(path), *arguments])
    with pytest.raises(UsageError) as raised:
        annotate_job(parsed)
    assert not (path.parent / "out").exists()
    return str(raised.value)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"promt": "x"}, "did you mean 'prompt'?"),
        ({"prompt": "{{ text"}, "prompt: line 1"),
        ({"prompt": "{{ txt }}"}, "did you mean 'text'?"),
        ({"images": ["photo"]}, "'photo'"),
        ({"answer": {}}, "exactly one of schema, file, pydantic"),
        (
            {"examples": [{"columns": {"text": "x"}, "answer": {"label": "c"}}]},
            "examples[0].answer",
        ),
        (
            {"examples": [{"columns": {"text": "x"}, "answer": {"label": "a"}, "images": ["/no"]}]},
            "image of the template's examples",
        ),
        ({"votes": 0}, "task.votes"),
    ],
)
def test_a_task_that_cannot_work_is_refused(
    tmp_path: Path, task: dict[str, Any], words: str
) -> None:
    path = config(tmp_path, **task)
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.n=3", "sampling.n"),
        ("input.template={prompt: '{{ text }}'}", "under task"),
        ("output.carry=[nothing]", "'nothing'"),
        ("input.columns={custom_id: nothing}", "'nothing'"),
    ],
)
def test_what_the_task_says_already_is_refused_elsewhere(
    tmp_path: Path, override: str, words: str
) -> None:
    assert words in refusal(config(tmp_path), "--set", override)


@pytest.mark.parametrize("key", ["votes", "retries"])
def test_several_samples_at_temperature_0_are_refused(tmp_path: Path, key: str) -> None:
    path = config(tmp_path, **{key: 2})
    assert f"task.{key}" in refusal(path, "--set", "sampling.temperature=0")


def test_invalid_answers_are_retried_by_the_task_alone(tmp_path: Path) -> None:
    assert "task.retries" in refusal(config(tmp_path), "--retry", "schema_violation")


def test_an_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    path = config(tmp_path)
    assert "lies inside" in refusal(path, "--set", f"output.uri={tmp_path}/in/out")


def test_an_output_in_the_folder_that_ray_uploads_is_refused(tmp_path: Path) -> None:
    path = config(tmp_path)
    uploaded = tmp_path / "working_dir_files" / "_ray_pkg_1" / "out"
    told = refusal(path, "--set", f"output.uri={uploaded}")
    assert "Ray deletes it after the job" in told
    assert not uploaded.parent.exists()


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    path = config(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": {}}))
    assert "not of an annotated dataset" in refusal(path, "--set", f"output.uri={run}")


def test_a_task_none_of_whose_first_rows_can_be_asked_fails_its_dry_run(tmp_path: Path) -> None:
    path = config(tmp_path, prompt="{{ text.nothing }}")
    assert "none of the first 2 rows" in refusal(path, "--dry-run")


@pytest.mark.parametrize("name", ["annotate-digits", "annotate-text"])
def test_the_shipped_tasks_parse(name: str) -> None:
    path = REPO_ROOT / "jobs" / "configs" / f"{name}.yaml"
    assert load_config_as(AnnotateConfig, path).task.answer.schema_


def test_an_unknown_section_of_the_task_names_the_file(tmp_path: Path) -> None:
    path = config(tmp_path)
    with pytest.raises(ConfigError, match=str(path)):
        load_config_as(AnnotateConfig, path, ["tsk=1"])
