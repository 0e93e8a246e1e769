"""Tool calls in a completion's text: found where vLLM's own parsers find them, never evaluated."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.tool_calls import Call, read_calls
from pipeline.tools import Choice, ToolUse

AUTO = ToolUse(choice=Choice.AUTO)
DEEP = "[" * 5_000 + "]" * 5_000

JSON_FORM = [
    '{"name": "f", "parameters": {"a": 1, "b": "x"}}',
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}',
    '{"type": "function", "name": "f", "parameters": {}}',
    '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"c": [1, {"d": null}]}}',
    '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]',
    '<|python_start|>{"name": "f", "parameters": {}}<|python_end|>',
    'I will look. {"name": "f", "parameters": {"città": "Zürich ☃"}} Done.',
    '{"name": "unknown tool", "parameters": {"any": "thing"}}',
    '{"name": "f", "parameters": "no object"}',
    '{"name": "f", "parameters": null}',
    '{"name": "f"}',
    '{"parameters": {}}',
    '{"name": 5, "parameters": {}}',
    '{"name": "f", "parameters": {"a": 1}',
    '{"name": "f", "parameters": {}}; {"name": "g"}',
    "Use {x} for the set.",
    "No call.",
    "",
    '{"name": "f", "parameters": ' + '{"a": ' * 50 + "1" + "}" * 52,
]

PYTHON_FORM = [
    "[f()]",
    '[f(a=1), g(b="x", c=[1, 2.5, None], d={"e": True})]',
    "<|python_start|>[f(a=1)]<|python_end|>",
    "[f(a=-1.5, b=+2, c=(1, 2), d={'x'}, e=null, g=true, h=false)]",
    "[f(a='Zürich ☃', b=f'plain', c='two ' 'parts')]",
    "[f(a=1), module.g(b=2)]",
    "[f(a=1)]\n",
    "[f(a=1)]\n[g()]",
    "[f(a={1: 2, None: 3})]",
    "[f(1)]",
    "[f(a=1), 2]",
    "[f(a=b)]",
    "[f(a=1 + 1)]",
    "[f(a=-'x')]",
    "[f(a=not True)]",
    "[f(a=__import__('os').system('true'))]",
    "[f(a=b'bytes')]",
    "[f(a=1j)]",
    "[f(a=...)]",
    "[f(a=f'{x}')]",
    "[f(a=1",
    "[f(a=1)] and more",
    "[1, 2]",
    "[]",
    " [f(a=1)]",
    "f(a=1)",
    "[_f(a=1)]",
    "[f(a={**b})]",
]

DIFFERENT: dict[str, list[Call]] = {
    # vLLM passes JSON on that is none, and text that no Parquet file can hold
    '{"name": "f", "parameters": {"a": NaN}}': [],
    "[f(a=1e999)]": [],
    '{"name": "\\ud800", "parameters": {}}': [],
    '{"name": "f", "parameters": {"a": "\\ud800"}}': [Call("f", '{"a": "\\ud800"}')],
    # vLLM loses arguments without a name
    "[f(a=1), g(2)]": [],
    "[f(a=1, **{'b': 2})]": [],
    # vLLM misses a call that follows at once
    '{"name": "f", "parameters": {}}{"name": "g", "parameters": {}}': [
        Call("f", "{}"),
        Call("g", "{}"),
    ],
    "[f(a=1),]": [Call("f", '{"a": 1}')],
}


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    """vLLM's parsers of Llama 4's two forms; their tokenizers only need to know a token."""
    from vllm.tool_parsers.llama4_pythonic_tool_parser import Llama4PythonicToolParser
    from vllm.tool_parsers.llama_tool_parser import Llama3JsonToolParser

    tokenizer: Any = SimpleNamespace(get_vocab=lambda: {"<|python_tag|>": 1})
    return {
        "json": Llama3JsonToolParser(tokenizer),
        "python": Llama4PythonicToolParser(tokenizer),
    }


def theirs(parser: Any, text: str) -> list[Call]:
    found = parser.extract_tool_calls(text, request=None).tool_calls
    return [Call(call.function.name, call.function.arguments) for call in found]


@pytest.mark.parametrize(
    ("form", "text"),
    [*(("json", text) for text in JSON_FORM), *(("python", text) for text in PYTHON_FORM)],
)
def test_calls_are_those_that_vllm_finds(parsers: dict[str, Any], form: str, text: str) -> None:
    assert read_calls(AUTO, text) == theirs(parsers[form], text)


def test_the_table_has_calls_and_texts_of_both_forms() -> None:
    found = [len(read_calls(AUTO, text)) for text in (*JSON_FORM, *PYTHON_FORM)]
    assert found[:8] == [1, 1, 1, 1, 2, 2, 1, 1]
    assert found[len(JSON_FORM) : len(JSON_FORM) + 4] == [1, 2, 1, 1]
    assert found.count(0) > 20


@pytest.mark.parametrize(("text", "calls"), DIFFERENT.items())
def test_where_vllm_would_lose_or_break_a_call_this_does_not(
    text: str, calls: list[Call], parsers: dict[str, Any]
) -> None:
    assert read_calls(AUTO, text) == calls
    assert theirs(parsers["python" if text.startswith("[") else "json"], text) != calls


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "parameters": ' + DEEP + "}",
        "[f(a=" + DEEP + ")]",
        "[f(a=" + "-" * 100_000 + "1)]",
        "[f(a=" + "9" * 10_000 + ")]",
        "[f(a='\0')]",
    ],
)
def test_a_text_that_cannot_be_parsed_is_no_call(text: str) -> None:
    assert read_calls(AUTO, text) == []


def test_without_parallel_calls_the_first_counts() -> None:
    use = ToolUse(choice=Choice.AUTO, parallel=False)
    assert read_calls(use, "[f(a=1), g()]") == [Call("f", '{"a": 1}')]


def test_a_required_call_is_an_item_of_a_list_and_a_named_ones_arguments_are_the_text() -> None:
    required = ToolUse(choice=Choice.REQUIRED)
    text = json.dumps([{"name": "f", "parameters": {"a": "ü"}}, {"name": "g", "parameters": {}}])
    assert read_calls(required, text) == [Call("f", '{"a": "ü"}'), Call("g", "{}")]
    named = ToolUse(choice=Choice.NAMED, name="f")
    assert read_calls(named, ' {"a": 1}') == [Call("f", ' {"a": 1}')]
