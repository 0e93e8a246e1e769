"""A line of an OpenAI batch file -> the request it holds, as the Batch API and vLLM take it.

In: ``{"custom_id", "method": "POST", "url", "body"}`` as bytes. Out: a ``BatchRequest``, or a
``RowError`` under OpenAI's own code for it. What is not understood here is left to the parser of
request parameters, which knows each of them or refuses it: a body key is never ignored unless it
changes nothing of the completion (``_NEUTRAL``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from pipeline.errors import ErrorCode, RowError
from pipeline.messages import Chat, RawPrompt, parse_chat, parse_raw_prompt
from pipeline.sampling import REMEDIES, is_utf8

URL_COLUMN = "url"
"""The carried column of JSONL runs: which endpoint a row is for."""

_NEUTRAL = frozenset(
    {
        *("user", "safety_identifier", "metadata", "store"),
        *("service_tier", "prompt_cache_key", "prompt_cache_retention", "stream_options"),
        *("request_id", "session_id", "cache_salt", "priority"),
    }
)
"""Body keys that change nothing of the completion: who asks, what is kept, how it is paid."""
_ONLY: Mapping[str, Any] = {
    "stream": False,
    "echo": False,
    "best_of": 1,
    "modalities": ["text"],
    "use_beam_search": False,
    "include_reasoning": True,
    "spaces_between_special_tokens": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
    "reasoning_effort": "none",
}
"""Body keys that are fine with the one value that asks for what a batch does anyway."""
_CHAT_ONLY = ("tools", "tool_choice", "parallel_tool_calls", "top_logprobs")
"""Body keys that a raw prompt has no use for."""


_V1 = "/v1"
_URL_REMEDIES = {
    "/responses": "give body.input as body.messages, body.instructions as their system message",
    "/embeddings": "this program generates text only",
}
"""What to do about other endpoints that batch files have lines for."""


class Endpoint(StrEnum):
    """``url`` of a line; Azure's lines leave ``/v1`` out."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What one line asks for."""

    chat: Chat | RawPrompt
    parameters: Mapping[str, Any]
    """The request parameters, by the names of a row's ``sampling``; not yet checked."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line as far as it could be read."""

    document: Mapping[str, Any]
    """The line's object; empty if it holds none."""
    error: RowError | None = None
    """Why it holds none: ``invalid_json_line``."""

    @property
    def custom_id(self) -> str | None:
        """The row's id; None if there is none that can be used."""
        found = self.document.get("custom_id")
        return found if isinstance(found, str) and found and is_utf8(found) else None

    @property
    def endpoint(self) -> Endpoint | None:
        """What ``url`` names; None if it is no endpoint."""
        url = self.document.get("url")
        return next((each for each in Endpoint if url in (each, each.removeprefix(_V1))), None)

    def request(self, models: Collection[str]) -> BatchRequest:
        """What the line asks for.

        Args:
            models: names that ``body.model`` may have. A body without it means the run's model,
                as for vLLM.

        Raises:
            RowError: ``invalid_json_line``, ``missing_required_parameter``, ``invalid_method``,
                ``invalid_url``, ``model_not_found``, ``invalid_parameter``, ``invalid_messages``,
                ``image_invalid``.
        """
        if self.error is not None:
            raise self.error
        self._check_head()
        body = _required(self.document, "body")
        if not isinstance(body, Mapping):
            raise _invalid_parameter(f"body must be an object, not {type(body).__name__}")
        _check_model(body.get("model"), models)
        chat = self.endpoint is Endpoint.CHAT
        name = "messages" if chat else "prompt"
        content = _required(body, name, "body.")
        parameters = _parameters(body, {"model", name})
        if chat:
            return BatchRequest(parse_chat(None, content, None), parameters)
        return BatchRequest(parse_raw_prompt(content), _of_completion(parameters))

    def _check_head(self) -> None:
        given = _required(self.document, "custom_id")
        if self.custom_id is None:
            raise _invalid_parameter(f"custom_id = {given!r}: must be a non-empty string")
        method = _required(self.document, "method")
        if method != "POST":
            raise RowError(ErrorCode.INVALID_METHOD, f"method = {method!r}: must be 'POST'")
        url = _required(self.document, "url")
        if self.endpoint is None:
            known = " or ".join(Endpoint)
            remedy = _URL_REMEDIES.get(str(url).removeprefix(_V1))
            wrong = f"url = {url!r}: must be {known}"
            raise RowError(ErrorCode.INVALID_URL, f"{wrong}; {remedy}" if remedy else wrong)


def read_line(line: bytes) -> BatchLine:
    """The line, whatever it holds; what is wrong with it rises from ``request``."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return BatchLine({}, _invalid_line(str(error) or type(error).__name__))
    if not isinstance(value, dict):
        return BatchLine({}, _invalid_line(f"it is {type(value).__name__}, not an object"))
    return BatchLine(value)


def _required(document: Mapping[str, Any], key: str, where: str = "") -> Any:
    value = document.get(key)
    if value is None:
        raise RowError(ErrorCode.MISSING_REQUIRED_PARAMETER, f"{where}{key} is missing")
    return value


def _check_model(model: Any, models: Collection[str]) -> None:
    if model is not None and model not in tuple(models):
        raise RowError(
            ErrorCode.MODEL_NOT_FOUND,
            f"body.model = {model!r}: this run serves {', '.join(map(repr, models))}; to take "
            "other names too, list them in the profile's engine_args.served_model_name",
        )


def _parameters(body: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """The request parameters of a body, without keys that ask for nothing."""
    for key, value in _ONLY.items():
        found = body.get(key)
        if found is not None and (found != value or type(found) is not type(value)):
            wrong = f"{key} = {found!r}: only {value!r} is supported"
            raise _invalid_parameter(f"{wrong}; {REMEDIES[key]}" if key in REMEDIES else wrong)
    left_out = {*taken, *_NEUTRAL, *_ONLY}
    return {key: value for key, value in body.items() if key not in left_out and value is not None}


def _of_completion(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A completion's parameters by the names of a chat's: ``logprobs: k`` is there ``logprobs:
    true, top_logprobs: k``."""
    for key in _CHAT_ONLY:
        if key in parameters:
            raise _invalid_parameter(f"{key}: is for {Endpoint.CHAT} only")
    if "logprobs" not in parameters:
        return dict(parameters)
    wanted = parameters["logprobs"]
    if type(wanted) is not int:
        raise _invalid_parameter(f"logprobs = {wanted!r}: must be a whole number")
    return {**parameters, "logprobs": True, "top_logprobs": wanted}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _invalid_parameter(message: str) -> RowError:
    return RowError(ErrorCode.INVALID_PARAMETER, message)


def _invalid_line(reason: str) -> RowError:
    return RowError(ErrorCode.INVALID_JSON_LINE, f"the line is no JSON object in UTF-8: {reason}")
