"""``{date}`` in a config's URIs, and ``--resume-latest``: which day a run is of."""

import argparse
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.annotate.config import AnnotateConfig
from jobs.evaluate.config import EvaluateConfig
from jobs.latest import dated_folders, resume_latest
from jobs.nightly import nightly_parser, overrides
from pipeline.config import JobConfig, load_config, load_config_as
from pipeline.errors import ConfigError

DATED: dict[str, Any] = {
    "input": {"uri": "s3://b/in/date={date}/"},
    "output": {"uri": "s3://b/runs/{date}"},
    "images": {"roots": ["s3://b/photos/{date}", "s3://b/more"]},
    "engine": {"profile": "mini-maverick"},
}


def write(folder: Path, document: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_date_stands_in_every_uri_and_is_saved_with_the_run(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DATED), ["date=2026-11-22"])
    assert config.input.uri == "s3://b/in/date=2026-11-22/"
    assert config.output.uri == "s3://b/runs/2026-11-22"
    assert config.images.roots == ["s3://b/photos/2026-11-22", "s3://b/more"]
    assert config.model_dump(mode="json")["date"] == "2026-11-22"


def test_without_one_it_is_todays_in_utc(tmp_path: Path) -> None:
    before = datetime.now(UTC).date().isoformat()
    config = load_config(write(tmp_path, DATED))
    assert config.date in (before, datetime.now(UTC).date().isoformat())
    assert config.output.uri == f"s3://b/runs/{config.date}"


def test_a_list_of_inputs_and_several_places_in_one_uri_have_the_same_date(tmp_path: Path) -> None:
    document = {**DATED, "input": {"uri": ["a/{date}.jsonl", "b/{date}/{date}.jsonl"]}}
    config = load_config(write(tmp_path, document), ["date=2026-02-28"])
    assert config.input.uri == ["a/2026-02-28.jsonl", "b/2026-02-28/2026-02-28.jsonl"]


def test_a_config_without_a_place_for_it_has_no_date(tmp_path: Path) -> None:
    plain = {**DATED, "input": {"uri": "in"}, "output": {"uri": "out"}, "images": {}}
    config = load_config(write(tmp_path, plain))
    assert (config.date, config.output.uri) == (None, "out")


def test_other_braces_and_other_keys_stay_as_they_are(tmp_path: Path) -> None:
    document = {**DATED, "name": "{date}", "output": {"uri": "s3://b/{team}/{{date}}"}}
    config = load_config(write(tmp_path, document), ["date=2026-11-22", "sampling.stop=['{date}']"])
    assert config.output.uri == "s3://b/{team}/{2026-11-22}"
    assert (config.name, config.sampling.stop) == ("{date}", ["{date}"])


@pytest.mark.parametrize("braces", ["{Date}", "{ date }", "{date:%Y%m%d}", "{dates}"])
def test_what_is_nearly_a_date_is_refused_by_name(tmp_path: Path, braces: str) -> None:
    document = {**DATED, "output": {"uri": f"s3://b/{braces}"}}
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, document))
    assert f"key 'output.uri' = 's3://b/{braces}': {braces} is not known" in str(caught.value)


@pytest.mark.parametrize("text", ["yesterday", "2026-02-30", "22.11.2026", "2026-11-22T06:00"])
def test_a_date_that_is_no_day_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="date"):
        load_config(write(tmp_path, DATED), [f"date={text}"])


def test_a_saved_config_loads_as_it_was_run(tmp_path: Path) -> None:
    saved = load_config(write(tmp_path, DATED), ["date=2026-11-22"]).model_dump(mode="json")
    again = JobConfig.model_validate(saved)
    assert (again.date, again.output.uri) == ("2026-11-22", "s3://b/runs/2026-11-22")


def parsed(config: Path, *arguments: str) -> argparse.Namespace:
    return nightly_parser("tests").parse_args(["--config", str(config), *arguments])


def test_the_option_is_short_for_the_key(tmp_path: Path) -> None:
    arguments = parsed(write(tmp_path, DATED), "--set", "seed=7", "--date", "2026-11-22")
    assert overrides(arguments) == ["seed=7", "date=2026-11-22"]


@pytest.mark.parametrize("day", ["", "2026-13-45", "2026-02-29", "20261122", "tomorrow"])
def test_an_option_that_is_no_day_is_refused_by_its_name(tmp_path: Path, day: str) -> None:
    with pytest.raises(ConfigError, match=r"--date: .*day"):  # "": not today's, in silence
        parsed(write(tmp_path, DATED), "--date", day)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs of five days, of which the last is finished and two are not; and other folders."""
    for day, files in {
        "2026-11-18": ["run.json"],
        "2026-11-19": ["run.json", "_SUCCESS"],
        "2026-11-20": ["run.json"],
        "2026-11-21": ["_lease.json"],
        "2026-11-22": ["run.json", "_SUCCESS"],
        "2026-11-31": ["run.json"],
        "tests-2026-11-23": ["run.json"],
    }.items():
        (tmp_path / "runs" / day).mkdir(parents=True)
        for name in files:
            (tmp_path / "runs" / day / name).touch()
    return tmp_path / "runs"


def config_of(folder: Path, output_uri: str) -> Path:
    return write(folder, {**DATED, "output": {"uri": output_uri}})


def test_the_newest_unfinished_run_is_gone_on_with_as_of_its_own_day(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = config_of(tmp_path, f"{runs}/{{date}}")
    chosen = load_config(path, resume_latest(path, []))
    assert chosen.output.uri == f"{runs}/2026-11-20"
    assert chosen.input.uri == "s3://b/in/date=2026-11-20/"
    (line,) = [record.message for record in caplog.records]
    assert f"{runs}/2026-11-20 is the newest of 5 folders" in line


def test_if_none_is_unfinished_it_is_todays(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for day in ("2026-11-18", "2026-11-20"):
        (runs / day / "_SUCCESS").touch()
    path = config_of(tmp_path, f"{runs}/{{date}}")
    config = load_config(path, resume_latest(path, []))
    assert config.output.uri == f"{runs}/{config.date}"
    assert "none holds an unfinished run; today's is" in caplog.text


def test_runs_of_a_folder_that_is_not_there_yet_are_none(tmp_path: Path) -> None:
    assert dated_folders(f"{tmp_path}/nowhere/{{date}}") == []


def test_what_stands_around_the_date_has_to_be_the_same(runs: Path) -> None:
    found = dated_folders(f"{runs}/tests-{{date}}")
    assert [folder.uri for folder in found] == [f"file://{runs}/tests-2026-11-23"]
    (below,) = dated_folders(f"{runs}/tests-{{date}}/of-{{date}}/a")
    assert below.uri == f"file://{runs}/tests-2026-11-23/of-2026-11-23/a"


def test_a_dataset_killed_in_its_first_attempt_is_gone_on_with(runs: Path, tmp_path: Path) -> None:
    first = runs / "2026-11-21" / "_runs" / "attempt-0"  # the dataset has no run.json yet
    first.mkdir(parents=True)
    (first / "run.json").touch()
    task = {"prompt": "{{ text }}", "answer": {"schema": {"type": "string"}}}
    document = {**DATED, "output": {"uri": f"{runs}/{{date}}"}, "task": task}
    arguments = parsed(write(tmp_path, document), "--resume-latest")
    assert overrides(arguments, AnnotateConfig) == ["date=2026-11-21"]


def test_an_evaluation_has_a_date_too(runs: Path, tmp_path: Path) -> None:
    document = {
        "tasks": [{"name": "digits"}],
        "output": {"uri": f"{runs}/{{date}}"},
        "engine": {"profile": "mini-maverick"},
    }
    path = write(tmp_path, document)
    chosen = overrides(parsed(path, "--resume-latest"), EvaluateConfig)
    config = load_config_as(EvaluateConfig, path, chosen)
    assert (config.date, config.output.uri) == ("2026-11-20", f"{runs}/2026-11-20")
    assert config.job("feed.jsonl").date == "2026-11-20"


@pytest.mark.parametrize(
    ("output", "arguments", "words"),
    [
        ("RUNS/{date}", ["--date", "2026-11-22"], "leave out one of both"),
        ("RUNS/{date}", ["--new-run"], "--resume-latest or --new-run, not both"),
        ("RUNS/today", [], "has no {date}"),
        ("s3://{date}/runs", [], "bucket"),
        ("RUNS/{date}", ["--set", "sede=1"], "unknown key 'sede'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    runs: Path, tmp_path: Path, output: str, arguments: list[str], words: str
) -> None:
    path = config_of(tmp_path, output.replace("RUNS", str(runs)))
    with pytest.raises(ConfigError, match=words):
        overrides(parsed(path, "--resume-latest", *arguments))
