"""Batch lines: what is accepted means the same as at OpenAI, and what is not says so."""

import json
from typing import Any

import pytest

from pipeline.errors import RowError
from pipeline.messages import Chat, RawPrompt
from pipeline.openai_input import BatchRequest, Endpoint, read_line

MODELS = ("org/maverick", "maverick")
MESSAGES = [{"role": "user", "content": "Count to 3."}]


def line(*, body: Any = None, **changes: Any) -> dict[str, Any]:
    """A good chat line but for ``changes``; None takes a key away."""
    document = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "maverick", "messages": MESSAGES} if body is None else body,
        **changes,
    }
    return {key: value for key, value in document.items() if value is not None}


def chat(**parameters: Any) -> dict[str, Any]:
    return line(body={"model": "maverick", "messages": MESSAGES, **parameters})


def completion(**parameters: Any) -> dict[str, Any]:
    return line(url="/v1/completions", body={"model": "maverick", "prompt": "1 2", **parameters})


def read(document: object) -> BatchRequest:
    return read_line(json.dumps(document).encode()).request(MODELS)


def test_a_chat_line_is_its_messages_and_the_parameters_of_its_body() -> None:
    request = read(chat(temperature=0.5, seed=3, tools=[{"type": "function"}]))
    assert request.chat == Chat([{"role": "user", "content": "Count to 3."}], ())
    assert request.parameters == {"temperature": 0.5, "seed": 3, "tools": [{"type": "function"}]}


def test_a_completions_line_is_a_raw_prompt() -> None:
    request = read(completion(max_tokens=5))
    assert request.chat == RawPrompt("1 2")
    assert request.parameters == {"max_tokens": 5}


def test_images_of_messages_are_kept() -> None:
    part = {"type": "image_url", "image_url": {"url": "images/a.png", "detail": "high"}}
    request = read(line(body={"messages": [{"role": "user", "content": [part]}]}))
    assert request.chat.images == ("images/a.png",)


def test_a_prompt_may_be_token_ids() -> None:
    assert read(completion(prompt=[5, 0, 7])).chat == RawPrompt("", token_ids=(5, 0, 7))


def test_logprobs_of_completions_become_those_of_chats() -> None:
    assert read(completion(logprobs=0)).parameters == {"logprobs": True, "top_logprobs": 0}
    assert read(completion(logprobs=4)).parameters == {"logprobs": True, "top_logprobs": 4}
    assert read(chat(logprobs=True)).parameters == {"logprobs": True}


def test_keys_that_change_nothing_of_the_completion_are_left_out() -> None:
    request = read(
        chat(
            user="u",
            metadata={"a": "b"},
            store=True,
            service_tier="flex",
            stream=False,
            modalities=["text"],
            stop=None,
        )
    )
    assert request.parameters == {}
    assert read(completion(echo=False, best_of=1)).parameters == {}


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [("/chat/completions", Endpoint.CHAT), ("/completions", Endpoint.COMPLETIONS)],
)
def test_azures_lines_leave_the_version_out(url: str, endpoint: Endpoint) -> None:
    body = {"messages": MESSAGES, "prompt": "x"}
    found = read_line(json.dumps(line(url=url, body=body)).encode())
    assert found.endpoint is endpoint  # as the column url and the output have it


@pytest.mark.parametrize("model", ["org/maverick", "maverick", None])
def test_the_runs_model_has_several_names_or_none(model: str | None) -> None:
    assert read(line(body={"model": model, "messages": MESSAGES})).parameters == {}


@pytest.mark.parametrize(
    ("document", "code", "message"),
    [
        ([1], "invalid_json_line", "it is list, not an object"),
        ("x", "invalid_json_line", "it is str"),
        (line(custom_id=None), "missing_required_parameter", "custom_id is missing"),
        (line(custom_id=5), "invalid_parameter", "custom_id = 5: must be a non-empty string"),
        (line(custom_id=""), "invalid_parameter", "custom_id = ''"),
        (line(custom_id="\ud800"), "invalid_parameter", "custom_id = '\\ud800'"),
        (line(method=None), "missing_required_parameter", "method is missing"),
        (line(method="GET"), "invalid_method", "method = 'GET': must be 'POST'"),
        (line(url=None), "missing_required_parameter", "url is missing"),
        (
            line(url="/v1/embeddings"),
            "invalid_url",
            "url = '/v1/embeddings': must be /v1/chat/completions or /v1/completions",
        ),
        (line(url="/v1/responses"), "invalid_url", "give body.input as body.messages"),
        (line(url="/responses"), "invalid_url", "give body.input as body.messages"),
        (line(url="/v1/v1/completions"), "invalid_url", "must be"),
        (line(url=["x"]), "invalid_url", r"url = \['x'\]"),
        ({**line(), "body": None}, "missing_required_parameter", "body is missing"),
        (line(body=[1]), "invalid_parameter", "body must be an object, not list"),
        (
            line(body={"model": "gpt-4o", "messages": MESSAGES}),
            "model_not_found",
            "body.model = 'gpt-4o': this run serves 'org/maverick', 'maverick'; to take",
        ),
        (line(body={"model": ["maverick"]}), "model_not_found", "body.model = "),
        (line(body={"prompt": "x"}), "missing_required_parameter", "body.messages is missing"),
        (line(body={"messages": []}), "invalid_messages", "non-empty list"),
        (
            line(url="/v1/completions", body={"messages": MESSAGES}),
            "missing_required_parameter",
            "body.prompt is missing",
        ),
        (completion(prompt=["a", "b"]), "invalid_messages", "of token ids, not a list with str"),
        (completion(prompt=[1, True]), "invalid_messages", "of token ids, not a list with bool"),
        (completion(prompt=[[1]]), "invalid_messages", "of token ids, not a list with list"),
        (completion(prompt=[]), "invalid_messages", "the prompt is empty"),
        (completion(prompt=7), "invalid_messages", "one string, not int"),
        (completion(prompt=""), "invalid_messages", "the prompt is empty"),
        (completion(prompt="\ud800"), "invalid_messages", "lone surrogate"),
        (completion(logprobs=True), "invalid_parameter", "logprobs = True: must be a whole number"),
        (completion(top_logprobs=2), "invalid_parameter", "top_logprobs: is for /v1/chat"),
        (completion(tools=[]), "invalid_parameter", "tools: is for /v1/chat/completions only"),
        (completion(echo=True), "invalid_parameter", "echo = True: only False is supported"),
        (completion(best_of=2), "invalid_parameter", "best_of = 2: only 1 is supported"),
        (chat(stream=True), "invalid_parameter", "stream = True: only False is supported"),
        (chat(stream=0), "invalid_parameter", "stream = 0: only False"),
    ],
)
def test_a_bad_line_says_what_is_wrong(document: object, code: str, message: str) -> None:
    with pytest.raises(RowError, match=message.replace("\\ud800", ".*ud800")) as caught:
        read(document)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b'{"custom_id": "a"',
        b'{"custom_id": "\xff"}',
        b'\xef\xbb\xbf{"custom_id": "a"}',
        b'{"custom_id": "a"}\0',
        b'{"custom_id": "a", "body": {"temperature": NaN}}',
        b'{"custom_id": "a", "body": %s1%s}' % (b"[" * 100_000, b"]" * 100_000),
        b'{"custom_id": "a", "body": %s}' % (b"1" * 10_000),
    ],
)
def test_what_is_no_json_in_utf8_is_an_invalid_line_without_an_id(content: bytes) -> None:
    found = read_line(content)
    assert found.custom_id is None
    assert found.endpoint is None
    with pytest.raises(RowError, match="no JSON object") as caught:
        found.request(MODELS)
    assert caught.value.code == "invalid_json_line"


def test_a_line_with_another_fault_still_has_its_id() -> None:
    assert read_line(json.dumps(line(method="GET")).encode()).custom_id == "a"
