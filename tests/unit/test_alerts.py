"""The alert rules, by promtool: they parse, fire when they should, and have a runbook."""

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.prometheus import FOLDER, alert_names, program

ROOT = Path(__file__).parent.parent.parent


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, cwd=FOLDER, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yaml")


def test_alerts_fire_when_they_should_and_not_on_a_good_night() -> None:
    promtool("test", "rules", "alerts_test.yaml")


def test_every_alert_is_shown_to_fire_and_to_be_quiet() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(alert_names())
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(alert_names())


def test_every_alert_says_how_bad_it_is_and_has_a_paragraph_to_read() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "observe.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert "$labels.run" in rule["annotations"]["summary"]
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (page, anchor in anchors) == ("docs/observe.md", True), rule["alert"]
