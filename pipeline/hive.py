"""hive: the columns that folders of a partitioned table name, ``date=2026-11-22/``.

In: a path. Out: names and values, always strings. Both are percent-encoded by Spark, DuckDB and
Polars, each in its own measure; a segment that is not UTF-8 once decoded is taken as it stands.
"""

from __future__ import annotations

from urllib.parse import unquote

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_values(path: str) -> dict[str, str | None]:
    """The columns of a file by the folders of its path; of a name that comes twice, the last."""
    folders = [folder.partition("=") for folder in path.split("/")[:-1]]
    return {
        _decoded(name): None if value == _NULL else _decoded(value)
        for name, separator, value in folders
        if name and separator
    }


def _decoded(segment: str) -> str:
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        return segment
