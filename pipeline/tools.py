"""Tools a model may call: what a request offers, and what that asks of the completion.

In: a request's ``tools``, ``tool_choice`` and ``parallel_tool_calls``, in OpenAI's shapes. Out: one
``ToolUse``, by which ``tool_calls`` reads the completion, and for a completion that must be a call
the ``Structure`` which holds the engine to it. The tools themselves go to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.structured import RequestPart, Structure, json_structure

_MAX_TOOLS = 128  # OpenAI's limit
_NO_PARAMETERS = {"type": "object", "properties": {}}
Tool = Mapping[str, Any]
"""One entry of ``tools``, as the request has it: the chat template sees every key in its order."""


class Choice(StrEnum):
    """What a completion may or must be, once tools are offered."""

    AUTO = "auto"
    """Text, or calls in the model's own syntax."""
    REQUIRED = "required"
    """A JSON list of calls."""
    NAMED = "named"
    """The arguments of one tool, as JSON."""


class ToolUse(BaseModel):
    """How a completion's tool calls are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: Choice
    name: str | None = None
    """The tool, where one is named."""
    parallel: bool = True
    """Whether more than one call counts."""


class _Named(RequestPart):
    name: str


class NamedTool(RequestPart):
    """OpenAI's ``tool_choice`` of one tool."""

    type: Literal["function"]
    function: _Named


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class _Function(RequestPart):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _check(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        json_structure(schema or {})
        return schema


class _Tool(RequestPart):
    type: Literal["function"]
    function: _Function


def check_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``tools``, if they are OpenAI's.

    Raises:
        ValueError: they are not; says which one and why.
    """
    if len(tools) > _MAX_TOOLS:
        raise ValueError(f"at most {_MAX_TOOLS} tools, not {len(tools)}")
    try:
        json.dumps(tools, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate is not allowed") from None
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        try:
            name = _Tool.model_validate(tool).function.name
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ".".join(str(step) for step in (f"tools[{index}]", *fault["loc"]))
            raise ValueError(f"{where}: {fault['msg'].removeprefix('Value error, ')}") from None
        if name in seen:
            raise ValueError(f"tools[{index}]: a second tool of the name {name!r}")
        seen.add(name)
    return tools


def tool_use(
    tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool | None
) -> ToolUse | None:
    """How calls are read from a completion; None: not at all.

    Raises:
        ValueError: ``choice`` or ``parallel`` without tools, or a tool named that is not there.
    """
    if not tools:
        if choice not in (None, "none") or parallel is not None:
            raise ValueError("tool_choice and parallel_tool_calls want tools")
        return None
    if choice == "none":
        return None
    several = parallel is not False
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if all(tool["function"]["name"] != name for tool in tools):
            raise ValueError(f"tool_choice names {name!r}, which is none of the tools")
        return ToolUse(choice=Choice.NAMED, name=name, parallel=several)
    return ToolUse(choice=Choice(choice or "auto"), parallel=several)


def tool_structure(tools: Sequence[Tool], use: ToolUse) -> Structure | None:
    """The shape of a completion that must be a call, as vLLM's server asks for it.

    Raises:
        ValueError: two tools differ in a ``$defs`` of one name, or the schema gets too long.
    """
    if use.choice is Choice.AUTO:
        return None
    schemas = {tool["function"]["name"]: _parameters(tool) for tool in tools}
    if use.name is not None:
        return json_structure(schemas[use.name])
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "anyOf": [_call_schema(name, schema) for name, schema in schemas.items()],
        },
    }
    if not use.parallel:
        schema["maxItems"] = 1
    if definitions := _definitions(schemas):
        schema["$defs"] = definitions
    return json_structure(json.dumps(schema))


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool["function"].get("parameters") or _NO_PARAMETERS


def _call_schema(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in parameters.items() if key != "$defs"}
    return {
        "properties": {"name": {"type": "string", "enum": [name]}, "parameters": own},
        "required": ["name", "parameters"],
    }


def _definitions(schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All tools' ``$defs``: references to them start at the root of the schema."""
    found: dict[str, Any] = {}
    for tool, schema in schemas.items():
        for name, definition in schema.get("$defs", {}).items():
            if found.setdefault(name, definition) != definition:
                raise ValueError(f"tool {tool!r} defines $defs.{name} unlike another tool")
    return found
