"""Runs the chats of ``tests.chats`` through the real ``vllm.LLM.chat``, in its own process.

In: a profile's name and a file to write. Out: JSON, one ``{prompt_token_ids, text}`` per chat and
way of sampling, by ``<chat> / <way>``.

Use: ``python -m tests.integration.chat_reference PROFILE OUT.json``
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.profile import EngineProfile, load_profile, locate_model
from tests.chats import IMAGES, PLAIN, TOOLS, Chat

EXACT = {"dtype": "float32"}
"""In bfloat16 a near tie may fall either way, depending on what else is in the batch."""
WAYS: Mapping[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 12},
    "stopped": {"temperature": 0.0, "max_tokens": 24, "stop": [" ", "a", "3", "."]},
    "seeded": {"temperature": 0.7, "max_tokens": 12, "seed": 4711},
}
CHATS: Mapping[str, Mapping[str, Chat]] = {
    "mini-maverick-tp1": {**PLAIN, **TOOLS, **IMAGES},
    "smollm2": PLAIN,
}
"""The chats each profile's model takes."""
_EVERY = {"smollm2": 3}
"""A slow model is asked every third chat in the other ways than the first."""


def requests(profile: str) -> Iterator[tuple[str, Chat, dict[str, Any]]]:
    """(key, chat, sampling) of every request."""
    first, *others = WAYS
    for index, (name, chat) in enumerate(CHATS[profile].items()):
        ways = (first, *others) if index % _EVERY.get(profile, 1) == 0 else (first,)
        for way in ways:
            yield f"{name} / {way}", chat, WAYS[way]


def answers(profile: EngineProfile, name: str) -> dict[str, dict[str, Any]]:
    """What ``LLM.chat`` makes of every request; it takes one list of tools a call."""
    os.environ.update(profile.env)  # read when vLLM is imported
    from vllm import LLM, SamplingParams

    llm = LLM(model=locate_model(profile.model), **profile.engine_args)
    asked = list(requests(name))
    found: dict[str, dict[str, Any]] = {}
    for tools in {json.dumps(chat.tools): chat.tools for _, chat, _ in asked}.values():
        group = [request for request in asked if request[1].tools == tools]
        outputs = llm.chat(
            [chat.messages for _, chat, _ in group],
            [SamplingParams(**sampling) for _, _, sampling in group],
            tools=tools,
            use_tqdm=False,
        )
        for (key, _, _), output in zip(group, outputs, strict=True):
            token_ids = list(output.prompt_token_ids or ())
            found[key] = {"prompt_token_ids": token_ids, "text": output.outputs[0].text}
    return found


if __name__ == "__main__":
    PROFILE = load_profile(sys.argv[1], overrides=EXACT)
    Path(sys.argv[2]).write_text(json.dumps(answers(PROFILE, sys.argv[1])))
