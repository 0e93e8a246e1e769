"""What a request can ask for, held to by the real engine: structures, log probabilities, biases.

One engine (mini-Maverick in one process) behind one replica, the rows through the real prepare
step. The model reads digits and knows nothing else: what is checked is that the engine was made to
do it. Not covered: other structured-output backends than vLLM's choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import Any

import pyarrow as pa
import pytest

from pipeline.engine import VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import ErrorCode
from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.profile import load_profile
from pipeline.read import InputColumns
from pipeline.records import Completion, Failure, Outcome, input_block, read_prepared
from pipeline.replica import Replica, ReplicaLimits
from pipeline.sampling import SamplingDefaults
from pipeline.structured import StructuredOutputs, violation

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

# A model that knows no JSON would put blanks where a grammar lets it, and never end.
COMPACT = {"backend": "xgrammar", "disable_any_whitespace": True}
STEP_TOKENS = 512
PROFILE = load_profile(
    "mini-maverick-tp1",
    overrides={
        "structured_outputs_config": COMPACT,
        "max_num_batched_tokens": STEP_TOKENS,
        "enable_return_routed_experts": True,
    },
)
PERSON = {
    "type": "object",
    "properties": {
        "digit": {"type": "integer", "minimum": 0, "maximum": 9},
        "sure": {"enum": ["yes", "no"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["digit", "sure"],
    "additionalProperties": False,
}
VOCABULARY = 272


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    spec = EngineSpec(PROFILE.model, PROFILE.revision, PROFILE.engine_args, PROFILE.env)
    replica = Replica(partial(VLLMEngine, spec), ReplicaLimits(flush_s=0.2))
    yield replica
    replica.shutdown()


def run(
    replica: Replica, *requests: Mapping[str, Any], prompts: Iterable[str] = repeat("Say it.")
) -> list[list[Outcome]]:
    """The samples of each request, in order."""
    model = ModelSpec.from_engine_args(PROFILE.model, PROFILE.revision, PROFILE.engine_args)
    request = {name: name for name in ("prompt", "sampling")}
    spec = PrepareSpec(
        model=model,
        columns=InputColumns(request, pa.schema([])),
        sampling=SamplingDefaults(temperature=1.0, max_completion_tokens=200),
        run_seed=1,
        max_image_pixels=10**6,
        fetcher=ImageFetcher("file:///nowhere", 10**6, 4),
    )
    rows = [
        {"prompt": prompt, "sampling": json.dumps(given)}
        for prompt, given in zip(prompts, requests, strict=False)
    ]
    shard = Shard(0, "file:///nowhere/in.parquet", 0, len(rows))
    items = read_prepared(prepare_block(input_block(shard, pa.Table.from_pylist(rows)), spec=spec))
    outcomes = [outcome for batch in replica.generate(0, items) for outcome in batch]
    by_row: list[list[Outcome]] = [[] for _ in rows]
    for outcome in sorted(outcomes, key=lambda outcome: outcome.key):
        by_row[outcome.input_row].append(outcome)
    return by_row


def completions(samples: list[Outcome]) -> list[Completion]:
    found = [sample for sample in samples if isinstance(sample, Completion)]
    assert len(found) == len(samples), samples
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {"json": PERSON},
        {"regex": "(red|green|blue) [0-9]{2}"},
        {"choice": ["positive", "negative", "größer"]},
        {"grammar": 'root ::= "a" root | "b"'},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_every_sample_that_succeeds_has_its_structure(
    replica: Replica, asked: dict[str, Any]
) -> None:
    (samples,) = run(replica, {"structured_outputs": asked, "n": 16})
    structure = StructuredOutputs.model_validate(asked).structure
    done = completions(samples)
    good = [sample for sample in done if sample.code is None]
    assert len(good) >= 8
    assert all(violation(structure, sample.text) is None for sample in good)
    assert {sample.code for sample in done} <= {None, ErrorCode.LENGTH}
    assert all(sample.text for sample in done)


def test_a_json_object_is_one_or_says_that_it_was_cut(replica: Replica) -> None:
    (samples,) = run(replica, {"response_format": {"type": "json_object"}, "n": 8})
    for sample in completions(samples):
        if sample.code is None:
            assert isinstance(json.loads(sample.text), dict)
        else:
            assert (sample.code, sample.finish_reason) == (ErrorCode.LENGTH, "length")


def test_a_structure_cut_by_the_token_limit_or_a_stop_string_is_errored(replica: Replica) -> None:
    asked = {"structured_outputs": {"json": PERSON}}
    (cut,), (stopped,) = run(
        replica, {**asked, "max_completion_tokens": 5}, {**asked, "stop": [":"]}
    )
    assert isinstance(cut, Completion)
    assert (cut.code, cut.completion_tokens) == (ErrorCode.LENGTH, 5)
    assert isinstance(stopped, Completion)
    assert stopped.code is ErrorCode.SCHEMA_VIOLATION
    assert ":" not in stopped.text


def test_a_grammar_that_the_engine_cannot_read_costs_its_row_only(replica: Replica) -> None:
    (bad,), (good,) = run(
        replica, {"structured_outputs": {"grammar": "root ::= ("}}, {"max_completion_tokens": 3}
    )
    assert isinstance(bad, Failure)
    assert bad.code is ErrorCode.ENGINE_REJECTED
    assert good.code is None


def test_log_probabilities_are_one_per_token_with_the_likeliest_beside(replica: Replica) -> None:
    (sample,), (bare,), (none,) = run(
        replica,
        {"logprobs": True, "top_logprobs": 5, "max_completion_tokens": 20},
        {"logprobs": True, "max_completion_tokens": 20},
        {"max_completion_tokens": 20},
    )
    assert isinstance(sample, Completion)
    assert isinstance(bare, Completion)
    assert isinstance(none, Completion)
    assert sample.logprobs is not None
    assert len(sample.logprobs) == sample.completion_tokens
    for token in sample.logprobs.to_pylist():
        values = [top["logprob"] for top in token["top_logprobs"]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert token["logprob"] <= values[0] <= 0
        assert sum(map(math.exp, values)) <= 1.0001
        if token["logprob"] > values[-1]:
            assert token["token_id"] in {top["token_id"] for top in token["top_logprobs"]}
    assert bare.logprobs is not None
    assert {len(token["top_logprobs"]) for token in bare.logprobs.to_pylist()} == {0}
    assert none.logprobs is None


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_bans_it(replica: Replica) -> None:
    greedy = {"temperature": 0, "logprobs": True, "max_completion_tokens": 8}
    ((free,),) = run(replica, greedy)
    assert isinstance(free, Completion)
    assert free.logprobs is not None
    first = free.logprobs[0]["token_id"].as_py()
    (forced,), (banned,) = run(
        replica,
        {**greedy, "logit_bias": {ord("a"): 100}},
        {**greedy, "logit_bias": {first: -100}},
    )
    assert isinstance(forced, Completion)
    assert isinstance(banned, Completion)
    assert forced.text == "a" * 8
    assert banned.logprobs is not None
    assert first not in banned.logprobs.field("token_id").to_pylist()


def test_the_engine_ends_a_completion_as_vllms_own_parameters_say(replica: Replica) -> None:
    end, header = 261, 258  # <|eot|>, <|header_start|>; bytes are tokens 0-255
    ends, writes_a = {"logit_bias": {str(end): 100}}, {"logit_bias": {"97": 100}}
    asked: list[dict[str, Any]] = [
        ends,
        {**ends, "min_tokens": 5, "max_completion_tokens": 9},
        {**ends, "ignore_eos": True, "max_completion_tokens": 7},
        {**writes_a, "stop_token_ids": [97]},
        {**writes_a, "stop": ["1", "2", "3", "4", "aa"], "include_stop_str_in_output": True},
        {**writes_a, "stop": "aa"},
        {**writes_a, "bad_words": ["a"], "max_completion_tokens": 9},
        {"logit_bias": {str(header): 100}, "max_completion_tokens": 2},
        {
            "logit_bias": {str(header): 100},
            "max_completion_tokens": 2,
            "skip_special_tokens": False,
        },
        {"max_completion_tokens": 3, "truncate_prompt_tokens": 4, "seed": -7},
    ]
    done = [sample for (sample,) in run(replica, *asked) if isinstance(sample, Completion)]
    assert len(done) == len(asked)
    plain, least, on, token, kept, cut, banned, special, shown, short = done
    assert (plain.completion_tokens, plain.finish_reason, plain.stop_reason) == (1, "stop", None)
    assert least.completion_tokens >= 5
    assert (on.completion_tokens, on.finish_reason) == (7, "length")
    assert (token.completion_tokens, token.finish_reason, token.stop_reason) == (1, "stop", "97")
    assert (kept.text, kept.stop_reason) == ("aa", "aa")
    assert (cut.text, cut.stop_reason) == ("", "aa")
    assert "a" not in banned.text
    assert (special.text, shown.text) == ("", "<|header_start|>" * 2)
    assert (short.prompt_tokens, short.seed) == (4, -7)


def test_a_token_beyond_the_vocabulary_is_refused_before_the_engine(replica: Replica) -> None:
    ((refused,), (last,)) = run(
        replica,
        {"logit_bias": {VOCABULARY: 1}},
        {"logit_bias": {VOCABULARY - 1: 1}, "max_completion_tokens": 2},
    )
    assert isinstance(refused, Failure)
    assert (refused.code, refused.attempts) == (ErrorCode.INVALID_PARAMETER, 0)
    assert last.code is None


def test_samples_of_one_row_have_a_seed_each_that_makes_them_again(replica: Replica) -> None:
    wild = {"temperature": 2, "structured_outputs": {"regex": "[a-z]{20}"}}
    (samples,) = run(replica, {**wild, "n": 4, "seed": 11})
    done = completions(samples)
    assert [sample.seed for sample in done] == [11, 12, 13, 14]
    assert len({sample.text for sample in done}) == 4
    (again,) = run(replica, {**wild, "seed": 13})
    assert completions(again)[0].text == done[2].text


def test_each_token_that_was_computed_is_counted_once_in_each_layer_of_experts(
    replica: Replica,
) -> None:
    """Prompts longer than a step, with a prefix that the cache has for all but the first."""
    prefix = "Say it again. " * (STEP_TOKENS // 7)
    asked = {"temperature": 0, "max_completion_tokens": 5}
    replica.expert_tokens.take()
    samples = run(replica, asked, prompts=[prefix])
    samples += run(replica, *[asked] * 20, prompts=[f"{prefix} {n}" for n in range(20)])
    done = [sample for row in samples for sample in completions(row)]
    cached = sum(sample.cached_tokens for sample in done)
    assert cached > 15 * STEP_TOKENS
    # what a last token would be followed by is never asked, so no layer sees it
    computed = sum(s.prompt_tokens + s.completion_tokens - 1 for s in done) - cached
    packed = replica.expert_tokens.take()
    assert packed is not None
    load = packed.unpacked()
    assert (load.layout.layers, load.layout.experts) == ((1, 3), 8)
    assert load.tokens == computed
    assert load.counts.sum(axis=1).tolist() == [computed, computed]
    assert (load.counts > 0).sum() > 2


def test_a_prompt_that_is_read_in_several_steps_draws_the_same_tokens(replica: Replica) -> None:
    """Of thirty most do not fit into one step, and their first draws are thrown away; one does."""
    prompts = [f"{seed}: " + "Say it again. " * (STEP_TOKENS // 19) for seed in range(30)]
    wild = {"temperature": 2, "structured_outputs": {"regex": "[a-z]{20}"}}
    together = run(replica, *[{**wild, "seed": seed} for seed in range(30)], prompts=prompts)
    for seed in range(5):
        alone = run(replica, {**wild, "seed": seed}, prompts=[prompts[seed]])
        assert completions(alone[0])[0].text == completions(together[seed])[0].text
    assert replica.engine_restarts == 0
