"""A row's prompt and completion are those of ``vllm.LLM.chat`` on the same messages.

Per model two engines, one after the other: ``LLM`` in a process of its own, then ours behind a
replica. Compared in float32, as near ties fall either way in bfloat16. Not covered: GPUs, bfloat16,
and a chat of tools on SmolLM2, whose template takes none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.models import smollm2
from pipeline.engine import VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.profile import REPO_ROOT, EngineProfile, load_profile
from pipeline.read import InputColumns
from pipeline.records import Completion, Prepared, input_block, read_prepared
from pipeline.replica import Replica, ReplicaLimits
from pipeline.sampling import SamplingDefaults
from tests.chats import CLOCK, collapse_images
from tests.integration.chat_reference import EXACT, WAYS, requests

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

REFERENCE_TIMEOUT_S = 600  # a start takes 20-60 s, the chats some seconds
MINI_MAVERICK = "mini-maverick-tp1"
NO_BLANKS = {str(byte): -100 for byte in b"\t\n\r "}
"""The model knows no JSON: left alone, it would fill what a grammar allows with blanks."""
FORCED: dict[str, Any] = {
    "required": "required",
    "named": {"type": "function", "function": {"name": "visit"}},
}
VISIT = {
    "type": "function",
    "function": {
        "name": "visit",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
REQUEST = {name: name for name in ("custom_id", "messages", "sampling")}


@dataclass(frozen=True)
class Answers:
    """One model's answers, by request."""

    prepared: Mapping[str, Prepared]
    ours: Mapping[str, Completion]
    theirs: Mapping[str, dict[str, Any]]
    forced: Mapping[str, Completion]
    """Of a model that takes tools: rows whose completion must be a call, by ``tool_choice``."""

    def texts(self, way: str) -> list[tuple[str, str, str]]:
        """(request, our text, theirs) of every request sampled in a way."""
        return [
            (key, self.ours[key].text, answer["text"])
            for key, answer in self.theirs.items()
            if key.endswith(f" / {way}")
        ]


@pytest.fixture(scope="module", params=[MINI_MAVERICK, "smollm2"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    if request.param == "smollm2":
        smollm2.ensure()
    folder = tmp_path_factory.mktemp(request.param)
    profile = load_profile(request.param, overrides=EXACT)
    asked = [
        row(key, chat.messages, {**sampling, "tools": chat.tools})
        for key, chat, sampling in requests(request.param)
    ]
    prepared = prepare(profile, folder, asked)
    theirs = reference(request.param, folder / "reference.json")
    forced = FORCED if request.param == MINI_MAVERICK else {}
    extra = prepare(profile, folder, [forced_row(*item) for item in forced.items()])
    done = generate(profile, [*prepared.values(), *extra.values()])
    forced_done = {key: done.pop(key) for key in forced}
    return Answers(prepared, done, theirs, forced_done)


def row(key: str, messages: list[dict[str, Any]], sampling: dict[str, Any]) -> dict[str, str]:
    return {
        "custom_id": key,
        "messages": json.dumps(messages),
        "sampling": json.dumps(sampling),
    }


def forced_row(key: str, tool_choice: Any) -> dict[str, str]:
    asked = {"tools": [VISIT, CLOCK], "tool_choice": tool_choice, "parallel_tool_calls": False}
    sampling = {**asked, "temperature": 0.0, "logit_bias": NO_BLANKS}
    return row(key, [{"role": "user", "content": "Count to 3."}], sampling)


def prepare(
    profile: EngineProfile, folder: Path, rows: list[dict[str, str]]
) -> dict[str, Prepared]:
    if not rows:
        return {}
    spec = PrepareSpec(
        model=ModelSpec.from_engine_args(profile.model, profile.revision, profile.engine_args),
        columns=InputColumns(REQUEST, pa.schema([])),
        sampling=SamplingDefaults(),
        run_seed=0,
        max_image_pixels=10**6,
        fetcher=ImageFetcher(f"file://{folder}", 10**6, 1),
    )
    shard = Shard(0, f"file://{folder}/chats.parquet", 0, len(rows))
    items = read_prepared(prepare_block(input_block(shard, pa.Table.from_pylist(rows)), spec=spec))
    prepared = {item.custom_id: item for item in items if isinstance(item, Prepared)}
    assert len(prepared) == len(rows), [item for item in items if not isinstance(item, Prepared)]
    return prepared


def reference(name: str, out: Path) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.chat_reference", name, str(out)],
        cwd=REPO_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=REFERENCE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"LLM.chat ended with {done.returncode}:\n{done.stdout[-6000:]}"
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


def generate(profile: EngineProfile, rows: list[Prepared]) -> dict[str, Completion]:
    spec = EngineSpec(profile.model, profile.revision, profile.engine_args, profile.env)
    replica = Replica(partial(VLLMEngine, spec), ReplicaLimits(row_timeout_s=200))
    try:
        outcomes = [outcome for batch in replica.generate(0, rows) for outcome in batch]
    finally:
        replica.shutdown()
    done = {item.custom_id: item for item in outcomes if isinstance(item, Completion)}
    assert len(done) == len(rows), [item for item in outcomes if not isinstance(item, Completion)]
    return done


def test_many_chats_were_asked_and_in_every_way(answers: Answers) -> None:
    assert answers.theirs.keys() == answers.ours.keys() == answers.prepared.keys()
    counts = {way: len(answers.texts(way)) for way in WAYS}
    assert counts["greedy"] >= 60
    assert min(counts.values()) >= 20


def test_prompts_are_the_same_token_by_token(answers: Answers) -> None:
    differing = [
        key
        for key, answer in answers.theirs.items()
        if list(answers.prepared[key].token_ids) != prompt(answers.prepared[key], answer)
    ]
    assert differing == []


def prompt(ours: Prepared, answer: Mapping[str, Any]) -> list[int]:
    token_ids: list[int] = answer["prompt_token_ids"]
    return collapse_images(token_ids) if ours.images else token_ids


def test_prompts_are_counted_as_the_engine_expands_them(answers: Answers) -> None:
    for key, answer in answers.theirs.items():
        ours, done, length = (
            answers.prepared[key],
            answers.ours[key],
            len(answer["prompt_token_ids"]),
        )
        images = length - len(prompt(ours, answer)) + len(ours.images)
        assert (ours.prompt_tokens, done.prompt_tokens) == (length, length), key
        assert (ours.image_tokens, done.image_tokens) == (images, images), key


@pytest.mark.parametrize("way", WAYS)
def test_completions_are_the_same(answers: Answers, way: str) -> None:
    texts = answers.texts(way)
    assert [key for key, ours, theirs in texts if ours != theirs] == []
    assert len({theirs for _, _, theirs in texts}) > 5


def test_stop_strings_cut_and_are_not_part_of_the_text(answers: Answers) -> None:
    stops = WAYS["stopped"]["stop"]
    texts = {key: ours for key, ours, _ in answers.texts("stopped")}
    assert not [key for key, text in texts.items() if any(stop in text for stop in stops)]
    whole = {key.replace("greedy", "stopped"): ours for key, ours, _ in answers.texts("greedy")}
    cut = [key for key, text in texts.items() if text != whole[key] and whole[key].startswith(text)]
    assert len(cut) > 5


@pytest.mark.parametrize("answers", [MINI_MAVERICK], indirect=True)
def test_a_forced_completion_is_a_call_of_an_offered_tool(answers: Answers) -> None:
    required, named = answers.forced["required"], answers.forced["named"]
    assert (required.code, named.code) == (None, None)
    (call,) = json.loads(required.text)
    assert [(found.name, json.loads(found.arguments)) for found in required.tool_calls] == [
        (call["name"], call["parameters"])
    ]
    assert call["name"] in ("visit", "clock")
    (visit,) = named.tool_calls
    assert (visit.name, visit.arguments) == ("visit", named.text)
    assert json.loads(named.text)["city"] in ("Oslo", "Rome")
