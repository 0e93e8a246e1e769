"""A chat's prompt is the one vLLM's own renderer makes of it, token by token; no engine starts.

The renderer is the one ``vllm.LLM.chat`` hands its messages to. The integration test of prompt
fidelity asks ``LLM.chat`` itself, and SmolLM2 too.
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.images import image_size
from pipeline.messages import parse_chat
from pipeline.model import ModelSpec, PromptFormat, load_prompt_format
from pipeline.profile import load_profile, locate_model
from tests.chats import IMAGES, PLAIN, TOOLS, Chat, collapse_images

CHATS = {**PLAIN, **TOOLS, **IMAGES}
PROFILE = load_profile("mini-maverick-tp1", overrides={})
Render = Callable[[Chat], list[int]]


@pytest.fixture(scope="module")
def render() -> Render:
    """What ``LLM.chat`` does before its engine comes in."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import AsyncEngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.renderers.params import ChatParams

    args: Any = AsyncEngineArgs(model=locate_model(PROFILE.model), **PROFILE.engine_args)
    renderer = renderer_from_config(args.create_engine_config())
    tokens = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)

    def render(chat: Chat) -> list[int]:
        kwargs = {"add_generation_prompt": True, "tools": chat.tools, "tokenize": False}
        params = ChatParams(chat_template_kwargs=kwargs)
        _, (prompt,) = renderer.render_chat([copy.deepcopy(chat.messages)], params, tokens)
        return list(prompt["prompt_token_ids"])

    return render


@pytest.fixture(scope="module")
def prompts() -> PromptFormat:
    return load_prompt_format(ModelSpec.from_engine_args(PROFILE.model, None, PROFILE.engine_args))


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_a_prompts_tokens_are_vllms(chat: Chat, render: Render, prompts: PromptFormat) -> None:
    parsed = parse_chat(None, chat.messages, None)
    ours = prompts.tokenize(parsed.messages, chat.tools)
    theirs = render(chat)
    assert prompts.images is not None
    assert ours == collapse_images(theirs)
    expanded = [
        prompts.images.tiling.tokens(*image_size(data, max_pixels=10**6))
        for data in parsed.images
        if isinstance(data, bytes)
    ]
    assert len(ours) - len(parsed.images) + sum(expanded) == len(theirs)
