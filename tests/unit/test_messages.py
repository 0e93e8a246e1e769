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
        (None, [{"role": "user"}], None, ErrorCode.INVALID_MESSAGES, "no message has any text"),
        (None, [{"role": "user", "content": 7}], None, ErrorCode.INVALID_MESSAGES, "content"),
        (None, [{"role": "user", "text": "a"}], None, ErrorCode.INVALID_MESSAGES, "text is not"),
        (None, [{"from": "human", "value": "a"}], None, "invalid_messages", "ShareGPT"),
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
        (assistant(content=None), "the prompt is empty"),
        ({"role": "user", "content": "a", "tool_calls": [call()]}, "tool_calls is not supported"),
        ({"role": "user", "content": "a", "tool_call_id": "c"}, "tool_call_id is not supported"),
        (
            {"role": "assistant", "content": "a", "function_call": {"name": "f"}},
            "function_call is not supported; give tool_calls",
        ),
        ({"role": "user", "content": "a", "images": [b"1"]}, "into the images column"),
        ({"role": "assistant", "content": "a", "tool_calls": "f()"}, "tool_calls must be a list"),
        ({"role": "tool", "content": "a", "tool_call_id": 7}, "tool_call_id must be a string"),
        (assistant("f()"), "tool_calls[0] must be an object"),
        (assistant({"id": "c"}), "tool_calls[0].function must be an object"),
        (assistant(call("f", type="custom")), "tool_calls[0].type = 'custom'"),
        (assistant(call("f"), call(None)), "tool_calls[1].function.name must be a string"),  # type: ignore[arg-type]
        (assistant(call("f", 1)), "function.arguments must be a string"),
        (assistant(call("f", {"a": "\ud800"})), "lone surrogate"),
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
    ("part", "key"),
    [
        ({"type": "text", "text": "a", "image_url": {"url": "x.png"}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": "x.png"}, "text": "a"}, "text"),
        ({"type": "image_url", "url": "x.png"}, "url"),
        ({"type": "image", "source": {"type": "base64", "data": "eA=="}}, "source"),
        ({"type": "input_image", "file_id": "file-1"}, "file_id"),
        ({"type": "image", "video": "x.mp4"}, "video"),
        ({"type": "image", "video_path": "x.mp4"}, "video_path"),
        ({**text("a"), "document": {"text": "b"}}, "document"),
        ({**text("a"), "documents": ["b"]}, "documents"),
        ({**text("a"), "context": "b"}, "context"),
        ({**text("a"), "file_ids": ["file-1"]}, "file_ids"),
    ],
)
def test_a_part_is_refused_rather_than_read_without_its_content(
    part: dict[str, Any], key: str
) -> None:
    with pytest.raises(RowError) as caught:
        parse_chat(None, [{"role": "user", "content": [part]}], [PNG])
    assert f"messages[0].content[0].{key} is not supported" in caught.value.message


BIG_PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(60))
BASE64 = base64.b64encode(BIG_PNG).decode()


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": "s3://b/x.png"}, "s3://b/x.png"),
        ({"type": "image", "image": "file:///data/x.png", "max_pixels": 9}, "file:///data/x.png"),
        ({"type": "image", "image": f"data:image;base64,{BASE64}"}, BIG_PNG),
        ({"type": "image", "image": BASE64}, BIG_PNG),
        ({"type": "image", "image": PNG}, PNG),
        ({"type": "image", "image": {"bytes": PNG, "path": None}}, PNG),
        ({"type": "image", "url": "https://example.com/x.png"}, "https://example.com/x.png"),
        ({"type": "image", "path": "pictures/x.png"}, "pictures/x.png"),
        ({"type": "image", "base64": base64.b64encode(b"tiny").decode()}, b"tiny"),
        ({"type": "image", "base64": f"data:image/png;base64,{BASE64}"}, BIG_PNG),
        ({"type": "image_url", "image_url": "s3://b/x.png"}, "s3://b/x.png"),
        ({"type": "image_url", "image_url": {"url": "x.png", "detail": "low"}}, "x.png"),
        ({"type": "input_image", "image_url": "x.png", "detail": "auto"}, "x.png"),
        ({"type": "image", "image": "a.png", "image_url": {"url": "s3://b/k"}}, "s3://b/k"),
        ({"type": "image_url", "image": "x", "image_url": "s3://b/k"}, "s3://b/k"),
        ({"type": "image", "image": "x.png", "index": 7}, "x.png"),
        ({"type": "image", "image": "pictures/x"}, "pictures/x"),
        ({"type": "image", "path": "image_0"}, "image_0"),
    ],
)
def test_a_part_that_names_an_image_never_takes_the_columns(
    part: dict[str, Any], image: bytes | str
) -> None:
    messages = [{"role": "user", "content": [part, IMAGE]}]
    assert parse_chat(None, messages, [b"column"]).images == (image, b"column")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": None, "image_url": None},
        {"type": "image", "image_url": {"url": None}},
        {"type": "image", "image": {"bytes": None, "path": None}, "text": ""},
        {"type": "image", "video": {"url": None}},
        {"type": "image", "image": ""},
        {"type": "image", "image": True},
        {"type": "image", "image": "image_0"},
        {"type": "image", "image": "<image>"},
    ],
)
def test_a_part_without_an_image_of_its_own_takes_the_columns(part: dict[str, Any]) -> None:
    assert parse_chat(None, [{"role": "user", "content": [part]}], [PNG]).images == (PNG,)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "image": "a.png", "url": "b.png"}, "has image and url: give one"),
        ({"type": "image", "image": 7}, "content[0].image is null or empty"),
        ({"type": "image", "image": "a.png"}, "the part brings its own image; leave the images"),
        ({"type": "image_url", "image": "x.png"}, "image_url must be a string, or an object"),
        ({"type": "image", "index": 1}, "image 1, which the images column lacks or another part"),
        ({"type": "image", "index": "0"}, "image '0', which the images column lacks"),
        ({"type": "image_url"}, "image_url must be a string, or an object with a url"),
        ({"type": "input_image", "image_url": {"url": 7}}, "image_url.url must be a string"),
        ({"type": "image", "base64": "no base64!"}, "bad base64"),
    ],
)
def test_an_image_part_that_cannot_be_read_names_its_fault(
    part: dict[str, Any], words: str
) -> None:
    with pytest.raises(RowError) as caught:
        parse_chat(None, [{"role": "user", "content": [part]}], [PNG])
    assert words in caught.value.message


def ask_of(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_a_name_is_read_as_a_file_where_the_column_has_no_image_left() -> None:
    named = {"type": "image", "image": "image_0"}
    assert parse_chat(None, ask_of(named), None).images == ("image_0",)
    assert parse_chat(None, ask_of(IMAGE, named), [PNG]).images == (PNG, "image_0")


def test_the_index_of_a_part_picks_the_columns_image() -> None:
    parts = [{**IMAGE, "index": 1}, {**IMAGE, "index": 0.0}, {**IMAGE, "index": None}]
    assert parse_chat(None, ask_of(*parts), [b"A", b"B", b"C"]).images == (b"B", b"A", b"C")
    with pytest.raises(RowError, match="image 0, which the images column lacks or another part"):
        parse_chat(None, ask_of(IMAGE, {**IMAGE, "index": 0}), [b"A", b"B"])


@pytest.mark.parametrize("item", [BASE64, f"data:image/png;base64,{BASE64}", f"{BASE64}\n"])
def test_the_images_column_may_hold_base64(item: str) -> None:
    assert parse_chat("?", None, [item]).images == (BIG_PNG,)


@pytest.mark.parametrize("uri", ["iVBORw0KGgo.png", "/9j/" + "a" * 80 + ".jpg", "Qk" + "a" * 99])
def test_a_uri_that_begins_like_base64_stays_a_uri(uri: str) -> None:
    assert parse_chat("?", None, [uri]).images == (uri,)


def test_keys_that_hold_nothing_of_the_prompt_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    part = {**text("a"), "cache_control": {"type": "ephemeral"}}
    assert only({"role": "user", "content": [part], "timestamp": 1, "id": "m1"}) == {
        "role": "user",
        "content": [text("a")],
    }
    extra: dict[str, Any] = {"reasoning_content": "hm", "annotations": [], "refusal": "no"}
    assert only({**assistant(call("f", "{}", index=0)), **extra}) == assistant(call("f", {}))
    for _ in range(2):
        only({"role": "user", "content": "a", "told_once": True})
    assert [record.getMessage() for record in caplog.records].count(
        "messages have a key 'told_once', which is left out of the prompt"
    ) == 1


def test_text_may_stand_in_parts_as_vllm_reads_them() -> None:
    parts = ["a", {"type": "input_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    assert only({"role": "user", "content": parts})["content"] == [text("a"), text("b"), text("c")]


@pytest.mark.parametrize("role", ["assistant", "user", "tool"])
@pytest.mark.parametrize("content", [None, []])
def test_a_turn_may_have_no_content(role: str, content: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": role, "content": content}]
    assert parse_chat(None, turns, None).messages[1] == {"role": role, "content": None}


def test_arguments_of_earlier_calls_may_be_objects() -> None:
    turn = only(assistant(call("f", {"city": "Köln", "days": [1, None]})))
    assert turn["tool_calls"][0]["function"]["arguments"] == {"city": "Köln", "days": [1, None]}


@pytest.mark.parametrize(("prompt", "messages"), [("", "hi"), (None, "hi"), ("hi", [])])
def test_an_empty_prompt_or_empty_messages_count_as_absent(prompt: Any, messages: Any) -> None:
    turns = [{"role": "user", "content": "hi"}] if messages else messages
    assert parse_chat(prompt, turns, None).messages == [{"role": "user", "content": "hi"}]


def test_base64_beyond_ascii_is_no_image() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,\u00e9"}}
    with pytest.raises(RowError) as caught:
        parse_chat(None, [{"role": "user", "content": [part]}], None)
    assert caught.value.code is ErrorCode.IMAGE_INVALID
