"""From answers to scores: lm-eval's metrics, our intervals, subjects, items, and the pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from jobs.evaluate import page
from jobs.evaluate.answers import Answer
from jobs.evaluate.config import TaskSection
from jobs.evaluate.feed import Request
from jobs.evaluate.feed_lm import FeedLM
from jobs.evaluate.harness import load
from jobs.evaluate.published import PUBLISHED
from jobs.evaluate.scores import CONFIDENCE, Score, interval_of, score
from pipeline.errors import ConfigError
from pipeline.model import ModelSpec, PromptFormat, load_prompt_format
from tests import quiz

Give = Callable[[Request, int], Answer]


@pytest.fixture(scope="module")
def prompts() -> PromptFormat:
    return load_prompt_format(ModelSpec("cluster/models/mini-maverick", None, 4096))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    quiz.write_arc(folder)
    quiz.write_gsm8k(folder)
    return folder


def scored(
    section: Mapping[str, Any], give: Give, prompts: PromptFormat, *, code_allowed: bool = False
) -> Score:
    benchmark = load(TaskSection(**section))
    return score(benchmark, FeedLM(prompts, give), code_allowed=code_allowed)


def text_of(request: Request) -> str:
    return bytes(i for i in request.body["prompt"] if i < 256).decode()


def solve(request: Request, _last: int) -> Answer:
    """A word problem's right answer, but for Leo's."""
    question = text_of(request).rsplit("Question: ", 1)[1]
    numbers = [int(word) for word in question.replace("?", "").split() if word.isdigit()]
    first, second, third = numbers
    total = (first + second) * third if "times as" in question else first * second - third
    return Answer([f" It is so.\n#### {total if 'Leo' not in question else -1}"])


@pytest.mark.parametrize(("right", "items"), [(0, 7), (7, 7), (385, 397), (1, 2)])
def test_the_interval_of_a_share_is_wilsons(right: int, items: int) -> None:
    values = [1.0] * right + [0.0] * (items - right)
    found = interval_of(right / items, values, 0.1)
    reference = binomtest(right, items).proportion_ci(CONFIDENCE, method="wilson")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert found.method == "Wilson"


def test_other_scores_have_a_normal_interval_or_none() -> None:
    found = interval_of(0.5, [0.25, 0.75], 0.1)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert found.method == "normal, from lm-eval's standard error"
    assert interval_of(0.9, [1.0, 0.0], None) is None  # a weighted mean is no share
    assert interval_of(0.9, [], None) is None
    assert interval_of(0.9, [], float("nan")) is None


def test_generations_are_scored_by_lm_eval(data: Path, prompts: PromptFormat) -> None:
    section = {"name": "gsm8k", "data": str(data), "num_fewshot": 1, "limit": 60}
    found = scored(section, solve, prompts)
    leos = sum(
        "Leo" in row["question"]
        for row in pq.read_table(data / "main" / "test-00000-of-00001.parquet").to_pylist()[:60]
    )
    assert 0 < leos < 60
    assert found.main is not None
    assert found.main.name == "exact_match,strict-match"
    assert found.main.value == pytest.approx(1 - leos / 60)
    assert (found.items, found.few_shot, found.reason) == (60, 1, None)
    assert [m.name for m in found.metrics] == [
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    ]
    rows = found.rows.to_pylist()
    assert len(rows) == 120  # two filters
    assert {len(row["requests"]) for row in rows} == {1}
    wrong = [row for row in rows if row["score.exact_match"] == 0]
    assert all("-1" in row["responses"] for row in wrong)


def test_a_metric_can_be_chosen_and_a_wrong_one_is_refused(
    data: Path, prompts: PromptFormat
) -> None:
    section = {"name": "gsm8k", "data": str(data), "num_fewshot": 0, "limit": 3}
    chosen = scored({**section, "metric": "exact_match,flexible-extract"}, solve, prompts)
    assert chosen.main is not None
    assert chosen.main.name == "exact_match,flexible-extract"
    for metric in ("bleu", "exact_match,loose"):
        with pytest.raises(ConfigError, match=f"metric '{metric}' is none of exact_match, with"):
            load(TaskSection(**section, metric=metric))


def test_choices_are_judged_by_likelihood_and_broken_down_by_subject(
    data: Path, prompts: PromptFormat
) -> None:
    def prefer_a(_request: Request, last: int) -> Answer:
        """Short continuations are likelier."""
        return Answer(["!"], [(-1.0, 1)] * last)

    section = {"name": "arc_easy", "data": str(data), "limit": 50, "subject": "answerKey"}
    found = scored(section, prefer_a, prompts)
    assert [m.name for m in found.metrics] == ["acc,none", "acc_norm,none"]
    assert sum(subject.items for subject in found.subjects) == 50
    assert [subject.name for subject in found.subjects] == ["A", "B", "C", "D"]
    assert found.main is not None
    weighted = sum(subject.value * subject.items for subject in found.subjects)
    assert weighted / 50 == pytest.approx(found.main.value)
    assert {len(row["requests"]) for row in found.rows.to_pylist()} == {4}


def test_a_group_is_one_score_with_a_row_per_task(tmp_path: Path, prompts: PromptFormat) -> None:
    subsets = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra")
    for number, subset in enumerate((*subsets, "number_theory", "prealgebra", "precalculus")):
        (tmp_path / subset).mkdir()
        rows = [
            {"problem": f"{subset} {i}", "solution": r"So \boxed{4}."} for i in range(number + 1)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / subset / "test.parquet")

    def four_in_algebra(request: Request, _last: int) -> Answer:
        return Answer(["$4$" if "algebra" in text_of(request) else "$5$"])

    found = scored({"name": "hendrycks_math", "data": str(tmp_path)}, four_in_algebra, prompts)
    assert found.main is not None
    assert found.main.value == pytest.approx((1 + 4 + 6) / 28)  # weighted by size
    assert found.main.interval is not None
    assert (found.main.items, found.main.interval.method) == (28, "Wilson")
    assert [subject.items for subject in found.subjects] == [1, 2, 3, 4, 5, 6, 7]
    assert [subject.value for subject in found.subjects] == [1, 0, 0, 1, 0, 1, 0]
    assert found.published == PUBLISHED["hendrycks_math"]


def test_choices_that_lack_a_likelihood_give_no_score(data: Path, prompts: PromptFormat) -> None:
    section = {"name": "arc_easy", "data": str(data), "limit": 4}
    found = scored(section, lambda _request, _last: Answer([None]), prompts)
    assert found.main is None
    assert found.unanswered == 16
    assert "16 of its requests have no answer" in str(found.reason)
    assert "--retry errored,expired" in str(found.reason)


def test_missing_generations_are_wrong_and_counted(data: Path, prompts: PromptFormat) -> None:
    section = {"name": "gsm8k", "data": str(data), "num_fewshot": 0, "limit": 5}
    found = scored(section, lambda _request, _last: Answer([None]), prompts)
    assert found.main is not None
    assert (found.main.value, found.unanswered) == (0.0, 5)


def test_code_is_not_run_without_leave_and_its_completions_are_kept(
    prompts: PromptFormat,
) -> None:
    def write(_request: Request, _last: int) -> Answer:
        return Answer(["    return None\n"])

    found = scored({"name": "humaneval", "limit": 2}, write, prompts)
    assert found.main is None
    assert "--allow-code-execution" in str(found.reason)
    assert [json.loads(row["responses"]) for row in found.rows.to_pylist()] == [
        ["    return None\n"]
    ] * 2
    allowed = scored({"name": "humaneval", "limit": 2}, write, prompts, code_allowed=True)
    assert allowed.main is not None
    assert (allowed.main.name, allowed.main.value) == ("pass@1,run", 0.0)
    assert allowed.published == PUBLISHED["humaneval"]


def test_published_scores_say_of_which_model_they_are() -> None:
    assert {name: score.percent for name, score in PUBLISHED.items() if "_" not in name} == {
        "mmlu": 85.5,
        "humaneval": 86.0,
        "chartqa": 90.0,
        "docvqa": 94.4,
    }
    assert (PUBLISHED["mmlu_pro"].percent, PUBLISHED["mmlu_pro"].model) == (80.5, "instruct")
    assert (PUBLISHED["mmlu"].model, PUBLISHED["mmlu"].settings) == ("base", "5-shot")
    assert PUBLISHED["hendrycks_math"].percent == 73.5
    assert {score.model for score in PUBLISHED.values()} == {"base", "instruct", "not stated"}


def test_the_evaluation_is_written_beside_the_run(
    data: Path, prompts: PromptFormat, tmp_path: Path
) -> None:
    scores = [
        scored({"name": "gsm8k", "data": str(data), "num_fewshot": 0, "limit": 9}, solve, prompts),
        scored({"name": "humaneval", "limit": 2}, lambda _request, _last: Answer(["x"]), prompts),
    ]
    document = {
        "name": "night & day",
        "run": str(tmp_path),
        "finished_at": "2026-11-25T00:00:00+00:00",
        "model": {"name": "m", "revision": "r"},
        "versions": {"lm-eval": "0.4.13"},
        "requests": {"asked": 11, "distinct": 11, "saved": 0},
        "tasks": [{**s.to_json(), "items_file": page.items_uri(str(tmp_path), s)} for s in scores],
    }
    page.write(str(tmp_path), document, scores)
    page.show(scores)
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    first, second = stored["tasks"]
    assert first["confidence"]["method"] == "Wilson"
    assert first["settings"]["few_shot"] == 0
    assert (second["score"], second["published"]["percent"]) == (None, 86.0)
    assert pq.read_table(tmp_path / "items" / "gsm8k.parquet").num_rows == 18
    html = (tmp_path / "evaluation.html").read_text()
    assert "night &amp; day" in html
    assert "allow that with --allow-code-execution" in html
    assert "<script" not in html
    assert "http" not in html.replace("https://", "")
