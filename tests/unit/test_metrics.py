"""The registry of metrics, and that dashboard, alerts and documents know no others."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from pipeline import metrics, storage
from pipeline.engine_stats import note_step
from pipeline.errors import StorageUnavailableError
from pipeline.metrics import REGISTRY, Kind, Metric, Sample, vocabulary
from tests.fakes import FinishedRequest, Step, StepLoad

ROOT = Path(__file__).parent.parent.parent
COUNTER = Metric(Kind.COUNTER, "test_counter", "", ("kind",))
GAUGE = Metric(Kind.GAUGE, "test_gauge", "")
HISTOGRAM = Metric(Kind.HISTOGRAM, "test_histogram", "", buckets=(1.0, 2.0))


def taken(*wanted: Metric) -> list[Sample]:
    return [sample for sample in REGISTRY.take() if sample.metric in wanted]


def test_counters_are_taken_as_increases_and_gauges_as_they_are() -> None:
    COUNTER.add(2, "a")
    COUNTER.add(3, "a")
    COUNTER.add(0, "b")
    GAUGE.set(7)
    GAUGE.set(5)
    assert taken(COUNTER, GAUGE) == [Sample(COUNTER, ("a",), 5.0), Sample(GAUGE, (), 5)]
    assert taken(COUNTER, GAUGE) == [Sample(GAUGE, (), 5)]


def test_a_histograms_bucket_holds_its_upper_end_and_the_last_all_above() -> None:
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 99.0):
        HISTOGRAM.observe(value)
    assert taken(HISTOGRAM) == [Sample(HISTOGRAM, (), counts=(2, 2, 2))]
    assert taken(HISTOGRAM) == []


def test_what_is_timed_is_observed_also_if_it_raises() -> None:
    with pytest.raises(ValueError), HISTOGRAM.timed():
        raise ValueError
    (sample,) = taken(HISTOGRAM)
    assert sum(sample.counts) == 1


def test_the_store_is_timed_by_operation(tmp_path: Path) -> None:
    REGISTRY.take()
    storage.put_bytes(f"file://{tmp_path}/a", b"a")
    storage.read_bytes(f"file://{tmp_path}/a")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"file://{tmp_path}/b")
    assert storage.exists(f"file://{tmp_path}/a")
    found = {sample.labels: sum(sample.counts) for sample in taken(metrics.STORE_SECONDS)}
    assert found == {("write",): 1, ("read",): 2, ("look",): 1}


def test_a_request_that_is_made_again_is_counted() -> None:
    REGISTRY.take()
    answers = iter((StorageUnavailableError("busy"), StorageUnavailableError("busy"), None))

    def ask() -> None:
        if (error := next(answers)) is not None:
            raise error

    storage.retrying(ask, what="read a")
    assert taken(metrics.STORE_RETRIES) == [Sample(metrics.STORE_RETRIES, (), 2.0)]


def test_a_step_of_vllm_is_counted_under_its_own_names() -> None:
    REGISTRY.take()
    ended = [FinishedRequest("stop", 2.0, 0.1, 0.02), FinishedRequest("length", 3.0, 0.2, 0.03)]
    note_step(StepLoad(60, 3, 1, 0.5, queries=100, hits=40), Step(7, 2, 50, [0.3], ended), "m", "0")
    note_step(StepLoad(9, 2, 1, 0.1, queries=10, hits=0), None, "m", "0")
    found = {
        (sample.metric.name, *sample.labels[2:]): sample.value or sum(sample.counts)
        for sample in REGISTRY.take()
        if sample.labels[:2] == ("m", "0")
    }
    assert found == {
        ("vllm_num_requests_running",): 9,
        ("vllm_num_requests_waiting",): 3,
        ("vllm_kv_cache_usage_perc",): 0.1,
        ("vllm_prefix_cache_queries",): 110,
        ("vllm_prefix_cache_hits",): 40,
        ("vllm_num_preemptions",): 2,
        ("vllm_prompt_tokens",): 7,
        ("vllm_generation_tokens",): 50,
        ("vllm_request_success", "stop"): 1,
        ("vllm_request_success", "length"): 1,
        ("vllm_e2e_request_latency_seconds",): 2,
        ("vllm_request_queue_time_seconds",): 2,
        ("vllm_time_to_first_token_seconds",): 1,
        ("vllm_request_time_per_output_token_seconds",): 2,
    }


def test_names_are_unique_and_fit_prometheus_and_histograms_have_rising_buckets() -> None:
    assert set(Counter(metric.name for metric in vocabulary()).values()) == {1}
    for metric in vocabulary():
        assert re.fullmatch(r"(maverick|vllm)_[a-z0-9_]+", metric.name)
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.buckets) == sorted({bucket for bucket in metric.buckets if bucket > 0})
        assert metric.help


def test_vllms_metrics_have_the_names_that_vllm_gives_them() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    theirs = {name.replace(":", "_") for name in re.findall(r'name="(vllm:\w+)"', source)}
    assert {m.name for m in vocabulary() if m.name.startswith("vllm_")} <= theirs


def series_in(text: str) -> set[str]:
    """Names of this project's series, without the suffixes of a histogram's."""
    found = re.findall(r"\b(?:ray_maverick_|vllm:)\w+", text)
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}


EXPORTED = {re.sub("^ray_vllm_", "vllm:", metric.exported_name) for metric in vocabulary()}


@pytest.mark.parametrize(
    "path",
    [
        "cluster/grafana/dashboard.json",
        "cluster/prometheus/alerts.yaml",
        "cluster/prometheus/alerts_test.yaml",
    ],
)
def test_dashboard_and_alerts_ask_for_metrics_that_there_are(path: str) -> None:
    asked = series_in((ROOT / path).read_text())
    assert asked
    assert asked <= EXPORTED


def test_the_documents_table_has_every_metric_and_its_labels() -> None:
    text = (ROOT / "docs" / "observe.md").read_text()
    rows = dict(re.findall(r"^\| `((?:ray_maverick_|vllm:)\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    for metric in vocabulary():
        name = re.sub("^ray_vllm_", "vllm:", metric.exported_name)
        assert rows.pop(name).split(", ")[0] == metric.kind, name
        own = ", ".join(f"`{label}`" for label in metric.labels if label not in ENGINE_LABELS)
        assert re.search(rf"^\| `{name}` \|[^|]*\| {own or '-'} \|", text, re.MULTILINE), name
    assert rows == {}


ENGINE_LABELS = ("model_name", "engine")


def test_every_panel_of_the_dashboard_says_what_it_shows() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["description"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
