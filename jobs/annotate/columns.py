"""Typed columns from a JSON schema: which Arrow type an answer gets, and its values as that type.

In: a JSON schema. Out: a ``Typed``, an Arrow type with a function that takes what JSON gave and
returns what Arrow takes. What has no plain Arrow form (alternatives of several types, objects with
free keys, tuples, schemas that refer to themselves) is a string of JSON, so that nothing is lost.

    string (any format), enum of strings   string          array with items     list
    integer, enum of integers              int64           object, listed keys  struct
    number                                 double          one type or null     that type
    boolean                                bool            anything else        string of JSON
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipeline.sampling import is_utf8
from pipeline.template import compact_json

Schema = Mapping[str, Any]
_INT64 = range(-(2**63), 2**63)
_SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "contains")
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")


@dataclass(frozen=True)
class Typed:
    """An Arrow type, and how a JSON value becomes a value of it."""

    arrow: pa.DataType
    convert: Callable[[Any], Any]
    """Raises ``ValueError`` if the type cannot hold the value. Null stays null."""


def closed(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` where an object lists its keys and says
    nothing of others: a struct has no room for them, and a model should not make any up."""
    if not isinstance(schema, Mapping):
        return schema
    copy = dict(schema)
    for key in _SCHEMA_MAPS:
        if isinstance(copy.get(key), Mapping):
            copy[key] = {name: closed(inner) for name, inner in copy[key].items()}
    for key in _SCHEMA_LISTS:
        if isinstance(copy.get(key), list):
            copy[key] = [closed(inner) for inner in copy[key]]
    for key in _SCHEMAS:
        if key in copy:
            copy[key] = closed(copy[key])
    if copy.get("properties") and not any(key in copy for key in _COMBINING):
        copy.setdefault("additionalProperties", False)
    return copy


def typed(schema: Any, root: Schema, open_references: frozenset[str] = frozenset()) -> Typed:
    """The column type of ``schema``, a part of ``root``."""
    if not isinstance(schema, Mapping):
        return _JSON
    if "$ref" in schema:
        reference = schema["$ref"]
        if reference in open_references:
            return _JSON
        return typed(resolve(reference, root), root, open_references | {reference})
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _alternative(schema, key, root, open_references)
    if "enum" in schema or "const" in schema:
        return _of_values(schema.get("enum", [schema.get("const")]))
    return _of_type(schema, root, open_references)


def resolve(reference: str, root: Schema) -> Any:
    """What a JSON pointer (``#/...``) leads to; the schema was checked before."""
    node: Any = root
    for step in reference.split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


def _alternative(schema: Schema, key: str, root: Schema, open_references: frozenset[str]) -> Typed:
    """One of several schemas: typed if all but null come to the same type."""
    if key == "allOf" and len(schema[key]) > 1:
        return _JSON
    options = [option for option in schema[key] if option != {"type": "null"}]
    found = [typed(option, root, open_references) for option in options]
    if found and all(each.arrow == found[0].arrow for each in found):
        return found[0]
    return _JSON


def _of_values(values: Sequence[Any]) -> Typed:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {str}:
        return _STRING
    if kinds == {bool}:
        return _BOOLEAN
    if kinds == {int}:
        return _INTEGER
    return _NUMBER if kinds and kinds <= {int, float} else _JSON


def _of_type(schema: Schema, root: Schema, open_references: frozenset[str]) -> Typed:
    given = schema.get("type")
    kinds = {each for each in (given if isinstance(given, list) else [given]) if each != "null"}
    if kinds == {"integer", "number"}:
        return _NUMBER
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "array" and isinstance(schema.get("items"), Mapping) and "prefixItems" not in schema:
        return _list(typed(schema["items"], root, open_references))
    if kind in ("object", None) and _is_struct(schema):
        fields = schema["properties"].items()
        return _struct({name: typed(inner, root, open_references) for name, inner in fields})
    return _JSON


def _is_struct(schema: Schema) -> bool:
    listed = bool(schema.get("properties")) and schema.get("additionalProperties") is False
    return listed and "patternProperties" not in schema


def _list(item: Typed) -> Typed:
    def convert(value: Any) -> Any:
        return None if value is None else [item.convert(each) for each in value]

    return Typed(pa.list_(item.arrow), convert)


def _struct(fields: Mapping[str, Typed]) -> Typed:
    def convert(value: Any) -> Any:
        if value is None:
            return None
        return {name: each.convert(value.get(name)) for name, each in fields.items()}

    return Typed(pa.struct([(name, each.arrow) for name, each in fields.items()]), convert)


def _nullable(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no string")
    if not is_utf8(value):
        raise ValueError("a string holds a lone surrogate")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r:.80} is no integer")
    if int(value) not in _INT64:
        raise ValueError(f"{value!r:.80} does not fit 64 bits")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.80} is no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{value!r:.80} does not fit a double") from None


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.80} is neither true nor false")
    return value


_STRING = Typed(pa.string(), _nullable(_string))
_INTEGER = Typed(pa.int64(), _nullable(_integer))
_NUMBER = Typed(pa.float64(), _nullable(_number))
_BOOLEAN = Typed(pa.bool_(), _nullable(_boolean))
_JSON = Typed(pa.string(), _nullable(lambda value: _string(compact_json(value))))
_PLAIN = {"string": _STRING, "integer": _INTEGER, "number": _NUMBER, "boolean": _BOOLEAN}
