"""A workload's rows as the requests of the contenders that are not this pipeline.

In: a row as ``workloads`` makes it (two JSON strings and encoded images), and what the workload
asks of all rows. Out: OpenAI messages with the images as PIL objects or data URLs, the arguments of
``vllm.SamplingParams``, or a line for ``vllm run-batch``. Standard library only, but for PIL.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WARM_UP_REQUESTS = 8
WARM_UP_TOKENS = 8
"""Before the clock, copies of the first row, cut to this many tokens."""


@dataclass(frozen=True)
class EngineTask:
    """What a contender's process is told: rows, engine, parameters, and where results go."""

    rows: str
    """A Parquet file."""
    model: str
    engine_args: Mapping[str, Any]
    sampling: Mapping[str, Any]
    """OpenAI's names: of all rows."""
    stamps: str
    """Where a contender with an engine in another process leaves its times."""
    result: str
    """Where the process writes what it did."""
    tuned: bool
    has_images: bool


@dataclass(frozen=True)
class Done:
    """What a contender's process did."""

    seconds: float
    rows: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache; None where the contender does not say."""


def with_pil(image: bytes) -> dict[str, Any]:
    """A message part with the decoded image, as ``vllm.LLM.chat`` takes it."""
    from PIL import Image  # deferred: text needs none

    with Image.open(io.BytesIO(image)) as opened:
        return {"type": "image_pil", "image_pil": opened.convert("RGB")}


def with_data_url(image: bytes) -> dict[str, Any]:
    """A message part with the encoded image, as OpenAI's API takes it."""
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def messages(
    row: Mapping[str, Any], part: Callable[[bytes], dict[str, Any]] = with_pil
) -> list[dict[str, Any]]:
    """The row's chat; its image parts become ``part`` of the images in order."""
    images = iter(row["images"] or ())
    return [_turn(turn, lambda: part(next(images))) for turn in json.loads(row["messages"])]


def _turn(turn: Mapping[str, Any], image: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if isinstance(turn["content"], str):
        return dict(turn)
    parts = [image() if part["type"] == "image" else part for part in turn["content"]]
    return {**turn, "content": parts}


def sampling_arguments(row: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``vllm.SamplingParams``."""
    asked = {**common, **json.loads(row["sampling"])}
    bias = asked.pop("logit_bias", None)
    length = asked.pop("max_completion_tokens")
    biased = {"logit_bias": {int(key): value for key, value in bias.items()}} if bias else {}
    return {**asked, **biased, "max_tokens": length}


def batch_line(row: Mapping[str, Any], common: Mapping[str, Any], model: str) -> str:
    """The row as a line of OpenAI's batch format."""
    body = {
        "model": model,
        "messages": messages(row, with_data_url),
        **common,
        **json.loads(row["sampling"]),
    }
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps({"custom_id": row["custom_id"], **request})
