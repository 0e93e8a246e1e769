"""The task's answer: its schema, what the engine is held to, and texts as typed values.

In: the config's ``answer``. Out: an ``Answer``: request parameters, Arrow fields, and ``parse``,
which turns a completion into one value per field or says why it is none.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from pydantic import BaseModel, ValidationError

from jobs.annotate.columns import Typed, closed, resolve, typed
from jobs.annotate.config import AnswerSection
from pipeline.errors import ConfigError
from pipeline.structured import (
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
    json_structure,
    violation,
)
from pipeline.template import compact_json

WHOLE = "answer"
"""The one column of an answer that is no object."""
_MOST_VALUES = 1_000  # of form: value, as of structured_outputs.choice


class InvalidAnswerError(ValueError):
    """A completion that is no answer; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What an answer looks like, settled."""

    schema: Mapping[str, Any]
    fields: Mapping[str, Typed]
    """By property, in the schema's order."""
    values: Mapping[str, Any] | None
    """Text -> answer, where the model writes the bare value; None: it writes JSON."""
    model: type[BaseModel] | None
    """Has the last word on an answer; None: the schema has."""
    is_object: bool
    """Whether the fields are properties, or the answer is the one field."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Request parameters that hold the engine to it."""
        if self.values is not None:
            return {"structured_outputs": StructuredOutputs(choice=list(self.values))}
        form = JsonSchemaFormat.model_validate({"name": "annotation", "schema": self.schema})
        return {"response_format": ResponseFormat(type="json_schema", json_schema=form)}

    @property
    def arrow_fields(self) -> list[pa.Field]:
        """Name and type of each column, all nullable: a row may fail."""
        return [pa.field(name, each.arrow) for name, each in self.fields.items()]

    def parse(self, text: str) -> dict[str, Any]:
        """A completion as a value per field.

        Raises:
            InvalidAnswerError: it is none.
        """
        try:
            value = self._read(text)
            if self.model is not None:
                value = self.model.model_validate(value).model_dump(mode="json", by_alias=True)
            whole = value if self.is_object else {WHOLE: value}
            return {name: each.convert(whole.get(name)) for name, each in self.fields.items()}
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ".".join(map(str, fault["loc"]))
            raise InvalidAnswerError(f"{where or 'the answer'}: {fault['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidAnswerError(str(error)) from None

    def fault(self, text: str) -> str | None:
        """Why ``text`` is not what the engine is held to; None if it is."""
        if self.values is not None:
            return None if text in self.values else f"must be one of {', '.join(self.values)}"
        return violation(json_structure(self.schema), text)

    def _read(self, text: str) -> Any:
        if self.values is None:
            return json.loads(text, parse_constant=_no_constant)
        if text not in self.values:
            raise ValueError(f"{text!r:.80} is none of the values")
        return self.values[text]


def settle_answer(section: AnswerSection) -> Answer:
    """Read the schema and settle the columns.

    Raises:
        ConfigError: there is no such file or model, no such JSON schema, or one without columns.
    """
    model = _load_model(section.pydantic) if section.pydantic else None
    schema = closed(model.model_json_schema() if model else _load_schema(section))
    try:
        json_structure(schema)
    except ValueError as error:
        raise ConfigError(f"task.answer: {error}.") from None
    top = _dereferenced(schema)
    is_object = bool(top.get("properties"))
    if not is_object and (top.get("type") == "object" or not top):
        raise ConfigError(
            "task.answer: the schema lists no properties, so there are no columns; name them under "
            "properties, with their types."
        )
    properties = top["properties"] if is_object else {WHOLE: top}
    fields = {name: typed(inner, schema) for name, inner in properties.items()}
    _check_names(list(fields))
    values = _values(schema, properties, is_object=is_object) if section.form == "value" else None
    return Answer(schema, fields, values, model, is_object)


def _check_names(names: Sequence[str]) -> None:
    folded = [name.casefold() for name in names]
    double = [name for name in names if folded.count(name.casefold()) > 1 or not name]
    if double:
        raise ConfigError(
            f"task.answer: properties {double} make no columns: names differ in more than their "
            "case, and are not empty."
        )


def _dereferenced(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself, or what its only reference leads to."""
    top: Mapping[str, Any] = schema
    seen: set[str] = set()
    while isinstance(top.get("$ref"), str) and top["$ref"] not in seen:
        seen.add(top["$ref"])
        top = resolve(top["$ref"], schema)
    return top


def _load_schema(section: AnswerSection) -> Mapping[str, Any]:
    if section.schema_ is not None:
        return section.schema_
    path = Path(section.file or "")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
    except FileNotFoundError:
        raise ConfigError(f"task.answer.file {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"task.answer.file {path}: {' '.join(str(error).split())}.") from None
    if not isinstance(document, Mapping):
        raise ConfigError(f"task.answer.file {path}: a JSON schema is an object.")
    return document


def _load_model(name: str) -> type[BaseModel]:
    """The pydantic model, if its package lies in the working directory: it is code that runs."""
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if PathFinder.find_spec(module_name.partition(".")[0], [here]) is None:
        raise ConfigError(
            f"task.answer.pydantic {name}: {module_name} does not lie in the working directory, "
            f"{here}; only local code is imported."
        )
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError as error:
        raise ConfigError(f"task.answer.pydantic {name}: {error}.") from None
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ConfigError(f"task.answer.pydantic {name}: {attribute} is no pydantic model there.")
    return found


def _values(
    schema: Mapping[str, Any], properties: Mapping[str, Any], *, is_object: bool
) -> dict[str, Any]:
    """Text -> answer, of a schema with one property of few values."""
    found = _enumerated(_dereferenced_in(schema, next(iter(properties.values()))))
    texts = [value if isinstance(value, str) else compact_json(value) for value in found]
    if len(properties) != 1 or not found or len(set(texts)) != len(texts) or "" in texts:
        raise ConfigError(
            "task.answer.form value: is for one property with few values: an enum, a boolean, or "
            f"an integer with minimum and maximum (at most {_MOST_VALUES} different texts)."
        )
    (name,) = properties
    return {
        text: {name: value} if is_object else value
        for text, value in zip(texts, found, strict=True)
    }


def _dereferenced_in(root: Mapping[str, Any], node: Any) -> Mapping[str, Any]:
    found = resolve(node["$ref"], root) if isinstance(node, Mapping) and "$ref" in node else node
    return found if isinstance(found, Mapping) else {}


def _enumerated(schema: Mapping[str, Any]) -> list[Any]:
    if "enum" in schema:
        return [value for value in schema["enum"] if value is not None][: _MOST_VALUES + 1]
    if schema.get("type") == "boolean":
        return [True, False]
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema.get("type") == "integer" and isinstance(low, int) and isinstance(high, int):
        return list(range(low, high + 1)) if high - low < _MOST_VALUES else []
    return []


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
