"""What a plan says: the counted input, and from it tokens, time and money of the run.

In: a settled job, its survey and what the cluster lacks. Out: a ``Forecast``, as a document for
machines; ``forecast_table`` shows it to people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.settle import Job
from pipeline.errors import ErrorCode
from pipeline.lengths import OutputModel, Range
from pipeline.prices import Usage, money
from pipeline.remedies import REMEDIES
from pipeline.survey import Pick, Survey
from pipeline.walltime import WallTime, wall_time


@dataclass(frozen=True)
class Outlook:
    """The run, if it has so many completion tokens."""

    time: WallTime | None
    """None: the profile tells no rates."""
    money: Mapping[str, Any]
    """As ``prices.money`` gives it; ``cluster`` is null without a time."""


@dataclass(frozen=True)
class Forecast:
    """Everything a plan knows."""

    job: Job
    survey: Survey
    source: Mapping[str, object]
    """Where the completion tokens come from."""
    looked_into: int
    """Shards."""
    completion: Range
    """Tokens."""
    expected: Outlook
    low: Outlook
    high: Outlook
    lacking: Sequence[str] | None
    """What the cluster lacks for the replicas; None if nothing was asked of it."""

    @property
    def error_rate(self) -> float:
        """Share of bad rows."""
        rows = self.survey.rows
        return self.survey.total("bad").value / rows if rows else 0.0

    @property
    def verdict(self) -> str:
        """What to say if there are more bad rows than the config allows."""
        about = "" if self.survey.exact else "about "
        limit = self.job.config.limits.max_error_rate
        return (
            f"{about}{self.survey.total('bad').value:.0f} of {self.survey.rows} rows are bad "
            f"({self.error_rate:.1%}), above limits.max_error_rate = {limit:g}; mend them, or "
            "raise the limit: the run would end with exit code 3."
        )

    def to_json(self) -> dict[str, Any]:
        """The whole plan as one document; ``low`` and ``high`` hold with 95 % confidence."""
        survey, config, run = self.survey, self.job.config, self.job.run
        return {
            "name": config.name,
            "input": config.input.uri,
            "rows": {
                "total": survey.rows,
                "looked_at": survey.seen_rows,
                "bad": _rounded(survey.total("bad")),
            },
            "shards": {"total": len(run.plan.shards), "looked_into": self.looked_into},
            "pending": {
                "rows": sum(shard.rows for shard in run.pending),
                "shards": len(run.pending),
            },
            "exact": survey.exact,
            "error_rate": round(self.error_rate, 6),
            "max_error_rate": config.limits.max_error_rate,
            "errors": self.errors(),
            "completions": _rounded(survey.total("samples")),
            "images": _rounded(survey.total("images")),
            "tokens": {
                "prompt": _rounded(survey.total("prompt")),
                "image": _rounded(survey.total("image")),
                "completion": {
                    **_rounded(self.completion),
                    "most": round(survey.total("most").value),
                },
            },
            "completion_source": dict(self.source),
            "engine": self._engine(),
            "seconds": self._seconds(),
            "money": {
                "expected": self.expected.money,
                "low": self.low.money,
                "high": self.high.money,
            },
        }

    def errors(self) -> dict[str, dict[str, Any]]:
        """By code, the most frequent first: rows, an example, and what to do."""
        ordered = sorted(self.survey.errors.items(), key=lambda item: (-item[1], item[0]))
        return {
            code: {
                "rows": round(rows),
                "example": asdict(self.survey.examples[code]),
                "remedy": REMEDIES[ErrorCode(code)],
            }
            for code, rows in ordered
        }

    def _engine(self) -> dict[str, Any]:
        job = self.job
        rates = job.profile.rates
        return {
            "profile": job.config.engine.profile,
            "model": job.run.manifest["model"]["name"],
            "replicas": job.config.engine.most_replicas,
            "gpus_per_replica": job.profile.needs.gpus,
            "accelerator": job.profile.needs.accelerator,
            "rates": rates.model_dump(mode="json") if rates else None,
            "fits": None if self.lacking is None else not self.lacking,
            "lacking": list(self.lacking or ()),
        }

    def _seconds(self) -> dict[str, float] | None:
        expected, low, high = self.expected.time, self.low.time, self.high.time
        if expected is None or low is None or high is None:
            return None
        return {
            "load": round(expected.load_s, 1),
            "work": round(expected.work_s, 1),
            "tail": round(expected.tail_s, 1),
            "value": round(expected.total_s, 1),
            "low": round(low.total_s, 1),
            "high": round(high.total_s, 1),
        }


def make_forecast(
    job: Job,
    survey: Survey,
    output: OutputModel,
    picks: Sequence[Pick],
    lacking: Sequence[str] | None,
) -> Forecast:
    """What follows from a complete survey."""
    completion = survey.completion()
    return Forecast(
        job=job,
        survey=survey,
        source=output.describe(),
        looked_into=len(picks),
        completion=completion,
        expected=_outlook(job, survey, completion, "value"),
        low=_outlook(job, survey, completion, "low"),
        high=_outlook(job, survey, completion, "high"),
        lacking=lacking,
    )


def _outlook(job: Job, survey: Survey, completion: Range, end: str) -> Outlook:
    """Time and money at one end of all ranges."""
    tokens = {
        name: getattr(survey.total(name), end)
        for name in ("prompt", "prompt_once", "image_once", "images")
    }
    output: float = getattr(completion, end)
    rates, replicas = job.profile.rates, job.config.engine.most_replicas
    time = None
    if rates is not None:
        time = wall_time(
            rates,
            replicas,
            job.run.plan.shards,
            prompt_tokens=tokens["prompt"],
            completion_tokens=output,
        )
    usage = Usage(
        prompt_tokens=tokens["prompt_once"],
        image_tokens=tokens["image_once"],
        completion_tokens=output,
        images=tokens["images"],
        seconds=time.total_s if time else 0.0,
    )
    amounts = money(job.prices, job.profile, replicas, usage)
    return Outlook(time, amounts if time else {**amounts, "cluster": None})


def _rounded(found: Range) -> dict[str, int]:
    return {"value": round(found.value), "low": round(found.low), "high": round(found.high)}
