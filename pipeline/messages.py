"""What a row asks for: chat messages and the images they refer to, in one normal form.

In: a row's ``prompt``, ``messages`` and ``images`` values in any of the contract's shapes, and in
those of OpenAI, vLLM, Qwen and transformers. Out: a ``Chat`` (plain role/content dictionaries for a
chat template, and image sources in prompt order), or ``RowError(invalid_messages)``. A raw prompt,
which no template touches, is a ``RawPrompt``.

A key that this module does not know is left out, which the log says once, unless it may hold a part
of the prompt: a picture, a file or a call (``_CONTENT_KEYS``). Such a row is refused.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.errors import ErrorCode, RowError

log = logging.getLogger(__name__)

_MESSAGE_KEYS = ("role", "content", "name")
_KEYS_OF_ROLE = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}
_ROLES = ("system", "developer", "user", "assistant", "tool")

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The key that has the text of a part, by the part's type; as in vLLM."""
_IMAGE_PARTS = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
}
"""The keys that may have the image of a part, by the part's type: OpenAI's, Qwen's, transformers'.
A part of type ``image`` that has none takes the next image of the row."""
_CONTENT_KEYS = frozenset(
    {
        *("text", "image", "image_url", "url", "path", "base64", "image_embeds", "image_pil"),
        *("images", "source", "file", "file_id", "file_data", "files", "attachments"),
        *("audio", "audio_url", "input_audio", "video", "video_url", "function_call", "tools"),
        *("tool_calls", "tool_call_id", "value", "parts", "message", "video_path"),
        *("documents", "document", "context", "file_ids"),
    }
)
"""Keys of messages and parts that may hold what the model is to see: never left out."""
_REMEDIES = {
    "from": "this is ShareGPT's form: give role (user for human, assistant for gpt) and content",
    "function_call": "give tool_calls",
    "images": "put them into the images column, with a part {'type': 'image'} for each",
    "tools": "give them as the request's tools",
}
_IMAGE_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "SUkqA", "TU0AK", "Qk")
"""Base64 of the first bytes of PNG, JPEG, WebP, GIF, TIFF (two) and BMP."""
_LEAST_BASE64 = 40
"""Characters of the smallest image in base64; a shorter text is a URI."""

_OF_PATHS = frozenset("/\\.:")
"""Characters of which a URI or the name of an image file has at least one."""

ImageSource = bytes | str
"""Encoded bytes, or a URI to fetch them from."""
Unused = list[tuple[int, ImageSource]]
"""What parts have not taken of the images column yet, with the places there."""


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
    sources = [_image_source(item, f"images[{index}]") for index, item in enumerate(images or ())]
    if messages is None or (messages in ("", []) and prompt):
        return _from_prompt(prompt, sources)
    turns = _load(messages)
    if prompt not in (None, "") and not any(_repeats(turn, prompt) for turn in turns):
        raise _invalid("give prompt or messages, not both: leave one of them null")
    attached: list[ImageSource] = []
    unused = list(enumerate(sources))
    chat = [_turn(turn, index, unused, attached) for index, turn in enumerate(turns)]
    if unused:
        if attached and len(unused) == len(sources):
            raise _invalid("the part brings its own image; leave the images column null")
        raise _invalid(
            f"messages refer to {len(sources) - len(unused)} of {len(sources)} images; "
            "give each image a part {'type': 'image'}"
        )
    if not any(_says_something(turn) for turn in chat):
        raise _invalid("the prompt is empty: no message has any text or image")
    return Chat(chat, tuple(attached))


def _repeats(turn: Any, prompt: Any) -> bool:
    """Whether a message is the prompt once more, as in chat sets that have both columns."""
    return isinstance(turn, Mapping) and turn.get("content") == prompt


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


def _turn(turn: Any, index: int, unused: Unused, attached: list[ImageSource]) -> dict[str, Any]:
    """One message; image parts move sources from ``unused`` (the row's) to ``attached``."""
    where = f"messages[{index}]"
    if not isinstance(turn, Mapping):
        raise _invalid(f"{where} must be an object with role and content")
    role = turn.get("role")
    if role not in _ROLES:
        remedy = _remedy("from" if "from" in turn else "")
        raise _invalid(f"{where}.role = {role!r}: must be one of {', '.join(_ROLES)}{remedy}")
    given = {key: value for key, value in turn.items() if value not in (None, [])}
    known = {"role": role, **_known_keys(given, role, where)}
    content = given.get("content")
    if content is None:
        return {**known, "content": None}
    if isinstance(content, str):
        return {**known, "content": _checked_text(content, f"{where}.content")}
    if not isinstance(content, list):
        raise _invalid(f"{where}.content must be a string or a list of parts")
    parts = [
        _part(part, f"{where}.content[{number}]", unused, attached)
        for number, part in enumerate(content)
    ]
    return {**known, "content": parts}


def _known_keys(given: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a message has beside role and content."""
    _check_keys(given, (*_MESSAGE_KEYS, *_KEYS_OF_ROLE.get(role, ())), where)
    known = {
        key: _string(given[key], f"{where}.{key}")
        for key in ("name", *_KEYS_OF_ROLE.get(role, ()))
        if key in given and key != "tool_calls"
    }
    if role != "assistant" or "tool_calls" not in given:
        return known
    calls = given["tool_calls"]
    if not isinstance(calls, list):
        raise _invalid(f"{where}.tool_calls must be a list")
    numbered = enumerate(calls)
    return {**known, "tool_calls": [_call(c, f"{where}.tool_calls[{i}]") for i, c in numbered]}


def _check_keys(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse what may be a part of the prompt under a key that is not ``known``; warn of others."""
    for key, value in given.items():
        if key in known or _is_absent(value):
            continue
        if key in _CONTENT_KEYS:
            raise _invalid(f"{where}.{key} is not supported{_remedy(key)}")
        _warn_of_key(key)


def _remedy(key: str) -> str:
    return f"; {_REMEDIES[key]}" if key in _REMEDIES else ""


@lru_cache(maxsize=256)
def _warn_of_key(key: str) -> None:
    """Once per process."""
    log.warning("messages have a key %r, which is left out of the prompt", key[:80])


def _call(call: Any, where: str) -> dict[str, Any]:
    """An earlier call of a tool, its arguments parsed, as chat templates want them."""
    function = _object(call, ("id", "type", "function"), where).get("function")
    if call.get("type") not in (None, "function"):
        raise _invalid(f"{where}.type = {call['type']!r}: must be function")
    said = _object(function, ("name", "arguments"), f"{where}.function")
    name = _string(said.get("name"), f"{where}.function.name")
    arguments = _arguments(said.get("arguments", ""), f"{where}.function.arguments")
    own = {"id": _string(call["id"], f"{where}.id")} if call.get("id") is not None else {}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(given: Any, where: str) -> dict[str, Any]:
    """An object, or JSON, parsed; what is no JSON object (a model wrote it) counts as none, as in
    vLLM."""
    try:
        parsed = given if isinstance(given, Mapping) else json.loads(_string(given, where))
        _checked_text(json.dumps(parsed, ensure_ascii=False, default=str), where)
    except ValueError:
        return {}
    except RecursionError:
        raise _invalid(f"{where} is nested too deeply") from None
    return parsed if isinstance(parsed, dict) else {}


def _object(value: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """``value`` without what is null, if it is an object."""
    if not isinstance(value, Mapping):
        raise _invalid(f"{where} must be an object")
    _check_keys(value, known, where)
    return {key: item for key, item in value.items() if item is not None}


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


def _part(part: Any, where: str, unused: Unused, attached: list[ImageSource]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": _checked_text(part, where)}
    if not isinstance(part, Mapping):
        raise _invalid(f"{where} must be a string, or an object with a type")
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        key = _TEXT_PARTS[kind]
        _check_keys(part, ("type", key), where)
        return {"type": "text", "text": _string(part.get(key), f"{where}.{key}")}
    if kind not in _IMAGE_PARTS:
        known = ", ".join((*_TEXT_PARTS, *_IMAGE_PARTS))
        raise _invalid(f"{where}.type = {kind!r}: must be one of {known}")
    keys = _IMAGE_PARTS[kind]
    _check_keys(part, ("type", "image", "index", *keys), where)
    given = {key: part[key] for key in keys if not _has_no_image(part.get(key))}
    if "image_url" in given:
        given.pop("image", None)  # a name or a copy of the same image
    if kind == "image" and (not given or (unused and _is_placeholder(given))):
        attached.append(_column_image(part.get("index"), where, unused))
    else:
        attached.append(_part_image(given, where))
    return {"type": "image"}


def _has_no_image(value: Any) -> bool:
    """Whether a key of images is absent, or a flag that says there is one elsewhere."""
    return isinstance(value, bool) or _is_absent(value)


def _is_placeholder(given: Mapping[str, Any]) -> bool:
    """Whether a part has but a name, ``image_0`` or ``<image>``, for an image of the column.

    Chat sets have such names beside their images. A file's name has a dot or a slash, or else
    no image of the column is left for its part: then it is read.
    """
    name = given.get("image")
    is_name = isinstance(name, str) and not _OF_PATHS & set(name) and _bare_base64(name) is None
    return is_name and len(given) == 1


def _column_image(index: Any, where: str, unused: Unused) -> ImageSource:
    """The next image of the column, or the one at ``index``."""
    if not unused:
        raise _invalid(f"{where} refers to an image, but the images column has no more")
    for place, (number, source) in enumerate(unused):
        if index is None or number == index:
            del unused[place]
            return source
    raise _invalid(
        f"{where}.index: image {index!r}, which the images column lacks or another part has taken"
    )


def _part_image(given: Mapping[str, Any], where: str) -> ImageSource:
    """The image that a part has itself, ``given`` by key."""
    if not given:
        raise _invalid(f"{where}.image_url must be a string, or an object with a url")
    if len(given) > 1:
        raise _invalid(f"{where} has {' and '.join(given)}: give one of them")
    ((key, value),) = given.items()
    if key == "base64":
        text = _string(value, f"{where}.base64")
        return _from_data_url(text, where) if text.startswith("data:") else _decoded(text, where)
    if key == "image_url":
        link = value.get("url") if isinstance(value, Mapping) else value
        return _image_source(_string(link, f"{where}.image_url.url"), f"{where}.image_url.url")
    return _image_source(value, f"{where}.{key}")


def _is_absent(value: Any) -> bool:
    """Whether a key's value is null or empty, or a struct of such values."""
    return value in (None, "", b"", []) or (isinstance(value, Mapping) and not any(value.values()))


def _from_data_url(url: str, where: str) -> bytes:
    header, separator, payload = url.partition(",")
    if not separator or not header.endswith(";base64"):
        raise _invalid(f"{where}: a data: URL must be data:image/...;base64,...")
    return _decoded(payload, where)


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # of characters beyond ASCII, and binascii's own
        raise RowError(ErrorCode.IMAGE_INVALID, f"{where}: bad base64: {error}") from None


def _image_source(item: Any, where: str) -> ImageSource:
    """An image as bytes, a URI, a data: URL, bare base64, or HF's struct<bytes, path>."""
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, bytes | str) or not item:
        raise RowError(ErrorCode.IMAGE_INVALID, f"{where} is null or empty")
    if isinstance(item, bytes):
        return item
    uri = _checked_text(item, where)
    if uri.startswith("data:"):
        return _from_data_url(uri, where)
    return _bare_base64(uri) or uri


def _bare_base64(text: str) -> bytes | None:
    """The image that ``text`` holds in base64; None if it is a URI."""
    if len(text) < _LEAST_BASE64 or not text.startswith(_IMAGE_STARTS):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def _checked_text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid(f"{where}: lone surrogate at character {error.start}") from None
    return text


def _invalid(message: str) -> RowError:
    return RowError(ErrorCode.INVALID_MESSAGES, message)
