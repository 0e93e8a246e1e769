"""What an evaluation leaves behind, beside the run's own records and reports.

In: the scores, and what the run was. Out: ``evaluation.json``, ``evaluation.html``,
``items/<task>.parquet`` in the run folder, and a table on stderr.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from jobs.evaluate.scores import Measured, Score
from pipeline import storage
from pipeline.redact import redacted


def write(run_folder: str, document: Mapping[str, Any], scores: Sequence[Score]) -> None:
    """Put the evaluation's objects into the run folder, over those of an earlier start.

    Raises:
        StorageError: one cannot be written.
    """
    for score in scores:
        buffer = io.BytesIO()
        pq.write_table(score.rows, buffer, compression="zstd")
        storage.put_bytes(items_uri(run_folder, score), buffer.getvalue())
    shown = redacted(dict(document))
    page = _render(shown)
    storage.put_bytes(storage.join(run_folder, "evaluation.html"), page.encode())
    text = json.dumps(shown, indent=2) + "\n"
    storage.put_bytes(storage.join(run_folder, "evaluation.json"), text.encode())


def items_uri(run_folder: str, score: Score) -> str:
    """Where the items of a benchmark go."""
    return storage.join(run_folder, "items", f"{score.section.name.replace(':', '-')}.parquet")


def _render(document: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("jobs.evaluate", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("evaluation.html.jinja").render(evaluation=document)


def show(scores: Sequence[Score]) -> None:
    """The scores as a table on stderr."""
    table = Table("task", "items", "score", "95 % interval", "metric", "published")
    for score in scores:
        table.add_row(
            score.section.name,
            f"{score.items:,}",
            _percent(score.main),
            _range(score.main),
            score.main.name if score.main else score.reason,
            f"{score.published.percent} ({score.published.model})" if score.published else "",
        )
    Console(stderr=True, highlight=False).print(table)


def _percent(measured: Measured | None) -> str:
    return "none" if measured is None else f"{100 * measured.value:.1f} %"


def _range(measured: Measured | None) -> str:
    if measured is None or measured.interval is None:
        return ""
    return f"{100 * measured.interval.low:.1f} to {100 * measured.interval.high:.1f} %"
