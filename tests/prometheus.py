"""A real Prometheus for tests: Debian's package `prometheus`, which holds promtool, too."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.ports import free_ports
from pipeline.metrics import PROCESS_LABELS, vocabulary

DASHBOARD = Path(__file__).parent.parent / "cluster" / "grafana" / "dashboard.json"
FOLDER = Path(__file__).parent.parent / "cluster" / "prometheus"
_START_S = 180.0
_ANSWER_S = 60.0
_SETTLE_S = 120.0
"""From the end of a process until its last values are scraped."""
_SPAN_S = 600.0
_RATE_INTERVAL = "20s"
"""What Grafana would put in: some scrapes."""
LABELS = frozenset(
    {
        *PROCESS_LABELS,
        *(label for metric in vocabulary() for label in metric.labels),
        *("le", "job", "instance"),  # Prometheus's
        *("Component", "NodeAddress", "SessionName", "Version", "WorkerId"),  # Ray's
        *("otel_scope_name", "otel_scope_version", "otel_scope_schema_url"),
        *("JobId", "NodeId", "RayNodeType", "ClusterId"),
    }
)
"""All that a series of this project may have."""


def program(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``; the test is skipped where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here; Debian's package prometheus has it")
    return found


def dashboard_queries() -> list[str]:
    """What the dashboard's panels ask, for all runs."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [
        query.replace("$run", ".*").replace("$__rate_interval", _RATE_INTERVAL) for query in queries
    ]


def alert_names() -> list[str]:
    """Of the shipped rules, in their order."""
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"]]


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    def settled(self, query: str, expected: Mapping[str, float]) -> dict[str, float]:
        """Values by the query's one label, once they are as expected, or will not be."""
        until = time.monotonic() + _SETTLE_S
        while True:
            result = self._get("query", query=query)["result"]
            found = {
                label: float(series["value"][1])
                for series in result
                for label in series["metric"].values()
            }
            if found == expected or time.monotonic() > until:
                return found
            time.sleep(0.5)

    def has_data(self, query: str) -> bool:
        """Whether a query, as a panel sends it, gives a number at any moment since the start."""
        now = time.time()
        span = {"start": str(now - _SPAN_S), "end": str(now), "step": "1"}
        result = self._get("query_range", query=query, **span)["result"]
        return any(
            math.isfinite(float(value)) for series in result for _, value in series["values"]
        )

    def rules(self) -> list[str]:
        """The names of the alerts, all of which could be evaluated."""
        rules = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        assert all(rule["health"] == "ok" for rule in rules), rules
        return [rule["name"] for rule in rules]

    def labels(self, selector: str) -> list[dict[str, str]]:
        """The labels of each series there has been."""
        found: list[dict[str, str]] = self._get("series", **{"match[]": selector})
        return found

    def answers(self) -> bool:
        """Whether it takes queries: it says 503 while it starts."""
        try:
            _open(f"{self.url}/-/ready").close()
        except OSError:
            return False
        return True

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with _open(url) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


def _open(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(url, timeout=_ANSWER_S)


@contextmanager
def running(folder: Path, targets: Path) -> Iterator[Prometheus]:
    """The shipped configuration, scraped every 2 s, for the nodes that ``targets`` lists."""
    command = program("prometheus")
    (port,) = free_ports(1)
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(FOLDER / "alerts.yaml")]
    (job,) = config["scrape_configs"]
    job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "2s"}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(_arguments(command, folder, port), stdout=log, stderr=log)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        until = time.monotonic() + _START_S
        while not found.answers():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.1)
        yield found
    finally:
        process.kill()
        process.wait()


def _arguments(command: str, folder: Path, port: int) -> Sequence[str]:
    return [
        command,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
