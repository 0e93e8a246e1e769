"""lm-eval's results -> scores with confidence intervals, by subject, and a row per item.

In: a ``Benchmark`` and the ``LM`` that has the answers. Out: a ``Score``. The score itself, like
any other metric, is lm-eval's; intervals, the table by subject and the bookkeeping of what was not
answered are added here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from jobs.evaluate.config import TaskSection
from jobs.evaluate.feed_lm import FeedLM
from jobs.evaluate.harness import Benchmark
from jobs.evaluate.published import PUBLISHED, Published
from jobs.evaluate.sandbox import SandboxError

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution's middle 95 %
_NOT_ALLOWED = "scoring it runs model-written code; allow that with --allow-code-execution"
_MAX_ANSWER = 20_000  # characters of an item's answer and target in the items' file


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of a score, and how it was made."""

    low: float
    high: float
    method: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric over some items."""

    name: str
    """metric,filter; of a subject, its name."""
    value: float
    items: int
    interval: Interval | None
    """None: the metric has no standard error, or there is one item only."""


@dataclass(frozen=True)
class Score:
    """What came of one benchmark."""

    section: TaskSection
    few_shot: int | None
    """Worked examples; None: its tasks differ."""
    items: int
    main: Measured | None
    """None: ``reason`` says why there is no score."""
    reason: str | None
    metrics: Sequence[Measured]
    subjects: Sequence[Measured]
    unanswered: int
    """Requests whose records did not succeed."""
    truncated: int
    """Requests whose prompt was cut on the left to fit into the context."""
    published: Published | None
    rows: pa.Table = field(repr=False)
    """One per item and filter."""

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json has it; ``rows`` go into a file of their own."""
        return {
            "task": self.section.name,
            "score": self.main.value if self.main else None,
            "metric": self.main.name if self.main else None,
            "reason": self.reason,
            "items": self.items,
            "confidence": _interval_json(self.main),
            "published": self.published.to_json() if self.published else None,
            "settings": {
                "few_shot": self.few_shot,
                **self.section.model_dump(mode="json", exclude={"name", "metric", "num_fewshot"}),
            },
            "metrics": [_measured_json(measured) for measured in self.metrics],
            "subjects": [_measured_json(measured) for measured in self.subjects],
            "unanswered_requests": self.unanswered,
            "truncated_prompts": self.truncated,
        }


def _measured_json(measured: Measured) -> dict[str, Any]:
    return {
        "name": measured.name,
        "score": measured.value,
        "items": measured.items,
        "confidence": _interval_json(measured),
    }


def _interval_json(measured: Measured | None) -> dict[str, Any] | None:
    if measured is None or measured.interval is None:
        return None
    return {"level": CONFIDENCE, **asdict(measured.interval)}


def score(benchmark: Benchmark, lm: FeedLM, *, code_allowed: bool) -> Score:
    """Score a benchmark from the answers of ``lm``.

    Args:
        benchmark: loaded and asked.
        lm: with the answers.
        code_allowed: whether model-written code may be run (in the sandbox).
    """
    if benchmark.runs_code and not code_allowed:
        benchmark.ask(lm)
        return _without_score(benchmark, lm, _NOT_ALLOWED)
    try:
        results = benchmark.score(lm)
    except SandboxError as error:
        return _without_score(benchmark, lm, str(error))
    rows = _item_rows(benchmark, results["samples"], lm)
    reason = _doubt(benchmark, lm)
    if reason is not None:
        return _score(benchmark, lm, _table(rows), reason)
    head = results["results"].get(benchmark.section.name) or {}
    key = _main_key(head, benchmark.section)
    if key is None:
        return _score(benchmark, lm, _table(rows), "lm-eval's results have no such metric")
    metrics = [_measured(name, head, _values(rows, name), name) for name in _keys(head)]
    return _score(
        benchmark,
        lm,
        _table(rows),
        None,
        main=next(measured for measured in metrics if measured.name == key),
        metrics=metrics,
        subjects=_by_subject(benchmark, results, rows, key),
    )


def _without_score(benchmark: Benchmark, lm: FeedLM, reason: str) -> Score:
    rows = [
        {
            "task": name,
            "item": instance.doc_id,
            "filter": None,
            "requests": lm.asked[name, instance.doc_id or 0],
            "responses": _text(instance.resps),
            "answer": None,
            "target": _text(task.doc_to_target(instance.doc)),
            "subject": _subject(benchmark, name, instance.doc),
            "scores": {},
        }
        for name, task in benchmark.tasks.items()
        for instance in task.instances
    ]
    return _score(benchmark, lm, _table(rows), reason)


def _doubt(benchmark: Benchmark, lm: FeedLM) -> str | None:
    """Why lm-eval's score does not hold: a choice among likelihoods that lack some is no choice.

    A generation that is missing is an empty answer, which is wrong.
    """
    lacking = sum(
        lm.unanswered[name]
        for name, task in benchmark.tasks.items()
        if task.OUTPUT_TYPE != "generate_until"
    )
    if not lacking:
        return None
    return (
        f"{lacking} of its requests have no answer, and without them no choice can be judged; see "
        "errors in report.json, then --retry errored,expired"
    )


def _score(
    benchmark: Benchmark,
    lm: FeedLM,
    rows: pa.Table,
    reason: str | None,
    *,
    main: Measured | None = None,
    metrics: Sequence[Measured] = (),
    subjects: Sequence[Measured] = (),
) -> Score:
    shots = {task.get_config("num_fewshot") for task in benchmark.tasks.values()}
    return Score(
        section=benchmark.section,
        few_shot=shots.pop() if len(shots) == 1 else None,
        items=len(set(zip(rows["task"].to_pylist(), rows["item"].to_pylist(), strict=True))),
        main=main,
        reason=reason,
        metrics=metrics,
        subjects=subjects,
        unanswered=sum(lm.unanswered[name] for name in benchmark.tasks),
        truncated=sum(lm.truncated[name] for name in benchmark.tasks),
        published=PUBLISHED.get(benchmark.section.name),
        rows=rows,
    )


def _keys(head: Mapping[str, Any]) -> list[str]:
    """The metrics of a result: ``metric,filter`` keys with a number."""
    return [
        key
        for key, value in head.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]


def _main_key(head: Mapping[str, Any], section: TaskSection) -> str | None:
    """Which metric is the score: the config's, else what a published one is of, else the first."""
    keys = _keys(head)
    published = PUBLISHED.get(section.name)
    wanted = section.metric or (published.metric if published else None)
    fitting = [key for key in keys if wanted in (key, key.split(",")[0])]
    candidates = fitting or ([] if section.metric else keys)
    return candidates[0] if candidates else None


def _measured(key: str, head: Mapping[str, Any], values: Sequence[float], name: str) -> Measured:
    """A metric of lm-eval's, with its interval."""
    metric, _, chosen = key.partition(",")
    value = float(head[key])
    error = head.get(f"{metric}_stderr,{chosen}")
    interval = interval_of(value, values, error if isinstance(error, int | float) else None)
    return Measured(name, value, int(head.get("sample_len") or len(values)), interval)


def interval_of(
    value: float, values: Sequence[float], standard_error: float | None
) -> Interval | None:
    """The 95 % interval of a score.

    Wilson's (E. B. Wilson, 1927) where the score is the share of items that are right; else the
    normal approximation from lm-eval's standard error, if there is one.
    """
    count = len(values)
    is_share = count > 0 and set(values) <= {0.0, 1.0}
    if is_share and math.isclose(value, sum(values) / count, abs_tol=1e-9):
        z2 = _Z**2
        centre = (value + z2 / (2 * count)) / (1 + z2 / count)
        spread = _Z * math.sqrt(value * (1 - value) / count + z2 / (4 * count**2))
        half = spread / (1 + z2 / count)
        return Interval(max(0.0, centre - half), min(1.0, centre + half), "Wilson")
    if standard_error is None or math.isnan(standard_error):
        return None
    half = _Z * standard_error
    return Interval(value - half, value + half, "normal, from lm-eval's standard error")


def _item_rows(
    benchmark: Benchmark, samples: Mapping[str, Sequence[Mapping[str, Any]]], lm: FeedLM
) -> list[dict[str, Any]]:
    return [
        {
            "task": name,
            "item": sample["doc_id"],
            "filter": sample["filter"],
            "requests": lm.asked[name, sample["doc_id"]],
            "prompt_hash": sample["prompt_hash"],
            "responses": _text(sample["resps"]),
            "answer": _text(sample["filtered_resps"]),
            "target": _text(sample["target"]),
            "subject": _subject(benchmark, name, sample["doc"]),
            "scores": {metric: _number(sample[metric]) for metric in sample["metrics"]},
        }
        for name, found in samples.items()
        for sample in found
    ]


def _subject(benchmark: Benchmark, task: str, doc: Mapping[str, Any]) -> str:
    """What an item is counted under."""
    column = benchmark.section.subject
    if column is not None:
        return str(doc.get(column))
    return str(benchmark.tasks[task].get_config("task_alias") or task)


def _by_subject(
    benchmark: Benchmark, results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], key: str
) -> list[Measured]:
    if benchmark.section.subject is None:
        if len(benchmark.tasks) == 1:
            return []
        return [
            _measured(
                key,
                results["results"][name],
                _values([row for row in rows if row["task"] == name], key),
                str(task.get_config("task_alias") or name),
            )
            for name, task in benchmark.tasks.items()
            if key in results["results"][name]
        ]
    subjects = sorted({row["subject"] for row in rows})
    measured = []
    for subject in subjects:
        values = _values([row for row in rows if row["subject"] == subject], key)
        if values:
            mean = sum(values) / len(values)
            interval = interval_of(mean, values, _standard_error(values))
            measured.append(Measured(subject, mean, len(values), interval))
    return measured


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _values(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Each item's value of a metric; none at all if one item's is no number."""
    metric, _, chosen = key.partition(",")
    values = [
        row["scores"].get(metric)
        for row in rows
        if row["filter"] == chosen and metric in row["scores"]
    ]
    return [] if None in values else [float(value) for value in values]


def _number(value: Any) -> float | None:
    """An item's metric as a number; None where lm-eval keeps a tuple until it aggregates."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _text(value: Any) -> str:
    """Something of lm-eval's as text: strings as they are, else JSON."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text[:_MAX_ANSWER].encode("utf-8", "backslashreplace").decode()


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows with a column ``score.<metric>`` per metric."""
    metrics = sorted({metric for row in rows for metric in row["scores"]})
    schema = pa.schema(
        [
            ("task", pa.string()),
            ("item", pa.int64()),
            ("subject", pa.string()),
            ("filter", pa.string()),
            ("requests", pa.list_(pa.string())),
            ("prompt_hash", pa.string()),
            ("responses", pa.string()),
            ("answer", pa.string()),
            ("target", pa.string()),
            *((f"score.{metric}", pa.float64()) for metric in metrics),
        ]
    )
    flat = [
        {**row, **{f"score.{metric}": value for metric, value in row["scores"].items()}}
        for row in rows
    ]
    return pa.Table.from_pylist(flat, schema=schema)
