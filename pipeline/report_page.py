"""report.html: report.json for people, as one page without scripts that loads nothing.

In: the document of report.json. Out: HTML. Every number on the page is a value of the document, and
says which: the element around it has the value's path as ``data-path`` and the value itself as
``value``. Texts that users wrote are escaped, and what has no glyph or turns the writing direction
is shown as an escape.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline import formats
from pipeline.charts import Span, TimeAxis, latency_chart, length_chart, throughput_chart
from pipeline.heat_map import FULL, heat_row

SHOWN_REPLICAS = 64
"""Lanes on the page; report.json has all."""
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
_FORMATS: Mapping[str, Callable[[Any], str]] = {
    "integer": formats.integer,
    "compact": formats.compact,
    "rate": formats.rate,
    "duration": formats.duration,
    "latency": formats.latency,
    "percent": formats.percent,
}


@dataclass(frozen=True, slots=True)
class _Verdict:
    """The page's first words."""

    tone: str
    """``good``, ``mixed`` or ``bad``."""
    word: str
    sentence: str


def render_page(document: Mapping[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("pipeline", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        visible=visible, moment=_moment, at=formats.moment, quoted=shlex.quote, **_FORMATS
    )
    environment.globals["shown"] = lambda path, form="integer": _shown(document, path, form)
    axis = TimeAxis(document["throughput"])
    return environment.get_template("report.html.jinja").render(
        report=document,
        verdict=_verdict(document),
        not_done=_not_done(document),
        amount=formats.amount,
        by_message=_by_message,
        throughput=throughput_chart(document["throughput"], axis),
        latency=latency_chart(document["latency_s"]["histogram"]),
        prompts=length_chart(document["prompt_lengths"], "rows"),
        completions=length_chart(document["completion_lengths"], "completions"),
        lanes=_lanes(document["replicas"], axis),
        axis=axis,
        bins=_bins(document["throughput"]),
        heat=[heat_row(layer["tokens"]) for layer in (document["experts"] or {}).get("layers", ())],
        heat_full=FULL,
    )


def visible(text: object) -> str:
    """``text`` with escapes for what cannot be seen, or changes how its surroundings are read."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


def _moment(iso: str) -> str:
    return formats.moment(formats.epoch(iso))


def _value(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[int(key) if isinstance(document, Sequence) else key]
    return document


def _shown(document: Mapping[str, Any], path: str, form: str) -> Markup:
    value = _value(document, path)
    return Markup('<data data-path="{}" value="{}">{}</data>').format(
        path, "" if value is None else value, _FORMATS[form](value)
    )


def _not_done(document: Mapping[str, Any]) -> int:
    rows = document["rows"]
    return int(rows["total"] - sum(count for state, count in rows.items() if state != "total"))


def _verdict(document: Mapping[str, Any]) -> _Verdict:
    rows, status = document["rows"], document["status"]
    error = document.get("error", "")
    failed = rows["errored"] + rows["expired"] + rows["cancelled"]
    if status == "interrupted":
        return _Verdict(
            "mixed", "Interrupted", "What is finished is kept; the same command resumes."
        )
    if status == "over_error_rate":
        limit = document["made_with"]["max_error_rate"]
        above = "" if limit is None else f" than the limit of {formats.percent(limit)} allows"
        stopped = " The run was stopped early; the same command resumes." if error else ""
        return _Verdict("bad", "Too many errors", f"More rows failed{above}.{stopped}")
    if status != "complete":
        return _Verdict("bad", "Failed", "What is committed is kept; the same command resumes.")
    if rows["expired"]:
        return _Verdict("mixed", "Past its deadline", "Rows that were not reached in time expired.")
    if not rows["total"]:
        return _Verdict("good", "Complete", "The input had no rows.")
    if failed:
        return _Verdict(
            "mixed", "Complete, with errors", "Every row is accounted for; some failed."
        )
    return _Verdict("good", "Complete", "Every row succeeded.")


def _lanes(replicas: Sequence[Mapping[str, Any]], axis: TimeAxis) -> list[tuple[int, list[Span]]]:
    """The replicas to show, by their place in report.json, with when they were at work."""
    busiest = sorted(range(len(replicas)), key=lambda number: -replicas[number]["rows"])
    return [(number, _spans(replicas[number], axis)) for number in sorted(busiest[:SHOWN_REPLICAS])]


def _spans(replica: Mapping[str, Any], axis: TimeAxis) -> list[Span]:
    spans = []
    for first, last in replica["stretches"]:
        left, right = axis.at(formats.epoch(first)), axis.at(formats.epoch(last))
        length = formats.duration(formats.epoch(last) - formats.epoch(first))
        spans.append(Span(left, right - left, f"{_moment(first)} to {_moment(last)} ({length})"))
    return spans


def _by_message(examples: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int]]]:
    """Each message once, with the numbers of the examples that have it."""
    found: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        found.setdefault(example["message"], []).append(number)
    return list(found.items())


def _bins(throughput: Mapping[str, Any]) -> list[tuple[float, str, str]]:
    """Of each bin its start, and the paths of its rows and tokens."""
    return [
        (
            formats.epoch(stretch["start"]) + number * throughput["bin_s"],
            f"throughput.stretches.{index}.rows.{number}",
            f"throughput.stretches.{index}.completion_tokens.{number}",
        )
        for index, stretch in enumerate(throughput["stretches"])
        for number in range(len(stretch["rows"]))
    ]
