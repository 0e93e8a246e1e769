"""What a dry run shows of the task: the first rows rendered, one of them in full."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.settle import Job
from pipeline.errors import ConfigError, RowError
from pipeline.plan import Shard
from pipeline.read import read_shard
from pipeline.template import ROW_PREFIX
from pipeline.values import rows_of

log = logging.getLogger(__name__)

_ROWS = 20
_SHOWN_CHARACTERS = 4_000


def show_first_row(job: Job) -> None:
    """Render the first rows; log one whole prompt, and what is wrong with the others.

    Raises:
        ConfigError: not one of them can be rendered.
    """
    assert job.renderer is not None
    faults: list[str] = []
    shown = False
    for number, row in enumerate(_first_rows(job)):
        try:
            request = job.renderer.request(row)
        except RowError as error:
            faults.append(f"row {number}: {error.message}")
            continue
        if not shown:
            log.info("row %d asks:\n%s", number, _as_text(request.messages))
            shown = True
    if faults and not shown:
        raise ConfigError(f"task: none of the first {len(faults)} rows can be asked; {faults[0]}.")
    for fault in faults:
        log.warning("%s", fault)


def _first_rows(job: Job) -> list[Mapping[str, Any]]:
    """Columns by name of the first rows of the first file that has any."""
    columns = job.found.columns
    wanted = {theirs for ours, theirs in columns.request.items() if ours.startswith(ROW_PREFIX)}
    for file in job.found.files:
        if file.rows:
            table = read_shard(Shard(0, file.uri, 0, min(_ROWS, file.rows)), columns)
            return [
                {name: value for name, value in row.items() if name in wanted}
                for row in rows_of(table, parsed=())
            ]
    return []


def _as_text(messages: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"  {turn['role']}: {_content(turn['content'])}" for turn in messages]
    return "\n".join(lines)[:_SHOWN_CHARACTERS]


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "<image>") for part in content)
