"""values: Arrow values as Python's, one by one where a column holds some that Python cannot hold.

In: a column. Out: its values; JSON (``extension<arrow.json>``: datasets' ``Json()``, DuckDB's JSON)
is its text, or is parsed at any depth. A text that is not UTF-8, a date outside of the years 1-9999
or a time in a zone that this machine does not know becomes an ``Unreadable``, which is for the
caller to judge.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_UNREADABLE = (ValueError, ArithmeticError, LookupError, pa.ArrowException)
"""What a value raises that Python cannot hold: of bytes, of a date, of a zone."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value that is there, but cannot be read."""

    reason: str
    """What it is: ``is not UTF-8: ...``."""


def python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The column's values, JSON as text; ``Unreadable`` in place of those that cannot be read."""
    return _values(column, parse=False)


def parsed_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The column's values, JSON parsed; ``Unreadable`` in place of those that cannot be read."""
    return _values(column, parse=holds_json(column.type))


def rows_of(table: pa.Table, *, parsed: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a table; JSON is parsed in the columns ``parsed``, and text in the others."""
    names = table.column_names
    columns = [
        parsed_values(column) if name in parsed else python_values(column)
        for name, column in zip(names, table.columns, strict=True)
    ]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.Array | pa.ChunkedArray, *, parse: bool) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        return [_parsed(value, column.type) for value in values] if parse else values
    except _UNREADABLE:
        return [_value(column.slice(row, 1), parse=parse) for row in range(len(column))]


def _value(one: pa.Array | pa.ChunkedArray, *, parse: bool) -> Any:
    try:
        (value,) = one.to_pylist()
        return _parsed(value, one.type) if parse else value
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8: {error}")
    except _UNREADABLE as error:
        return Unreadable(f"is a {one.type} that cannot be read: {error}")


def is_json(kind: pa.DataType) -> bool:
    """Whether ``kind`` is Arrow's JSON."""
    return isinstance(kind, pa.JsonType)


def holds_json(kind: pa.DataType) -> bool:
    """Whether ``kind`` is Arrow's JSON, or has some inside."""
    return "arrow.json" in str(kind)


def _parsed(value: Any, kind: pa.DataType) -> Any:
    """``value`` with the JSON inside parsed.

    Raises:
        ValueError: it is no JSON.
    """
    if value is None or not holds_json(kind):
        return value
    if is_json(kind):
        return _json(value)
    if pa.types.is_dictionary(kind):
        return _parsed(value, kind.value_type)
    if pa.types.is_struct(kind):
        return {each.name: _parsed(value[each.name], each.type) for each in kind}
    if pa.types.is_map(kind):
        keys, items = kind.key_type, kind.item_type
        return [(_parsed(key, keys), _parsed(item, items)) for key, item in value]
    return [_parsed(each, kind.value_type) for each in value]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
