"""Configs: every shipped one parses, and a wrong one is refused with a sentence that helps."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from jobs.evaluate.config import EvaluateConfig
from pipeline.config import JobConfig, load_config, load_config_as
from pipeline.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "input": {"uri": "in/"},
    "output": {"uri": "out/"},
    "engine": {"profile": "mini-maverick"},
}
TASKS = sorted(Path("jobs/configs").glob("annotate-*.yaml"))
SHIPPED = sorted(set(Path("jobs/configs").glob("*.yaml")) - set(TASKS))


def write(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_parses(path: Path) -> None:
    kind: type[BaseModel] = EvaluateConfig if path.name.startswith("evaluate") else JobConfig
    assert isinstance(load_config_as(kind, path), kind)


def test_a_minimal_config_gets_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.engine.replicas, config.limits.max_error_rate) == (1, 0.01)


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        (None, "samplin", "sampling"),
        ("engine", "replica", "replicas"),
        ("limits", "max_error_rat", "max_error_rate"),
        ("sampling", "temprature", "temperature"),
    ],
)
def test_an_unknown_key_names_the_key_and_the_nearest_valid_one(
    tmp_path: Path, section: str | None, key: str, nearest: str
) -> None:
    document: dict[str, Any] = {**MINIMAL}
    if section is None:
        document[key] = {}
        where = key
    else:
        document[section] = {**document.get(section, {}), key: 1}
        where = f"{section}.{key}"
    with pytest.raises(ConfigError, match=rf"unknown key '{where}'; did you mean '{nearest}'\?"):
        load_config(write(tmp_path, document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": {"profile": "x", "replicas": 0}}, "engine.replicas' = 0"),
        ({"engine": {"profile": "x", "replicas": "auto"}}, "replicas' = 'auto': must be a number"),
        ({"engine": {"profile": "x", "replicas": True}}, "or a range such as {min: 1, max: 8}"),
        (
            {"engine": {"profile": "x", "replicas": {"min": 3, "max": 2}}},
            "max = 2 is below min = 3",
        ),
        (
            {"engine": {"profile": "x", "replicas": {"min": 1, "max": 2, "most": 2}}},
            "replicas.most",
        ),
        ({"seed": -1}, "'seed' = -1"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature' = 'hot'"),
        ({"input": {}}, "'input.uri' is missing"),
        ({"input": {"uri": ""}}, "'input.uri' = '': must be a URI or a path, or a list"),
        ({"input": {"uri": []}}, r"'input.uri' = \[\]: must be"),
        ({"input": {"uri": ["a", 5]}}, r"'input.uri' = \['a', 5\]: must be"),
    ],
)
def test_a_wrong_value_names_key_and_value(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, {**MINIMAL, **change}))


def test_an_input_may_be_a_list(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["input.uri=[a.jsonl, s3://b/c.jsonl]"])
    assert config.input.uri == ["a.jsonl", "s3://b/c.jsonl"]


def test_set_overrides_nested_values_and_leaves_the_rest(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL),
        ["engine.replicas=3", "limits.max_error_rate=0.5", "output.carry=[label]"],
    )
    assert config.engine.replicas == 3
    assert config.engine.profile == "mini-maverick"
    assert config.limits.max_error_rate == 0.5
    assert config.output.carry == ["label"]


def test_a_value_with_a_number_sign_is_taken_whole(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["output.uri=/runs/a #1"])
    assert config.output.uri == "/runs/a #1"


@pytest.mark.parametrize("override", ["engine.replicas", "=3", "engine..replicas=3", "a.b=[1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text", ""])
def test_what_is_not_a_yaml_mapping_is_refused_by_file_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(path)


def test_a_missing_config_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load_config("nowhere.yaml")


def test_replicas_are_a_number_or_a_range(tmp_path: Path) -> None:
    fixed = load_config(write(tmp_path, MINIMAL), ["engine.replicas=3"]).engine
    assert (fixed.fewest_replicas, fixed.most_replicas) == (3, 3)
    ranged = load_config(write(tmp_path, MINIMAL), ["engine.replicas={min: 2, max: 8}"]).engine
    assert (ranged.fewest_replicas, ranged.most_replicas) == (2, 8)
