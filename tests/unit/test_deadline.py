"""limits.deadline: times with a zone and durations, and nothing else."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from pipeline.config import parse_config
from pipeline.deadline import resolve_deadline
from pipeline.errors import ConfigError

STARTED = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)


def configured(deadline: Any) -> str | None:
    document = {
        "input": {"uri": "in"},
        "output": {"uri": "out"},
        "engine": {"profile": "mini-maverick"},
        "limits": {"deadline": deadline},
    }
    return parse_config(document, source="test").limits.deadline


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("45s", STARTED + timedelta(seconds=45)),
        ("90m", STARTED + timedelta(minutes=90)),
        ("1.5h", STARTED + timedelta(minutes=90)),
        ("2d", STARTED + timedelta(days=2)),
        ("2026-11-23T06:00Z", datetime(2026, 11, 23, 6, 0, tzinfo=UTC)),
        ("2026-11-23T06:00+02:00", datetime(2026, 11, 23, 4, 0, tzinfo=UTC)),
    ],
)
def test_times_and_durations(text: str, moment: datetime) -> None:
    assert resolve_deadline(text, started=STARTED) == moment
    assert configured(text) == text


def test_a_time_that_yaml_has_parsed_is_kept() -> None:
    parsed = yaml.safe_load("deadline: 2026-11-23 06:00:00Z")["deadline"]
    text = configured(parsed)
    assert text is not None
    assert resolve_deadline(text, started=STARTED) == datetime(2026, 11, 23, 6, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    "day", ["2026-11-23", yaml.safe_load("2026-11-23")], ids=["text", "as YAML parses it"]
)
def test_a_day_is_refused_for_its_missing_time(day: Any) -> None:
    with pytest.raises(ConfigError, match=r"limits\.deadline.*2026-11-23 is a day without a time"):
        configured(day)


@pytest.mark.parametrize("text", ["soon", "6", 6, "2026-11-23T06:00", "-5m", ""])
def test_anything_else_is_refused_with_what_is_expected(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"limits\.deadline.*a duration"):
        configured(text)
