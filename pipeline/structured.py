"""Structured outputs: what shape a completion must have, and whether it has it.

In: a request's ``response_format`` or ``structured_outputs``. Out: one ``Structure``, checked as
far as that goes without an engine, which turns it into a grammar; and, for a finished text,
``violation``: a second opinion, as a stop string or the token limit may cut what a grammar began.

Rows bring both schema and prompt, so neither may cost more than it is worth: patterns run in linear
time (Rust's regex: no look-around, no back-references), and what a schema refers to is not fetched.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import unquote

from jsonschema_rs import RegexOptions, ValidationError, Validator, validator_for
from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_SPEC_CHARS = 65_536
"""Longest schema, pattern or grammar: engines compile them while others wait."""
_MAX_CHOICES = 1_000
_MAX_NESTING = 64  # vLLM's own limit
_MAX_EXPANDED = 20_000
"""Places of a schema once its references are followed: what one check may have to look at."""
_MAX_LOOKS = 1_000_000
"""At one value, by a schema that refers to itself: a second or so."""
_MAX_STEPS = 5_000_000
"""Places of a schema times values, or of a pattern times characters, that are checked here: half a
second, in which the interpreter is held."""
_CHECK_S = 10.0
_ATOM = re.compile(r"\{(\d{1,6}),?(\d{0,6})\}|\\.|\[\]?[^\]]*\]?|.", re.DOTALL)
"""A piece of a pattern: a repetition, an escape, a class, or any one character."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
"""What may stand for half of a surrogate pair."""
_CHILD = """
import json, resource, sys
from jsonschema_rs import RegexOptions, validator_for
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
schema, text = json.load(sys.stdin)
validator = validator_for(json.loads(schema), offline=True, pattern_options=RegexOptions())
print(validator.is_valid(json.loads(text)))
"""


class StructureKind(StrEnum):
    """What a ``Structure`` is given as."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


class Structure(BaseModel):
    """The one constraint of a request; hashable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: StructureKind
    spec: str = ""
    """The schema as JSON, the pattern, the choices as a JSON list, the EBNF grammar; or empty."""


Spec = Annotated[str, Field(min_length=1, max_length=MAX_SPEC_CHARS)]
"""A schema, pattern or grammar as text."""


class RequestPart(BaseModel):
    """An object inside a request: strict, and written back by the names it was read by."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, serialize_by_alias=True)


class JsonSchemaFormat(RequestPart):
    """OpenAI's ``response_format.json_schema``. ``strict: false`` is held to the schema as well."""

    name: Annotated[str | None, Field(min_length=1, max_length=64)] = None
    description: Annotated[str | None, Field(max_length=MAX_SPEC_CHARS)] = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> JsonSchemaFormat:
        json_structure(self.schema_)
        return self


class ResponseFormat(RequestPart):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        return self

    @property
    def structure(self) -> Structure | None:
        """What it asks for; None: any text."""
        if self.json_schema is not None:
            return json_structure(self.json_schema.schema_)
        if self.type == "json_object":
            return Structure(kind=StructureKind.JSON_OBJECT)
        return None


class StructuredOutputs(RequestPart):
    """vLLM's ``structured_outputs``: exactly one of its keys."""

    json_: Annotated[dict[str, Any] | Spec | None, Field(alias="json")] = None
    """A JSON schema, as an object or as text."""
    regex: Spec | None = None
    """A pattern the whole completion matches."""
    choice: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(min_length=1, max_length=_MAX_CHOICES),
    ] = None
    """Texts of which the completion is one."""
    grammar: Spec | None = None
    """An EBNF or Lark grammar, as the engine's backend reads it."""

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        given = (self.json_, self.regex, self.choice, self.grammar)
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar")
        if self.regex is not None:
            _check_pattern(self.regex)
        if isinstance(self.json_, str | dict):
            json_structure(self.json_)
        return self

    @property
    def structure(self) -> Structure:
        """What it asks for."""
        if self.json_ is not None:
            return json_structure(self.json_)
        if self.regex is not None:
            return Structure(kind=StructureKind.REGEX, spec=self.regex)
        if self.choice is not None:
            return Structure(kind=StructureKind.CHOICE, spec=json.dumps(self.choice))
        return Structure(kind=StructureKind.GRAMMAR, spec=self.grammar or "")


def json_structure(schema: Mapping[str, Any] | str) -> Structure:
    """The structure of a JSON schema, given as an object or as text.

    Raises:
        ValueError: it is no JSON schema, too long, too deep, or refers to another document.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    if len(text) > MAX_SPEC_CHARS:
        raise ValueError(f"the schema has {len(text)} characters; at most {MAX_SPEC_CHARS}")
    _validator(text)
    return Structure(kind=StructureKind.JSON_SCHEMA, spec=text)


def violation(structure: Structure, text: str) -> str | None:
    """Why ``text`` is not what ``structure`` asks for; None if it is.

    Whether it follows a grammar is left to the engine, which made it follow it.
    """
    match structure.kind:
        case StructureKind.GRAMMAR:
            return None
        case StructureKind.CHOICE:
            return None if text in json.loads(structure.spec) else "the text is none of the choices"
        case StructureKind.REGEX:
            if _pattern_places(structure.spec) * len(text) > _MAX_STEPS:
                return _violation_by_child(_pattern_schema(structure.spec), json.dumps(text))
            matches = _validator(_pattern_schema(structure.spec)).is_valid(text)
            return None if matches else "the text does not match the pattern"
        case StructureKind.JSON_OBJECT:
            return _json_violation('{"type": "object"}', text)
        case StructureKind.JSON_SCHEMA:
            return _json_violation(structure.spec, text)


def is_closed(structure: Structure, text: str) -> bool:
    """Whether a valid ``text`` that the token limit cut was whole: an object or a list that ends.

    A number, a choice or a match may be the beginning of a longer one.
    """
    is_json = structure.kind in (StructureKind.JSON_SCHEMA, StructureKind.JSON_OBJECT)
    return is_json and text.rstrip().endswith(("}", "]"))


def _json_violation(schema: str, text: str) -> str | None:
    try:
        value = _value(text)
    except (ValueError, RecursionError) as unreadable:
        return f"the text is not JSON: {unreadable}"
    if _may_take_long(schema, value, text):
        return _violation_by_child(schema, text)
    try:
        _validator(schema).validate(value)  # ends at the first error, unlike iter_errors
    except ValidationError as found:
        error = found
    except ValueError as unreadable:  # nested more deeply than it reads
        return f"the text cannot be checked: {unreadable}"
    else:
        return None
    where = "".join(f"[{step!r}]" for step in error.instance_path)
    return f"the text does not fit the schema: {where or 'all of it'}: {error.message}"


def _value(text: str) -> Any:
    """Read JSON strictly.

    Raises:
        ValueError: it is no JSON, names a number that JSON lacks, or escapes half of a surrogate
            pair: most parsers refuse that, and Arrow cannot hold it.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text, parse_constant=_refuse_constant)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_pattern(pattern: str) -> None:
    try:
        _validator(json.dumps({"pattern": pattern}))  # by itself, or a)(b would do
        _validator(_pattern_schema(pattern))
    except ValueError:
        raise ValueError(
            "not a regular expression, or one with look-around or back-references"
        ) from None


def _may_take_long(schema: str, value: Any, text: str) -> bool:
    """Whether a check may hold the interpreter for long: each value is held against each place of
    the schema at worst, and one that refers to itself may look at the inmost values times out of
    number, at each level as often as it has references."""
    cost = _cost(schema)
    if cost.places * len(text) > _MAX_STEPS:  # each value has a character; else they are counted
        values = sum(1 for _ in _walk(value))
        if cost.places * values + cost.pattern_places * len(text) > _MAX_STEPS:
            return True
    references = _references_to_itself(schema)
    return bool(references > 1 and references ** _depth(value) > _MAX_LOOKS)


class _Cost(NamedTuple):
    """What a schema's check may have to look at."""

    places: int
    """Once its references are followed, those of patterns included."""
    pattern_places: int


@lru_cache(maxsize=256)
def _cost(schema: str) -> _Cost:
    document = json.loads(schema)
    size = _Size(document)
    size.check()
    patterns = [
        pattern
        for node in _walk(document)
        if isinstance(node, dict)
        for pattern in (node.get("pattern"), *_keys(node.get("patternProperties")))
        if isinstance(pattern, str)
    ]
    of_patterns = sum(map(_pattern_places, patterns))
    return _Cost(size.places + of_patterns, of_patterns)


def _keys(node: Any) -> list[str]:
    return list(node) if isinstance(node, dict) else []


@lru_cache(maxsize=256)
def _pattern_places(pattern: str) -> int:
    """About how many characters a pattern has once its repetitions are written out."""
    open_groups = [0]
    at = last = 0
    while at < len(pattern):
        found = _ATOM.match(pattern, at)
        assert found is not None
        at = found.end()
        match found[0][0]:
            case "(":
                open_groups.append(0)
                continue
            case ")":
                last = open_groups.pop() if len(open_groups) > 1 else 0
            case "{" if found[1]:
                last *= max(0, int(found[2] or found[1]) - 1)  # one of them is counted
            case "*" | "+" | "?" | "|":
                continue
            case _:
                last = 1
        open_groups[-1] += last
    return sum(open_groups)


@lru_cache(maxsize=256)
def _references_to_itself(schema: str) -> int:
    """All references of a schema if one of them leads back; else none."""
    document = json.loads(schema)
    size = _Size(document)
    size.check()
    found = [node for node in _walk(document) if isinstance(node, dict) and "$ref" in node]
    return len(found) if size.is_recursive else 0


def _violation_by_child(schema: str, text: str) -> str | None:
    """In a process that can be ended: the check holds the interpreter while it runs."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps([schema, text]).encode(),
            capture_output=True,
            timeout=_CHECK_S,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return f"whether the text fits the schema could not be told within {_CHECK_S:g} s"
    return None if done.stdout.strip() == b"True" else "the text does not fit the schema"


def _pattern_schema(pattern: str) -> str:
    """A schema of texts that match ``pattern``; its dot is any character, as in xgrammar."""
    return json.dumps({"type": "string", "pattern": f"^(?s:{pattern})$"})


@lru_cache(maxsize=256)
def _validator(schema: str) -> Validator:
    """The validator of a schema.

    Raises:
        ValueError: it is no JSON schema.
    """
    try:
        document = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError("a JSON schema is an object")
    _check_nesting(document)
    _Size(document).check()
    try:
        return validator_for(document, offline=True, pattern_options=RegexOptions())
    except ValidationError as error:
        raise ValueError(f"not a JSON schema: {error.message}") from None
    except ValueError as error:
        raise ValueError(f"not a JSON schema: {error}") from None


class _Size:
    """How much there is to check by a schema once what it refers to stands in its place.

    Forty definitions that each refer twice to the next are 2 kB, and 2^40 checks.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._known: dict[str, int] = {}
        self._open: set[str] = set()
        self.is_recursive = False
        """Whether it refers to itself; known after ``check``."""
        self.places = 0
        """Known after ``check``."""

    def check(self) -> None:
        """Refuse more than ``_MAX_EXPANDED`` places.

        Raises:
            ValueError: there are more, or it refers otherwise than by a pointer into itself.
        """
        try:
            self.places = self._of(self._document)
        except RecursionError:
            raise ValueError("the schema refers too deeply") from None
        if self.places > _MAX_EXPANDED:
            raise ValueError(f"the schema, with its references, has over {_MAX_EXPANDED} places")

    def _of(self, node: Any) -> int:
        size = 1 + sum(self._of(child) for child in _children(node))
        if isinstance(node, dict):
            if "$dynamicRef" in node or "$recursiveRef" in node:
                raise ValueError("the schema has a dynamic reference")
            if isinstance(node.get("$ref"), str):
                size += self._of_reference(node["$ref"])
        return min(size, _MAX_EXPANDED + 1)

    def _of_reference(self, reference: str) -> int:
        if not (reference == "#" or reference.startswith("#/")):
            raise ValueError(f"the schema refers to {reference!r}, not into itself (#/...)")
        if reference in self._open or reference == "#":
            self.is_recursive = True
            return 1  # the rest depends on the text
        if reference not in self._known:
            self._open.add(reference)
            self._known[reference] = self._of(self._target(reference))
            self._open.remove(reference)
        return self._known[reference]

    def _target(self, reference: str) -> Any:
        node: Any = self._document
        for step in reference.split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                raise ValueError(f"the schema refers to {reference!r}, which is not there")
        return node


def _check_nesting(document: Any) -> None:
    level = [document]
    for _ in range(_MAX_NESTING):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise ValueError(f"the schema is nested deeper than {_MAX_NESTING} levels")


def _depth(value: Any) -> int:
    """Levels of objects and lists."""
    level: list[Any] = [value]
    depth = 0
    while level := [child for node in level for child in _children(node)]:
        depth += 1
    return depth


def _walk(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node):
        yield from _walk(child)


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []
