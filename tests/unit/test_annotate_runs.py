"""What an annotation's attempts are as batch runs."""

from typing import Any

import pytest

from jobs.annotate.answer import settle_answer
from jobs.annotate.attempts import Feed
from jobs.annotate.config import AnnotateConfig
from jobs.annotate.runs import first_config, later_config
from pipeline.config import JobConfig


def config(**changes: Any) -> AnnotateConfig:
    document = {
        "input": {"uri": "s3://in/rows/", "columns": {"custom_id": "id"}},
        "output": {"uri": "s3://out/labels"},
        "engine": {"profile": "smollm2", "replicas": 3},
        "seed": 7,
        "task": {
            "prompt": "{{ text }}",
            "votes": 5,
            "retries": 1,
            "answer": {"schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
        },
        **changes,
    }
    return AnnotateConfig.model_validate(document)


def first(given: AnnotateConfig) -> JobConfig:
    return first_config(given, settle_answer(given.task.answer))


def test_the_first_attempt_is_a_run_over_the_input_by_the_task() -> None:
    run = first(config(sampling={"temperature": 0.5}))
    assert run.output.uri == "s3://out/labels/_runs/attempt-0"
    assert run.input.uri == "s3://in/rows/"
    assert run.input.template is not None
    assert (run.input.template.prompt, run.input.template.requires_id) == ("{{ text }}", True)
    assert (run.sampling.n, run.sampling.temperature) == (5, 0.5)
    assert run.sampling.structure is not None
    assert (run.seed, run.engine.replicas, run.output.carry) == (7, 3, [])


def test_a_run_as_its_manifest_has_it_is_the_same_config() -> None:
    run = first(config())
    assert JobConfig.model_validate(run.model_dump(mode="json")) == run


def test_a_later_attempt_has_other_seeds_and_reads_the_input_s_images() -> None:
    given = config()
    runs = [
        later_config(given, first(given), Feed(k, f"attempt-{k}-x", {}), "s3://in/rows")
        for k in (1, 2)
    ]
    assert len({7, *(run.seed for run in runs)}) == 3
    assert runs[0].input.uri == "s3://out/labels/_feed/attempt-1"
    assert runs[0].output.uri == "s3://out/labels/_runs/attempt-1-x"
    assert runs[0].images.roots == ["s3://in"]
    assert runs[0].limits.max_error_rate == 1.0
    local = later_config(given, first(given), Feed(1, "r", {}), "file:///data/rows")
    assert local.images.roots == ["file:///data/rows"]


@pytest.mark.parametrize(("retries", "borne"), [(0, 0.01), (1, 0.1)])
def test_more_errors_are_borne_if_there_are_attempts_to_come(retries: int, borne: float) -> None:
    task = {**config().task.model_dump(mode="json"), "retries": retries}
    assert first(config(task=task)).limits.max_error_rate == pytest.approx(borne)


def test_a_deadline_is_one_moment_for_all_attempts() -> None:
    given = config(limits={"deadline": "6h"})
    run = first(given)
    assert run.limits.deadline is not None
    assert run.limits.deadline.startswith("20")
    later = later_config(given, run, Feed(1, "r", {}), "s3://in/rows")
    assert later.limits.deadline == run.limits.deadline
