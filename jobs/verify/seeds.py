"""The seeds that rows of the input bring themselves: just the columns that say so are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import JobConfig
from pipeline.errors import RowError, StorageError
from pipeline.openai_input import read_line
from pipeline.plan import Shard
from pipeline.read import LINE_COLUMN, InputColumns, read_shard
from pipeline.sampling import parse_json_sampling, parse_row_sampling
from pipeline.values import Unreadable, parsed_values

_NONE_CARRIED = pa.schema([])


def own_seeds(
    config: JobConfig, changed: Collection[str], shard: Shard
) -> Mapping[int, int] | None:
    """By row number, the seed that each row of ``shard`` brings; None if its file cannot be read,
    or is one of those that ``changed`` since the run was planned.

    Rows without one, and rows whose parameters are wrong, are left out.
    """
    theirs = config.input.columns.get("sampling", "sampling")
    is_jsonl = shard.end_byte > 0
    request = {LINE_COLUMN: LINE_COLUMN} if is_jsonl else {"sampling": theirs}
    if shard.uri in changed:
        return None
    try:
        if not is_jsonl and theirs not in _column_names(shard.uri):
            return {}
        table = read_shard(shard, InputColumns(request, _NONE_CARRIED))
    except (FileNotFoundError, StorageError, pa.ArrowException):
        return None
    seeds = _line_seeds(table) if is_jsonl else _row_seeds(table, theirs)
    rows = enumerate(seeds, start=shard.first_row)
    return {row: seed for row, seed in rows if seed is not None}


def _column_names(uri: str) -> list[str]:
    with storage.open_input(uri) as handle:
        names: list[str] = pq.read_schema(handle).names
    return names


def _row_seeds(table: pa.Table, column: str) -> Iterator[int | None]:
    for value in parsed_values(table.column(column)):
        try:
            yield None if isinstance(value, Unreadable) else parse_row_sampling(value).seed
        except RowError:
            yield None


def _line_seeds(table: pa.Table) -> Iterator[int | None]:
    for line in table.column(LINE_COLUMN).to_pylist():
        body = read_line(line).document.get("body")
        seed = body.get("seed") if isinstance(body, Mapping) else None
        try:
            yield parse_json_sampling({"seed": seed}).seed
        except RowError:
            yield None
