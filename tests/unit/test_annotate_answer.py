"""JSON schemas become Arrow columns, and completions values of them; samples vote."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.annotate.answer import Answer, InvalidAnswerError, settle_answer
from jobs.annotate.config import AnswerSection
from jobs.annotate.votes import decide
from pipeline.errors import ConfigError, ErrorCode
from pipeline.records import Status


def answer(schema: dict[str, Any], form: str = "json") -> Answer:
    return settle_answer(AnswerSection.model_validate({"schema": schema, "form": form}))


def of(**properties: Any) -> Answer:
    return answer({"type": "object", "properties": properties})


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}


@pytest.mark.parametrize(
    ("schema", "kind", "value", "stored"),
    [
        ({"type": "string", "format": "date-time"}, pa.string(), "2026-11-25", "2026-11-25"),
        ({"type": "integer"}, pa.int64(), 3.0, 3),
        ({"type": "number"}, pa.float64(), 3, 3.0),
        ({"type": ["integer", "number", "null"]}, pa.float64(), None, None),
        ({"type": "boolean"}, pa.bool_(), False, False),
        ({"enum": ["a", "b", None]}, pa.string(), "b", "b"),
        ({"enum": [1, 2]}, pa.int64(), 2, 2),
        ({"const": True}, pa.bool_(), True, True),
        ({"enum": [1, "a"]}, pa.string(), "a", '"a"'),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64(), 5, 5),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, pa.string(), 5, "5"),
        ({"type": "array", "items": {"type": "integer"}}, pa.list_(pa.int64()), [1], [1]),
        ({"type": "array", "prefixItems": [{}]}, pa.string(), [1, "ä"], '[1,"ä"]'),
        (
            {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "string"}}},
            pa.struct([("x", pa.float64()), ("y", pa.string())]),
            {"x": 1},
            {"x": 1.0, "y": None},
        ),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            pa.string(),
            {"k": 1},
            '{"k":1}',
        ),
        ({}, pa.string(), [None], "[null]"),
    ],
    ids=str,
)
def test_each_kind_of_schema_has_a_type_that_holds_its_values(
    schema: dict[str, Any], kind: pa.DataType, value: Any, stored: Any
) -> None:
    settled = of(v=schema)
    assert settled.arrow_fields == [pa.field("v", kind)]
    found = settled.parse(json.dumps({"v": value}))
    table = pa.Table.from_pylist([found, {"v": None}], schema=pa.schema(settled.arrow_fields))
    assert table.column("v").to_pylist() == [stored, None]


def test_a_schema_that_refers_to_itself_is_kept_as_json() -> None:
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/Node"}, "size": {"$ref": "#/$defs/Size"}},
        "$defs": {"Node": NODE, "Size": {"type": "integer"}},
    }
    fields = {field.name: field.type for field in answer(schema).arrow_fields}
    assert fields == {"tree": pa.struct([("next", pa.string())]), "size": pa.int64()}


def test_objects_that_list_their_keys_are_closed_for_the_engine() -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    settled = of(a=inner, b={"type": "object", "additionalProperties": True, "properties": {}})
    assert settled.schema["additionalProperties"] is False
    properties = settled.schema["properties"]
    assert properties["a"]["additionalProperties"] is False
    assert properties["a"]["properties"] == {"properties": {"type": "string"}}
    assert properties["b"]["additionalProperties"] is True
    assert settled.fault('{"a": {"properties": "x"}}') is None
    assert settled.fault('{"c": 1}') is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ('{"v": 9223372036854775808}', "64 bits"),
        ('{"v": NaN}', "NaN"),
        ('{"v": 1.5}', "no integer"),
    ],
)
def test_a_text_that_no_column_holds_is_no_answer(text: str, words: str) -> None:
    with pytest.raises(InvalidAnswerError, match=words):
        of(v={"type": "integer"}).parse(text)


def test_a_lone_surrogate_is_no_answer() -> None:
    with pytest.raises(InvalidAnswerError, match="surrogate"):
        of(v={"type": "string"}).parse('{"v": "\\ud800"}')


def test_an_answer_that_is_no_object_is_one_column() -> None:
    settled = answer({"enum": ["yes", "no"]})
    assert settled.arrow_fields == [pa.field("answer", pa.string())]
    assert settled.parse('"no"') == {"answer": "no"}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "integer", "minimum": -1, "maximum": 1}, {"-1": -1, "0": 0, "1": 1}),
        ({"type": "boolean"}, {"true": True, "false": False}),
        ({"enum": ["a b", 2, None]}, {"a b": "a b", "2": 2}),
    ],
)
def test_a_bare_value_is_one_of_the_choices(schema: dict[str, Any], values: Any) -> None:
    settled = answer({"type": "object", "properties": {"v": schema}}, form="value")
    (choices,) = settled.parameters.values()
    assert choices.choice == list(values)
    assert settled.values == {text: {"v": value} for text, value in values.items()}
    with pytest.raises(InvalidAnswerError, match="none of the values"):
        settled.parse("other")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"schema": {"type": "nothing"}}, "not a JSON schema"),
        ({"schema": {"type": "object"}}, "lists no properties"),
        ({"schema": {"type": "object", "properties": {"A": {}, "a": {}}}}, "their case"),
        ({"schema": {"type": "string"}, "form": "value"}, "few values"),
        ({"file": "/nowhere/schema.json"}, "no such file"),
        ({"pydantic": "json:JSONDecoder"}, "only local code"),
        ({"pydantic": "jobs.annotate.votes:decide"}, "no pydantic model"),
    ],
)
def test_an_answer_that_cannot_become_columns_is_refused(
    section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        settle_answer(AnswerSection.model_validate(section))


def test_a_pydantic_model_of_the_working_directory_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labels_of_this_test.py").write_text(
        "from pydantic import BaseModel, field_validator\n"
        "class Label(BaseModel):\n"
        "    name: str\n"
        "    score: int | None = None\n"
        "    @field_validator('name')\n"
        "    def _lower(cls, value: str) -> str:\n"
        "        if not value: raise ValueError('is empty')\n"
        "        return value.lower()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settled = settle_answer(AnswerSection(pydantic="labels_of_this_test:Label"))
    assert settled.arrow_fields == [pa.field("name", pa.string()), pa.field("score", pa.int64())]
    assert settled.parse('{"name": "ABC"}') == {"name": "abc", "score": None}
    with pytest.raises(InvalidAnswerError, match="name: Value error, is empty"):
        settled.parse('{"name": ""}')


def record(text: str | None = None, code: str | None = None, status: str = "") -> dict[str, Any]:
    found = status or ("succeeded" if code is None else "errored")
    return {"text": text, "error_code": code, "error_message": code, "status": found}


WORD = of(word={"type": "string"}, sure={"type": "boolean"})


def said(word: str, *, sure: bool = True) -> dict[str, Any]:
    return record(json.dumps({"word": word, "sure": sure}))


def test_the_answer_that_most_valid_samples_give_wins() -> None:
    samples = [said("a"), said("b"), record("{", "length"), said("b"), said("b", sure=False)]
    decision = decide(samples, WORD)
    assert decision.answer == {"word": "b", "sure": True}
    assert (decision.votes, decision.agreement, decision.code) == (4, 0.5, None)


def test_of_as_many_votes_the_first_said_wins() -> None:
    assert decide([said("b"), said("a"), said("b"), said("a")], WORD).answer == {
        "word": "b",
        "sure": True,
    }


@pytest.mark.parametrize(
    ("samples", "code", "status", "invalid"),
    [
        ([record(code="timeout"), record("{", "length")], ErrorCode.LENGTH, "errored", True),
        ([record("nonsense")], ErrorCode.SCHEMA_VIOLATION, "errored", True),
        ([record(code="image_invalid")], ErrorCode.IMAGE_INVALID, "errored", False),
        ([record(code="batch_expired", status="expired")], "batch_expired", "expired", False),
        (
            [record(code="batch_expired", status="expired"), record(code="timeout")],
            ErrorCode.TIMEOUT,
            "errored",
            False,
        ),
    ],
)
def test_a_row_without_a_valid_sample_tells_the_fault_that_may_be_mended(
    samples: list[dict[str, Any]], code: str, status: str, invalid: bool
) -> None:
    decision = decide(samples, WORD)
    assert (decision.answer, decision.votes, decision.agreement) == (None, 0, None)
    assert (decision.code, decision.status, decision.is_invalid) == (code, Status(status), invalid)
