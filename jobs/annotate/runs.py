"""The attempts' runs: what the nightly job's config is for each of them.

In: an ``AnnotateConfig``. Out: a ``JobConfig`` per attempt: the task as input template, structure
and number of samples; the rest is as in the job's own config.
"""

from __future__ import annotations

from datetime import UTC, datetime

from jobs.annotate.answer import Answer
from jobs.annotate.attempts import FIRST_RUN, ID_COLUMN, ROW_COLUMN, Feed, feed_folder, run_uri
from jobs.annotate.config import AnnotateConfig
from pipeline.config import JobConfig, LimitsSection
from pipeline.deadline import resolve_deadline
from pipeline.sampling import SamplingDefaults
from pipeline.seeds import derive_seed


def first_config(config: AnnotateConfig, answer: Answer) -> JobConfig:
    """Attempt 0: a run over the input itself.

    With attempts to come, more errors are borne before the run is stopped: as many as would leave
    ``max_error_rate`` if attempts failed independently of each other.
    """
    task, limits = config.task, config.limits
    borne = limits.max_error_rate ** (1 / (task.retries + 1))
    votes = {"n": task.votes} if task.votes > 1 else {}
    asked = {**config.sampling.model_dump(exclude_none=True), **answer.parameters, **votes}
    changed = {
        "input": config.input.model_copy(update={"template": config.template}),
        "output": config.output.model_copy(
            update={"uri": run_uri(config.output.uri, FIRST_RUN), "carry": []}
        ),
        "sampling": SamplingDefaults.model_validate(asked),
        "limits": limits.model_copy(update={"max_error_rate": borne, "deadline": _until(limits)}),
    }
    same = {name: getattr(config, name) for name in JobConfig.model_fields}
    return JobConfig(**{**same, **changed})


def later_config(config: AnnotateConfig, first: JobConfig, feed: Feed, root: str) -> JobConfig:
    """A further attempt: over its feed, with other seeds; errors do not stop it.

    ``root`` is the folder of the input, whose images the feed may name.
    """
    uri = config.output.uri
    readable = [*config.images.roots, _bucket(root)]
    return first.model_copy(
        update={
            "input": first.input.model_copy(
                update={
                    "uri": feed_folder(uri, feed.number),
                    "columns": {"custom_id": ID_COLUMN},
                }
            ),
            "output": first.output.model_copy(
                update={"uri": run_uri(uri, feed.run), "carry": [ROW_COLUMN]}
            ),
            "seed": derive_seed(config.seed, "annotate attempt", feed.number),
            "images": config.images.model_copy(update={"roots": readable}),
            "limits": first.limits.model_copy(update={"max_error_rate": 1.0}),
        }
    )


def _bucket(root: str) -> str:
    """What rows of the input may read images from: its bucket, or its local folder."""
    scheme, _, path = root.partition("://")
    return root if scheme == "file" else f"{scheme}://{path.split('/', 1)[0]}"


def _until(limits: LimitsSection) -> str | None:
    """A deadline so long after the start, as a time: each attempt would count anew."""
    if limits.deadline is None:
        return None
    return resolve_deadline(limits.deadline, started=datetime.now(UTC)).isoformat()
