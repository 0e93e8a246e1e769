"""Runs a fixed set of rows through the real ``vllm.LLM`` under one profile, in its own process.

In: a profile's name and a file to write. Out: JSON, per row its token ids and the experts of each
token (``[position][layer]``, of prompt and completion). Text rows and
image rows (one tile, several tiles, two images); greedy rows and rows drawn with a seed; half of
them run on past the end token, so that more is compared than short answers.

Use: ``python -m tests.integration.generate_tokens PROFILE OUT.json [OVERRIDES]``, the last being
engine arguments as a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from pipeline.profile import load_profile, locate_model

TILE = 56  # pixels; mini-Maverick's tile
ROWS = 64
MAX_TOKENS = 16
SIZES = ((TILE, TILE), (2 * TILE, TILE), (3 * TILE, 2 * TILE), (TILE, 4 * TILE))
TEXTS = ("Count to {}.", "Say {} in words, then stop.", "What comes after {}?", "{} {} {}")
QUESTIONS = ("Which digit do you see?", "Read the digits.", "Describe the picture.")


@dataclass(frozen=True)
class Row:
    """One request: what the chat's only message holds, and how to sample."""

    images: tuple[Image.Image, ...]
    text: str
    temperature: float
    seed: int
    ignore_eos: bool


def draw(number: int, size: tuple[int, int]) -> Image.Image:
    """A few strokes that differ for each number; white on black, as the digits are."""
    image = Image.new("RGB", size, "black")
    pen = ImageDraw.Draw(image)
    width, height = size
    for stroke in range(3):
        at = (number * 7 + stroke * 13) % (width - 8), (number * 5 + stroke * 17) % (height - 8)
        pen.line([at, ((at[0] * 3 + 20) % width, (at[1] * 2 + 15) % height)], "white", 4)
    return image


def make_rows() -> Iterator[Row]:
    """``ROWS`` rows; every kind of prompt meets every kind of sampling."""
    for number in range(ROWS):
        kind = number % 4
        size = SIZES[(number // 4) % len(SIZES)]
        images = tuple(draw(number + extra, size) for extra in range((0, 1, 1, 2)[kind]))
        text = TEXTS[number // 4 % 4].format(*[number] * 3) if kind == 0 else QUESTIONS[number % 3]
        yield Row(images, text, (0.0, 0.7)[number // 4 % 2], 1000 + number, number // 8 % 2 == 0)


def message(row: Row) -> list[dict[str, Any]]:
    """The row as a chat for ``LLM.chat``."""
    parts = [{"type": "image_pil", "image_pil": image} for image in row.images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": row.text}]}]


def generate(profile_name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids and experts of every row, in order, and how long the prompts were."""
    counting = {"enable_return_routed_experts": True}
    profile = load_profile(profile_name, overrides={**counting, **overrides})
    os.environ.update(profile.env)  # read when vLLM is imported
    from vllm import LLM, SamplingParams

    llm = LLM(model=locate_model(profile.model), **profile.engine_args)
    rows = list(make_rows())
    sampling = [
        SamplingParams(
            temperature=row.temperature,
            seed=row.seed,
            max_tokens=MAX_TOKENS,
            ignore_eos=row.ignore_eos,
        )
        for row in rows
    ]
    outputs = llm.chat([message(row) for row in rows], sampling, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompts": [len(output.prompt_token_ids or ()) for output in outputs],
        "experts": [output.outputs[0].routed_experts[:, :, 0].tolist() for output in outputs],
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    Path(sys.argv[2]).write_text(json.dumps(generate(sys.argv[1], arguments)))
