"""The config of ``jobs.annotate``: the nightly job's, and a ``task``.

In: a YAML file. Out: a frozen ``AnnotateConfig``, or a ``ConfigError`` of one sentence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config import JobConfig
from pipeline.template import RequestTemplate, TemplateParts

_OURS = ("n", "response_format", "structured_outputs", "tools", "tool_choice", "seed")
"""Of ``sampling``, what the task says, or what would make every sample the same."""


class AnswerSection(BaseModel):
    """What an answer looks like: exactly one of schema, file, pydantic."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, serialize_by_alias=True
    )

    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """A JSON schema."""
    file: Annotated[str | None, Field(min_length=1)] = None
    """A file that holds one, JSON or YAML."""
    pydantic: Annotated[str | None, Field(pattern=r"^[\w.]+:\w+$")] = None
    """package.module:Model, a pydantic model below the working directory, which is imported: its
    schema is the answer's, and its validators have the last word."""
    form: Literal["json", "value"] = "json"
    """How the model writes it: as JSON, or (of one property with few values) the bare value, which
    takes fewer tokens and suits models that know no JSON."""

    @model_validator(mode="after")
    def _check(self) -> AnswerSection:
        if sum(each is not None for each in (self.schema_, self.file, self.pydantic)) != 1:
            raise ValueError("give exactly one of schema, file, pydantic")
        return self


class TaskSection(TemplateParts):
    """What each row is asked, and what an answer is."""

    answer: AnswerSection
    """What an answer looks like, and so which columns it becomes."""
    votes: Annotated[int, Field(ge=1, le=128)] = 1
    """Samples per row; the answer that most valid ones give is the row's."""
    retries: Annotated[int, Field(ge=0, le=10)] = 0
    """Further attempts, each with other seeds, at rows of which no sample is a valid answer."""
    prefix: Annotated[str, Field(pattern=r"^\w+$")] = "annotation_"
    """Before the name of an added column that the input has, too."""


class AnnotateConfig(JobConfig):
    """One annotated dataset."""

    name: Annotated[str, Field(min_length=1)] = "annotate"
    """A name for people: logs and the report show it."""
    task: TaskSection
    """What each row is asked, and what an answer is."""

    @model_validator(mode="after")
    def _check(self) -> AnnotateConfig:
        if self.input.template is not None:
            raise ValueError("say prompt, system, images and examples under task, not input")
        strange = [key for key in _OURS if getattr(self.sampling, key) is not None]
        if strange:
            raise ValueError(f"sampling.{strange[0]}: the task's answer and votes say that")
        several = "votes" if self.task.votes > 1 else "retries" if self.task.retries else None
        if several and self.sampling.temperature == 0:
            raise ValueError(
                f"task.{several} wants sampling.temperature above 0: at 0 each sample is the same"
            )
        return self

    @property
    def template(self) -> RequestTemplate:
        """How rows become requests. Where the input's ids are named, each row must have one."""
        parts = {name: getattr(self.task, name) for name in TemplateParts.model_fields}
        return RequestTemplate(**parts, requires_id="custom_id" in self.input.columns)
