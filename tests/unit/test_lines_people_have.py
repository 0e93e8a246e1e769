"""Lines and rows as people have them already: each is read, or refused with what to do.

Batch lines as in the documents of OpenAI, Azure and vLLM, with the run's model for theirs; rows as
in chat sets on Hugging Face and in files for fine-tuning.
"""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Failure
from tests.unit.test_prepare import LONG, RUNS, batch_line, good, png, prepare, prepare_lines

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello world!"},
]
PNG = png(8, 8)
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def picture(part: dict[str, Any]) -> list[dict[str, Any]]:
    question = {"type": "text", "text": "What is in this image?"}
    return [{"role": "user", "content": [question, part]}]


def asked(**body: Any) -> bytes:
    return batch_line("request-1", model="mini-maverick", **body)


LINES = {
    "openai": asked(messages=CHAT, max_tokens=1000),
    "openai, structured outputs": asked(
        messages=CHAT,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
        },
    ),
    "openai, tools": asked(messages=CHAT, tools=[WEATHER], tool_choice="auto"),
    "openai, vision": asked(
        messages=picture({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}),
        max_tokens=300,
    ),
    "openai, metadata": asked(messages=CHAT, metadata={"job": "x"}, store=True, user="u"),
    "openai, completions": batch_line(
        "request-2", "/v1/completions", model="mini-maverick", prompt="Say this", max_tokens=7
    ),
    "openai, parts": asked(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
    "azure": batch_line("task-0", "/chat/completions", model="mini-maverick", messages=CHAT),
    "vllm run-batch": asked(messages=CHAT, max_completion_tokens=1000),
    "vllm, its own parameters": asked(
        messages=CHAT,
        min_tokens=5,
        ignore_eos=True,
        top_k=20,
        stop_token_ids=[261],
        skip_special_tokens=False,
        add_generation_prompt=True,
        seed=-1,
    ),
    "an agent's log": asked(
        messages=[
            {"role": "user", "content": "Weather in Oslo?", "timestamp": "2026-01-01T00:00:00Z"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "I should look.",
                "refusal": None,
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "12 C"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Thanks", "cache_control": {"type": "ephemeral"}}
                ],
            },
        ],
        tools=[],
        parallel_tool_calls=None,
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_a_batch_line_is_read(tmp_path: Path, name: str) -> None:
    (item,) = prepare_lines(tmp_path, LINES[name], model=LONG, sampling=RUNS)
    assert good(item).prompt_tokens > 5


RESPONSES = {"model": "mini-maverick", "input": "Hello", "instructions": "Be brief."}
REFUSED = {
    "responses": (batch_line("a", "/v1/responses", **RESPONSES), "give body.input as"),
    "embeddings": (batch_line("a", "/v1/embeddings", input="Hello"), "generates text only"),
    "another model": (
        batch_line("a", model="gpt-4o-mini", messages=CHAT),
        "list them in the profile's engine_args.served_model_name",
    ),
    "fine-tuning": (json.dumps({"messages": CHAT}).encode(), "custom_id is missing"),
    "an old vllm": (asked(messages=CHAT, guided_choice=["a"]), "give structured_outputs"),
    "a template's own": (
        asked(messages=CHAT, chat_template_kwargs={"enable_thinking": False}),
        "chat_template_kwargs = {'enable_thinking': False}: only {} is supported; render the chat",
    ),
    "reasoning": (asked(messages=CHAT, reasoning_effort="low"), "say it in the system message"),
    "a prefix": (asked(messages=CHAT, continue_final_message=True), "render the chat yourself"),
    "old functions": (asked(messages=CHAT, functions=[]), "functions is not supported; give tools"),
    "a file": (
        asked(messages=picture({"type": "input_image", "file_id": "file-1"})),
        "messages[0].content[1].file_id is not supported",
    ),
    "anthropic's image": (
        asked(messages=picture({"type": "image", "source": {"type": "base64", "data": "eA=="}})),
        "messages[0].content[1].source is not supported",
    ),
    "audio": (
        asked(messages=picture({"type": "input_audio", "input_audio": {"data": "eA=="}})),
        "type = 'input_audio': must be one of text",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_batch_line_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    line, words = REFUSED[name]
    (item,) = prepare_lines(tmp_path, line, sampling=RUNS)
    assert isinstance(item, Failure)
    assert words in item.message


IMAGE = {"bytes": PNG, "path": "0.png"}
ROWS: dict[str, dict[str, Any]] = {
    "no_robots": {"prompt": "Hello world!", "prompt_id": "1", "messages": CHAT, "category": "Chat"},
    "tulu": {"id": "x_1", "messages": CHAT, "source": "x"},
    "a column of images": {
        "messages": picture({"type": "image", "text": None}),
        "images": [IMAGE],
    },
    "one image": {"prompt": "What is it?", "images": IMAGE},
    "base64": {"prompt": "What is it?", "images": [base64.b64encode(PNG).decode()]},
    "a data URL": {"prompt": "What is it?", "images": [DATA_URL]},
    "qwen, inside the message": {"messages": picture({"type": "image", "image": IMAGE})},
    "qwen, as text": {"messages": json.dumps(picture({"type": "image", "image": DATA_URL}))},
    "transformers": {"messages": picture({"type": "image", "base64": DATA_URL.partition(",")[2]})},
    "pandas, empty": {"prompt": "Hi", "messages": None, "images": [], "sampling": ""},
    "spark, null as text": {"prompt": "Hi", "sampling": "null"},
    "tools of several kinds": {
        "messages": [
            {"role": "user", "content": "Look it up", "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"function": {"name": "f", "arguments": {"city": "Oslo", "query": None}}},
                    {"function": {"name": "g", "arguments": {"city": None, "query": "x"}}},
                ],
            },
        ]
    },
}


WITH_IMAGE = {
    *("a column of images", "one image", "base64", "a data URL"),
    *("qwen, inside the message", "qwen, as text", "transformers"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_parquet_is_read(tmp_path: Path, name: str) -> None:
    (item,) = prepare(tmp_path, [ROWS[name]])
    assert good(item).prompt_tokens > 5
    assert good(item).images == ((PNG,) if name in WITH_IMAGE else ())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [{"from": "human", "value": "<image>\nWhat?"}]},
            "ShareGPT's form: give role (user for human, assistant for gpt) and content",
        ),
        ({"prompt": "Hi", "messages": CHAT}, "give prompt or messages, not both"),
    ],
)
def test_a_row_of_parquet_is_refused_with_what_to_do(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    (item,) = prepare(tmp_path, [row])
    assert isinstance(item, Failure)
    assert words in item.message
