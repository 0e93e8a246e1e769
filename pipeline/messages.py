"""What a row asks for: chat messages and the images they refer to, in one normal form.

In: a row's ``prompt``, ``messages`` and ``images`` values in any of the contract's shapes. Out: a
``Chat`` (plain role/content dictionaries for a chat template, and image sources in prompt order),
or ``RowError(invalid_messages)``. A raw prompt, which no template touches, is a ``RawPrompt``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ErrorCode, RowError

_MESSAGE_KEYS = ("role", "content", "name")
_KEYS_OF_ROLE = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}
_ROLES = ("system", "developer", "user", "assistant", "tool")

_PART_TYPES = ("text", "image", "image_url")

ImageSource = bytes | str
"""Encoded bytes, or a URI to fetch them from."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the chat template, and the images their image parts stand for, in order."""

    messages: list[dict[str, Any]]
    """``content`` is a string, parts, or None beside ``tool_calls``, whose arguments are parsed."""
    images: tuple[ImageSource, ...]


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """Text for the tokenizer as it is, or tokens, as the completions endpoint takes them."""

    text: str
    images: tuple[ImageSource, ...] = ()
    """None: only messages can place them."""
    token_ids: tuple[int, ...] = ()
    """The prompt's tokens, instead of ``text``."""


def parse_raw_prompt(prompt: Any) -> RawPrompt:
    """A raw prompt, checked.

    Raises:
        RowError: ``invalid_messages``: neither a string nor a list of token ids (lists of prompts
            are not supported), or an empty one.
    """
    if not isinstance(prompt, str | list):
        raise _invalid(f"prompt must be one string, not {type(prompt).__name__}")
    if not prompt:
        raise _invalid("the prompt is empty")
    if isinstance(prompt, list):
        strange = next((item for item in prompt if type(item) is not int), None)
        if strange is not None:
            raise _invalid(
                "prompt must be one string or one list of token ids, not a list with "
                f"{type(strange).__name__}"
            )
        return RawPrompt("", token_ids=tuple(prompt))
    return RawPrompt(_checked_text(prompt, "prompt"))


def parse_chat(prompt: Any, messages: Any, images: Any) -> Chat:
    """A row's request in normal form.

    Raises:
        RowError: ``invalid_messages``, ``image_invalid``; the message names part and remedy.
    """
    if isinstance(images, str | bytes | Mapping):
        images = [images]  # a column of single images, as many data sets have it
    if images is not None and not isinstance(images, list):
        raise RowError(ErrorCode.IMAGE_INVALID, f"images is {type(images).__name__}, not a list")
    sources = [_image_source(item, index) for index, item in enumerate(images or ())]
    if messages is None:
        return _from_prompt(prompt, sources)
    if prompt is not None:
        raise _invalid("give prompt or messages, not both")
    turns = _load(messages)
    attached: list[ImageSource] = []
    unused = list(sources)
    chat = [_turn(turn, index, unused, attached) for index, turn in enumerate(turns)]
    if unused:
        raise _invalid(
            f"messages refer to {len(sources) - len(unused)} of {len(sources)} images; "
            "give each image a part {'type': 'image'}"
        )
    if not any(_says_something(turn) for turn in chat):
        raise _invalid("the prompt is empty: no message has any text or image")
    return Chat(chat, tuple(attached))


def _from_prompt(prompt: Any, images: list[ImageSource]) -> Chat:
    if prompt is None:
        raise _invalid("the row has neither prompt nor messages")
    if not isinstance(prompt, str):
        raise _invalid(f"prompt must be a string, not {type(prompt).__name__}")
    if not prompt and not images:
        raise _invalid("the prompt is empty")
    content: Any = _checked_text(prompt, "prompt")
    if images:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    return Chat([{"role": "user", "content": content}], tuple(images))


def _load(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise _invalid(f"messages is not valid JSON: {error}") from None
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages must be a non-empty list of {role, content}")
    return messages


def _turn(
    turn: Any, index: int, unused: list[ImageSource], attached: list[ImageSource]
) -> dict[str, Any]:
    """One message; image parts move sources from ``unused`` (the row's) to ``attached``."""
    where = f"messages[{index}]"
    if not isinstance(turn, Mapping):
        raise _invalid(f"{where} must be an object with role and content")
    role = turn.get("role")
    if role not in _ROLES:
        raise _invalid(f"{where}.role = {role!r}: must be one of {', '.join(_ROLES)}")
    given = {key: value for key, value in turn.items() if value not in (None, [])}
    known = {"role": role, **_known_keys(given, role, where)}
    content = given.get("content")
    if content is None and "tool_calls" in known:
        return {**known, "content": None}
    if isinstance(content, str):
        return {**known, "content": _checked_text(content, f"{where}.content")}
    if not isinstance(content, list) or not content:
        raise _invalid(f"{where}.content must be a string or a non-empty list of parts")
    parts = [
        _part(part, f"{where}.content[{number}]", unused, attached)
        for number, part in enumerate(content)
    ]
    return {**known, "content": parts}


def _known_keys(given: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a message has beside role and content."""
    for key in given:
        if key not in (*_MESSAGE_KEYS, *_KEYS_OF_ROLE.get(role, ())):
            raise _invalid(f"{where}.{key} is not supported")
    known = {
        key: _string(given[key], f"{where}.{key}")
        for key in ("name", "tool_call_id")
        if key in given
    }
    if "tool_calls" not in given:
        return known
    calls = given["tool_calls"]
    if not isinstance(calls, list):
        raise _invalid(f"{where}.tool_calls must be a list")
    numbered = enumerate(calls)
    return {**known, "tool_calls": [_call(c, f"{where}.tool_calls[{i}]") for i, c in numbered]}


def _call(call: Any, where: str) -> dict[str, Any]:
    """An earlier call of a tool, its arguments parsed, as chat templates want them."""
    function = _keys(call, ("id", "type", "function"), where).get("function")
    if call.get("type") not in (None, "function"):
        raise _invalid(f"{where}.type = {call['type']!r}: must be function")
    said = _keys(function, ("name", "arguments"), f"{where}.function")
    name = _string(said.get("name"), f"{where}.function.name")
    arguments = _arguments(said.get("arguments", ""), f"{where}.function.arguments")
    own = {"id": _string(call["id"], f"{where}.id")} if call.get("id") is not None else {}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(text: Any, where: str) -> dict[str, Any]:
    """Parsed; what is no JSON object (a model wrote it) counts as none, as in vLLM."""
    try:
        parsed = json.loads(_string(text, where))
    except ValueError:
        return {}
    except RecursionError:
        raise _invalid(f"{where} is nested too deeply") from None
    _checked_text(json.dumps(parsed, ensure_ascii=False), where)
    return parsed if isinstance(parsed, dict) else {}


def _keys(value: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """``value`` without what is null, if it is an object of these keys."""
    if not isinstance(value, Mapping):
        raise _invalid(f"{where} must be an object")
    given = {key: item for key, item in value.items() if item is not None}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise _invalid(f"{where}.{unknown[0]} is not supported")
    return given


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _invalid(f"{where} must be a string")
    return _checked_text(value, where)


def _says_something(turn: Mapping[str, Any]) -> bool:
    """Whether a message, in normal form, has text (blanks count), an image or a call."""
    content = turn["content"]
    if content is None or isinstance(content, str):
        return bool(content or turn.get("tool_calls"))
    return any(part["type"] == "image" or part["text"] for part in content)


def _part(
    part: Any, where: str, unused: list[ImageSource], attached: list[ImageSource]
) -> dict[str, str]:
    if not isinstance(part, Mapping):
        raise _invalid(f"{where} must be an object with a type")
    kind = part.get("type")
    known = ("type", "text") if kind == "text" else ("type", "image", "image_url")
    unknown = [key for key, value in part.items() if value is not None and key not in known]
    if kind in _PART_TYPES and unknown:
        raise _invalid(f"{where}.{unknown[0]} is not supported in a part of type {kind}")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise _invalid(f"{where}.text must be a string")
        return {"type": "text", "text": _checked_text(text, where)}
    if kind not in _PART_TYPES:
        raise _invalid(f"{where}.type = {kind!r}: must be text, image or image_url")
    attached.append(_part_image(part, where, unused))
    return {"type": "image"}


def _part_image(part: Mapping[str, Any], where: str, unused: list[ImageSource]) -> ImageSource:
    link = part.get("image_url")
    url = link.get("url") if isinstance(link, Mapping) else link
    if url is None and part.get("type") == "image":
        if not unused:
            raise _invalid(f"{where} refers to an image, but the images column has no more")
        return unused.pop(0)
    if not isinstance(url, str) or not url:
        raise _invalid(f"{where}.image_url.url must be a string")
    url = _checked_text(url, f"{where}.image_url.url")
    return _from_data_url(url, where) if url.startswith("data:") else url


def _from_data_url(url: str, where: str) -> bytes:
    header, separator, payload = url.partition(",")
    if not separator or not header.endswith(";base64"):
        raise _invalid(f"{where}: a data: URL must be data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:  # of characters beyond ASCII, and binascii's own
        raise RowError(ErrorCode.IMAGE_INVALID, f"{where}: bad base64: {error}") from None


def _image_source(item: Any, index: int) -> ImageSource:
    """An item of the images column: bytes, a URI, or HF's struct<bytes, path>."""
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes | str) and item:
        return item
    raise RowError(ErrorCode.IMAGE_INVALID, f"images[{index}] is null or empty")


def _checked_text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid(f"{where}: lone surrogate at character {error.start}") from None
    return text


def _invalid(message: str) -> RowError:
    return RowError(ErrorCode.INVALID_MESSAGES, message)
