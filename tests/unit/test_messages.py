"""Requests in every shape of the contract come out in one normal form, or as the row's error."""

import base64
import json
from typing import Any

import pytest

from pipeline.errors import ErrorCode, RowError
from pipeline.messages import parse_chat

PNG = b"\x89PNG..."
IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_a_prompt_is_one_user_message() -> None:
    chat = parse_chat("Hello", None, None)
    assert chat.messages == [{"role": "user", "content": "Hello"}]
    assert chat.images == ()


def test_a_prompts_images_come_before_its_text() -> None:
    chat = parse_chat("Which?", None, [PNG, "images/b.png"])
    assert chat.messages[0]["content"] == [IMAGE, IMAGE, text("Which?")]
    assert chat.images == (PNG, "images/b.png")


@pytest.mark.parametrize(
    "item", [PNG, {"bytes": PNG, "path": None}, {"bytes": PNG, "path": "x.png"}]
)
def test_images_are_bytes_or_hf_structs(item: Any) -> None:
    assert parse_chat("?", None, [item]).images == (PNG,)


def test_an_hf_struct_without_bytes_is_its_path() -> None:
    assert parse_chat("?", None, [{"bytes": None, "path": "x.png"}]).images == ("x.png",)


def test_messages_may_be_a_list_or_its_json() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert parse_chat(None, messages, None) == parse_chat(None, json.dumps(messages), None)


def test_image_parts_take_the_rows_images_in_order_and_urls_stay_in_place() -> None:
    link = {"type": "image_url", "image_url": {"url": "s3://b/x.png"}}
    inline = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()},
    }
    messages = [{"role": "user", "content": [IMAGE, link, text("a"), inline, IMAGE]}]
    assert parse_chat(None, messages, [b"1", b"2"]).images == (b"1", "s3://b/x.png", PNG, b"2")


def test_null_fields_of_arrow_structs_are_ignored() -> None:
    messages = [{"role": "user", "content": [{**text("a"), "image_url": None}], "name": None}]
    assert parse_chat(None, messages, None).messages[0]["content"] == [text("a")]


@pytest.mark.parametrize(
    ("prompt", "messages", "images", "code", "words"),
    [
        (None, None, None, ErrorCode.INVALID_MESSAGES, "neither prompt nor messages"),
        ("", None, None, ErrorCode.INVALID_MESSAGES, "the prompt is empty"),
        ("", None, [], ErrorCode.INVALID_MESSAGES, "the prompt is empty"),
        (None, [{"role": "user", "content": ""}], None, "invalid_messages", "prompt is empty"),
        (
            None,
            [{"role": "system", "content": ""}, {"role": "user", "content": [text(""), text("")]}],
            None,
            "invalid_messages",
            "prompt is empty",
        ),
        ("a", [{"role": "user", "content": "b"}], None, ErrorCode.INVALID_MESSAGES, "not both"),
        (None, "{not json", None, ErrorCode.INVALID_MESSAGES, "not valid JSON"),
        (None, [], None, ErrorCode.INVALID_MESSAGES, "non-empty"),
        (None, [{"role": "king", "content": "a"}], None, ErrorCode.INVALID_MESSAGES, "role"),
        (None, [{"role": "user"}], None, ErrorCode.INVALID_MESSAGES, "content"),
        (None, [{"role": "user", "content": [IMAGE]}], None, ErrorCode.INVALID_MESSAGES, "no more"),
        (None, [{"role": "user", "content": "a"}], [PNG], ErrorCode.INVALID_MESSAGES, "0 of 1"),
        (
            None,
            [{"role": "user", "content": [{"type": "video"}]}],
            None,
            "invalid_messages",
            "type",
        ),
        (
            None,
            [{"role": "user", "content": "a", "tool_calls": [1]}],
            None,
            "invalid_messages",
            "t",
        ),
        ("a\ud800", None, None, ErrorCode.INVALID_MESSAGES, "lone surrogate at character 1"),
        ("a", None, [None], ErrorCode.IMAGE_INVALID, r"images[0] is null"),
        ("a", None, [PNG, b""], ErrorCode.IMAGE_INVALID, r"images[1] is null or empty"),
    ],
)
def test_what_cannot_be_asked_is_the_rows_error(
    prompt: Any, messages: Any, images: Any, code: ErrorCode, words: str
) -> None:
    with pytest.raises(RowError) as caught:
        parse_chat(prompt, messages, images)
    assert caught.value.code == code
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("prompt", "messages", "images"),
    [
        (" ", None, None),
        ("\n", None, None),
        ("", None, [PNG]),
        (None, [{"role": "user", "content": " "}], None),
        (None, [{"role": "system", "content": "Be."}, {"role": "user", "content": ""}], None),
        (None, [{"role": "user", "content": [text(""), IMAGE]}], [PNG]),
    ],
)
def test_blanks_or_an_image_alone_are_a_prompt(prompt: Any, messages: Any, images: Any) -> None:
    assert parse_chat(prompt, messages, images).messages


def call(name: str = "f", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function, **more}


def assistant(*calls: Any, content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def only(turn: dict[str, Any]) -> dict[str, Any]:
    return parse_chat(None, [turn], None).messages[0]


def test_a_turn_that_calls_tools_needs_no_content_and_its_arguments_are_parsed() -> None:
    turn = only(assistant(call("f", '{"a": {"b": "ü"}}'), call("g", "")))
    calls = [call("f", {"a": {"b": "ü"}}), call("g", {})]
    assert turn == {"role": "assistant", "content": None, "tool_calls": calls}


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "7", "", None, "true"])
def test_arguments_that_are_no_object_count_as_none_as_in_vllm(arguments: Any) -> None:
    assert only(assistant(call("f", arguments)))["tool_calls"][0]["function"]["arguments"] == {}


def test_a_tools_answer_names_its_call() -> None:
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "12 °C"}
    assert only(answer) == answer


def test_null_keys_of_openais_messages_and_of_nested_structs_are_ignored() -> None:
    absent = {"name": None, "refusal": None, "audio": None, "function_call": None}
    plain: dict[str, Any] = {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [],
        "tool_call_id": None,
    }
    assert only({**plain, **absent}) == {"role": "assistant", "content": "Hello"}
    sparse = call("f", None, index=None)
    assert only({**assistant({**sparse, "id": None}, content=[]), **absent}) == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (assistant(content=None), "messages[0].content must be a string"),
        ({"role": "user", "content": "a", "tool_calls": [call()]}, "tool_calls is not supported"),
        ({"role": "user", "content": "a", "tool_call_id": "c"}, "tool_call_id is not supported"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "refusal is not supported"),
        ({"role": "assistant", "content": "a", "tool_calls": "f()"}, "tool_calls must be a list"),
        ({"role": "tool", "content": "a", "tool_call_id": 7}, "tool_call_id must be a string"),
        (assistant("f()"), "tool_calls[0] must be an object"),
        (assistant({"id": "c"}), "tool_calls[0].function must be an object"),
        (assistant(call("f", index=1)), "tool_calls[0].index is not supported"),
        (assistant(call("f", type="custom")), "tool_calls[0].type = 'custom'"),
        (assistant(call("f"), call(None)), "tool_calls[1].function.name must be a string"),  # type: ignore[arg-type]
        (assistant(call("f", {"a": 1})), "function.arguments must be a string"),
        (assistant(call("f", '"\ud800"')), "lone surrogate"),
        (assistant(call("f", '{"a": "\\ud800"}')), "lone surrogate"),
        (assistant(call("f", "[" * 100_000)), "nested too deeply"),
    ],
)
def test_a_wrong_tool_turn_is_the_rows_error(turn: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_chat(None, [turn], None)
    assert caught.value.code == ErrorCode.INVALID_MESSAGES
    assert words in caught.value.message


def test_images_of_several_turns_stay_in_order() -> None:
    def ask(*parts: Any) -> dict[str, Any]:
        return {"role": "user", "content": list(parts)}

    link = {"type": "image_url", "image_url": {"url": "s3://b/x.png"}}
    messages = [
        ask(IMAGE, text("a")),
        {"role": "assistant", "content": [link]},
        {"role": "tool", "content": [text("seen"), IMAGE]},
        ask(text("b"), IMAGE),
    ]
    assert parse_chat(None, messages, [b"1", b"2", b"3"]).images == (
        b"1",
        "s3://b/x.png",
        b"2",
        b"3",
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "a", "image_url": {"url": "x.png"}},
        {"type": "image_url", "image_url": {"url": "x.png"}, "text": "a"},
        {"type": "text", "text": "a", "detail": "high"},
    ],
)
def test_what_a_part_of_its_type_has_no_use_for_is_not_ignored(part: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="is not supported in a part of type"):
        parse_chat(None, [{"role": "user", "content": [part]}], None)


def test_base64_beyond_ascii_is_no_image() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,\u00e9"}}
    with pytest.raises(RowError) as caught:
        parse_chat(None, [{"role": "user", "content": [part]}], None)
    assert caught.value.code is ErrorCode.IMAGE_INVALID
