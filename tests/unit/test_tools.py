"""Tools as a request offers them: OpenAI's shapes, checked; a forced call has vLLM's schema."""

import copy
import json
from typing import Any

import pytest

from pipeline.errors import ErrorCode, RowError
from pipeline.sampling import Sampling, SamplingDefaults, parse_row_sampling, resolve
from pipeline.structured import StructureKind, violation
from pipeline.tools import Choice, ToolUse

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PLACE = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/point"}},
    "$defs": {"point": {"type": "array", "items": {"type": "number"}}},
}
OTHER_POINT = {**PLACE, "$defs": {"point": {"type": "string"}}}
NOTHING = {"type": "object"}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more}
    return {
        "type": "function",
        "function": function if parameters is None else {**function, "parameters": parameters},
    }


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def request(run: dict[str, Any] | None = None, **row: Any) -> Sampling:
    return resolve(SamplingDefaults(**run or {}), parse_row_sampling(row))


def test_with_tools_the_model_chooses_and_without_them_the_text_is_text() -> None:
    assert request().tool_use is None
    assert request(tools=[tool("f")]).tool_use == ToolUse(choice=Choice.AUTO)
    assert request(tools=[tool("f")], tool_choice="none").tool_use is None
    assert request(tools=[tool("f")]).structure is None


def test_the_runs_tools_are_the_rows_unless_it_brings_its_own() -> None:
    run = {"tools": [tool("f"), tool("g")]}
    use = request(run, tool_choice=named("g"), parallel_tool_calls=False).tool_use
    assert use == ToolUse(choice=Choice.NAMED, name="g", parallel=False)
    assert request(run, tool_choice="none").tool_use is None
    with pytest.raises(RowError, match="'g', which is none of the tools"):
        request(run, tools=[tool("h")], tool_choice=named("g"))


def test_nested_parameters_may_be_json_strings() -> None:
    given = {"tools": [tool("f", CITY)], "tool_choice": named("f")}
    written = {key: json.dumps(value) for key, value in given.items()}
    assert parse_row_sampling(written) == parse_row_sampling(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "at most 128 tools, not 129"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1]: a second tool of the name 'f'"),
        ({"tools": [tool("f g")]}, "tools[0].function.name"),
        ({"tools": [tool("f" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("f", surprise=1)]}, "tools[0].function.surprise"),
        ({"tools": [tool("f", {"type": "thing"})]}, "tools[0].function.parameters: not a JSON"),
        ({"tools": [tool("f", description="\ud800")]}, "lone surrogate"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": "[{]"}, "tools is not valid JSON"),
        ({"tools": [tool("f")], "tool_choice": "perhaps"}, "'none', 'auto' or 'required'"),
        ({"tools": [tool("f")], "tool_choice": named("g")}, "'g', which is none of the tools"),
        ({"tool_choice": "auto"}, "want tools"),
        ({"parallel_tool_calls": True}, "want tools"),
        ({"tools": [tool("f")], "response_format": {"type": "json_object"}}, "or a structure"),
        (
            {"tools": [tool("f", PLACE), tool("g", OTHER_POINT)], "tool_choice": "required"},
            "tool 'g' defines $defs.point unlike another tool",
        ),
    ],
)
def test_what_is_not_openais_or_cannot_be_kept_is_the_rows_error(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(RowError) as caught:
        request(**given)
    assert caught.value.code == ErrorCode.INVALID_PARAMETER
    assert words in caught.value.message


def test_tool_choice_none_goes_with_a_structure() -> None:
    asked = request(
        tools=[tool("f")], tool_choice="none", response_format={"type": "json_object"}
    ).structure
    assert asked is not None
    assert asked.kind is StructureKind.JSON_OBJECT


@pytest.mark.parametrize("parallel", [None, True, False])
@pytest.mark.parametrize("choice", ["required", named("f"), named("h")])
def test_a_forced_call_has_the_schema_that_vllms_server_asks_for(
    choice: Any, parallel: bool | None
) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionNamedToolChoiceParam,
        ChatCompletionToolsParam,
    )
    from vllm.tool_parsers.utils import get_json_schema_from_tools

    tools = [tool("f", CITY), tool("g", PLACE, description="where"), tool("h")]
    asked = request(tools=tools, tool_choice=choice, parallel_tool_calls=parallel).structure
    assert asked is not None
    expected = get_json_schema_from_tools(
        choice if choice == "required" else ChatCompletionNamedToolChoiceParam(**choice),
        [ChatCompletionToolsParam(**item) for item in copy.deepcopy(tools)],
        parallel,
    )
    assert json.loads(asked.spec) == expected


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('[{"name": "f", "parameters": {"city": "Oslo"}}]', True),
        ('[{"name": "g", "parameters": {"at": [1, 2]}}, {"name": "h", "parameters": {}}]', True),
        ('[{"name": "f", "parameters": {}}]', False),
        ('[{"name": "g", "parameters": {"at": ["x"]}}]', False),
        ('[{"name": "nobody", "parameters": {}}]', False),
        ("[]", False),
        ('{"name": "h", "parameters": {}}', False),
        ("I would rather not.", False),
    ],
)
def test_a_required_call_is_held_to_its_tool(text: str, fits: bool) -> None:
    tools = [tool("f", CITY), tool("g", PLACE), tool("h", NOTHING)]
    asked = request(tools=tools, tool_choice="required").structure
    assert asked is not None
    assert (violation(asked, text) is None) == fits
