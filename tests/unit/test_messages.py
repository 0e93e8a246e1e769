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
