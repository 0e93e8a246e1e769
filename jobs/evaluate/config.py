"""The evaluation's configuration: nightly's, with tasks in place of an input.

In: YAML and overrides. Out: a frozen ``EvaluateConfig``; ``job`` makes the batch run's config of
it once the feed is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config import (
    EngineSection,
    InputSection,
    JobConfig,
    LimitsSection,
    OutputSection,
    Section,
)
from pipeline.dates import check_date, with_date

_NEUTRAL = {"generation_config": "vllm"}
"""lm-eval's parameters are whole: what it leaves out is not the model's to choose."""


class TaskSection(Section):
    """One task or group of lm-eval, its data, and how it is asked."""

    name: Annotated[str, Field(pattern=r"^[\w.:()-]+$")]
    """lm-eval's name of a task or group (mmlu, mmlu_pro, gsm8k), or one that ships here: digits,
    humaneval, humaneval_instruct."""
    data: Annotated[str | None, Field(min_length=1)] = None
    """Folder or file of the data set in its published layout; file://, s3://, gs://, a path. Null:
    what ships with the task (digits, humaneval)."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """First items of each (sub)task that are asked; null = all."""
    num_fewshot: Annotated[int | None, Field(ge=0)] = None
    """Worked examples before each question; null = the task's own number. As in lm-eval, a task
    that sets 0 itself keeps it."""
    chat: bool = False
    """Whether prompts go through the model's chat template: for instruct models."""
    fewshot_as_multiturn: bool = True
    """With chat, whether examples are turns of their own."""
    system: str | None = None
    """A system instruction before the task's own description."""
    generation: dict[str, Any] = Field(default={})
    """Replaces the task's generation parameters, in lm-eval's words: max_gen_toks (tokens), until,
    do_sample, temperature, top_p, ..."""
    metric: str | None = None
    """Which metric is the score, as metric or metric,filter; null = the task's first."""
    subject: str | None = None
    """Column of the data by which the score is broken down; null = by the group's tasks."""

    @model_validator(mode="after")
    def _check(self) -> TaskSection:
        if self.system is not None and not self.system.strip():
            raise ValueError("system is empty; leave it out")
        return self


class EvaluateConfig(Section):
    """One evaluation: some tasks, one engine."""

    name: Annotated[str, Field(min_length=1)] = "evaluate"
    """A name for people: logs and the reports show it."""
    date: Annotated[str | None, BeforeValidator(check_date)] = None
    """What {date} in output.uri stands for, YYYY-MM-DD; null = the UTC date when the config is
    loaded."""
    tasks: Annotated[list[TaskSection], Field(min_length=1)]
    """What is asked; each name once."""
    output: OutputSection
    """Where the run folder goes; the scores are put beside the records."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds of sampled completions are derived from it."""
    engine: EngineSection
    """Which engine, and how many of it."""
    limits: LimitsSection = LimitsSection()
    """Bounds on requests, images and errors."""

    @model_validator(mode="before")
    @classmethod
    def _put_date(cls, document: Any) -> Any:
        return with_date(document, ("output.uri",)) if isinstance(document, Mapping) else document

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        names = [task.name for task in self.tasks]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"tasks: {twice[0]} stands there twice")
        if self.output.carry is not None:
            raise ValueError("output.carry: is for Parquet input; a feed has nothing to carry")
        return self

    def job(self, feed: str) -> JobConfig:
        """The batch run whose input is ``feed``."""
        return JobConfig(
            name=self.name,
            date=self.date,
            input=InputSection(uri=feed),
            output=self.output,
            seed=self.seed,
            engine=self.engine.model_copy(
                update={"overrides": {**_NEUTRAL, **self.engine.overrides}}
            ),
            limits=self.limits,
        )
