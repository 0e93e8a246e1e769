"""Structured outputs: what may be asked for, and whether a text is it; in bounded time, offline."""

import json
import time
from typing import Any

import pytest
import xgrammar
from pydantic import ValidationError
from xgrammar.testing import _is_grammar_accept_string

from pipeline.structured import (
    MAX_SPEC_CHARS,
    ResponseFormat,
    Structure,
    StructuredOutputs,
    StructureKind,
    is_closed,
    json_structure,
    violation,
)

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def structure(**given: Any) -> Structure:
    return StructuredOutputs.model_validate(given).structure


@pytest.mark.parametrize(
    ("asked", "text", "wrong"),
    [
        ({"json": PERSON}, '{"name": "Ada", "age": 36}', None),
        ({"json": json.dumps(PERSON)}, ' {"name": "Ada"}\n', None),
        ({"json": PERSON}, '{"name": "Ada", "age": -1}', "['age']"),
        ({"json": PERSON}, '{"age": 1}', '"name" is a required property'),
        ({"json": PERSON}, '{"name": "Ada"', "not JSON"),
        ({"json": PERSON}, "", "not JSON"),
        ({"json": {"const": None}}, "null", None),
        ({"json": {"type": "string", "pattern": "^a+$"}}, '"aaa"', None),
        ({"json": {"type": "string", "pattern": "^a+$"}}, '"aab"', "does not match"),
        ({"regex": "[0-9]{3}"}, "123", None),
        ({"regex": "[0-9]{3}"}, "1234", "does not match the pattern"),
        ({"regex": "a|bc"}, "bcd", "does not match the pattern"),
        ({"regex": "^ja$|nein"}, "ja", None),
        ({"regex": "Reason: .*\\nAnswer: (yes|no)"}, "Reason: a,\n\nb\nAnswer: no", None),
        ({"regex": "[^\\n]*"}, "a\nb", "does not match the pattern"),
        ({"json": {"type": "string", "pattern": "^a.b$"}}, '"a\\nb"', "does not match"),
        ({"choice": ["yes", "no", "ünï"]}, "ünï", None),
        ({"choice": ["yes", "no"]}, "y", "none of the choices"),
        ({"grammar": 'root ::= "a"'}, "a", None),
    ],
)
def test_a_text_is_held_to_what_was_asked(
    asked: dict[str, Any], text: str, wrong: str | None
) -> None:
    found = violation(structure(**asked), text)
    assert (found is None) if wrong is None else wrong in str(found)


@pytest.mark.parametrize("pattern", ["a.b", "a.*b", "a[.]b", "a[^x]b", r"a\Db", r"a\wb"])
@pytest.mark.parametrize("middle", ["\n", "\r", "\u2028", "-", ".", "z"])
def test_a_pattern_takes_the_texts_that_xgrammar_makes_by_it(pattern: str, middle: str) -> None:
    grammar = xgrammar.Grammar.from_regex(pattern)
    made = _is_grammar_accept_string(grammar, f"a{middle}b")
    assert (violation(structure(regex=pattern), f"a{middle}b") is None) is made


def test_a_json_object_is_an_object() -> None:
    asked = ResponseFormat.model_validate({"type": "json_object"}).structure
    assert asked is not None
    assert violation(asked, '{"a": [1, {"b": null}]}') is None
    assert "object" in str(violation(asked, "[1]"))


def test_text_is_any_text() -> None:
    assert ResponseFormat.model_validate({"type": "text"}).structure is None


def test_openais_and_vllms_way_to_ask_for_a_schema_are_one() -> None:
    openai = ResponseFormat.model_validate(
        {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    )
    assert openai.structure == structure(json=PERSON)


def test_the_order_of_properties_stays_as_it_was_given() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    assert list(json.loads(json_structure(schema).spec)["properties"]) == ["z", "a"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["a"]}, "exactly one of"),
        ({"json": {"type": "strin"}}, "not a JSON schema"),
        ({"json": "{"}, "the schema is not JSON"),
        ({"json": "[]"}, "a JSON schema is an object"),
        ({"json": {"pattern": "("}}, "not a JSON schema"),
        ({"json": {"$ref": "http://169.254.169.254/latest"}}, "not into itself"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "not into itself"),
        ({"json": {"$ref": "#/$defs/missing"}}, "which is not there"),
        ({"json": {"description": "x" * MAX_SPEC_CHARS}}, "at most 65536"),
        ({"json": "[" * 60_000}, "the schema is not JSON"),
        ({"regex": "[0-9"}, "not a regular expression"),
        ({"regex": "a)(b"}, "not a regular expression"),
        ({"json": {"$dynamicRef": "#a"}}, "dynamic reference"),
        ({"json": {"$ref": "#anchor", "$defs": {"x": {"$anchor": "anchor"}}}}, "not into itself"),
        ({"regex": "(?=a)b"}, "not a regular expression"),
        ({"regex": "(a{1,1000}){1,1000}"}, "not a regular expression"),
        ({"choice": []}, "at least 1 item"),
        ({"choice": ["a", ""]}, "at least 1 character"),
        ({"grammar": ""}, "at least 1 character"),
        ({"gramar": "x"}, "Extra inputs"),
    ],
)
def test_what_no_engine_could_hold_to_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StructuredOutputs.model_validate(given)


def test_a_schema_that_is_too_deep_is_refused_whichever_way_it_comes() -> None:
    schema: dict[str, Any] = {}
    for _ in range(500):
        schema = {"items": schema}
    for given in (schema, json.dumps(schema)):
        with pytest.raises(ValueError, match="nested deeper than 64"):
            json_structure(given)


def test_hostile_patterns_and_texts_take_no_time() -> None:
    started = time.monotonic()
    text = "a" * 5_000 + "!"
    assert violation(structure(regex="(a+)+"), text)
    assert violation(structure(json={"pattern": "^(a|a)*$"}), json.dumps(text))
    assert violation(structure(json={"patternProperties": {"^(a+)+$": {}}, "not": {}}), '{"a":1}')
    assert "not JSON" in str(violation(structure(json=PERSON), "[" * 100_000))
    assert time.monotonic() - started < 30  # a backtracking matcher would need years


@pytest.mark.parametrize(
    ("asked", "text", "closed"),
    [
        ({"json": PERSON}, '{"name": "Ada"}\n', True),
        ({"json": {"type": "array"}}, "[1]", True),
        ({"json": {"type": "integer"}}, "12", False),
        ({"choice": ["}"]}, "}", False),
        ({"regex": "a+}"}, "a}", False),
    ],
)
def test_only_an_object_or_list_shows_that_it_ended(
    asked: dict[str, Any], text: str, closed: bool
) -> None:
    assert is_closed(structure(**asked), text) is closed


def test_a_structure_tells_its_kind() -> None:
    assert structure(choice=["a"]) == Structure(kind=StructureKind.CHOICE, spec='["a"]')


@pytest.mark.parametrize("kind", ["allOf", "anyOf", "oneOf"])
def test_a_schema_that_grows_by_its_references_is_refused_at_once(kind: str) -> None:
    twice = {f"a{i}": {kind: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
    with pytest.raises(ValueError, match="over 20000 places"):
        json_structure({"$ref": "#/$defs/a0", "$defs": {**twice, "a40": {}}})


def test_a_schema_that_refers_through_a_long_chain_is_refused() -> None:
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1500)}
    with pytest.raises(ValueError, match="too deeply"):
        json_structure({"$ref": "#/$defs/a0", "$defs": {**chain, "a1500": {}}})


def nested(depth: int, inmost: str) -> str:
    return '{"x": ' * depth + inmost + "}" * depth


def test_a_schema_that_refers_to_itself_is_checked_at_any_depth() -> None:
    twice = [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}]
    node = {"type": "object", "properties": {"x": {"anyOf": twice}}}
    schema = json_structure({"$ref": "#/$defs/n", "$defs": {"n": node}})
    for depth in (3, 40):
        assert violation(schema, nested(depth, "{}")) is None
        assert "does not fit the schema" in str(violation(schema, nested(depth, "7")))


def test_older_drafts_are_told_by_their_name() -> None:
    draft_7 = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}]}
    assert violation(json_structure(draft_7), '["a", 1]') is None
    assert violation(json_structure(draft_7), "[1]")


def held_s(structure: Structure, text: str) -> float:
    """CPU seconds of this process, in which nothing else of it runs."""
    started = time.thread_time()
    violation(structure, text)
    return time.thread_time() - started


def test_a_schema_of_many_alternatives_does_not_hold_the_interpreter() -> None:
    schema = {"items": {"anyOf": [{"const": number} for number in range(3_000)]}}
    items = json.dumps([2_999] * 12_000)
    assert held_s(json_structure(schema), items) < 2  # checked here: 6 s
    assert violation(json_structure(schema), json.dumps([2_999] * 1_000)) is None
    assert violation(json_structure(schema), json.dumps([3_000] * 3_000)) is not None


@pytest.mark.parametrize("pattern", ["((a?){99}){99}b", "[ab]*a[ab]{900}c", "(x|" * 60 + ")" * 60])
def test_a_pattern_of_many_places_does_not_hold_the_interpreter(pattern: str) -> None:
    structure = Structure(kind=StructureKind.REGEX, spec=pattern)
    assert held_s(structure, "ab" * 200_000) < 5
    within = json_structure({"items": {"pattern": pattern}})
    assert held_s(within, json.dumps(["ab" * 200_000])) < 5


def test_a_pattern_as_people_write_them_is_checked_where_it_is() -> None:
    uuid = "[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"
    structure = Structure(kind=StructureKind.REGEX, spec=uuid)
    assert violation(structure, "01234567-89ab-cdef-0123-456789abcdef") is None
