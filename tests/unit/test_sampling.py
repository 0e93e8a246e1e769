"""Request parameters: merged in the right order, refused with parameter, value and range."""

import json
from typing import Any

import pytest

from pipeline.errors import ErrorCode, RowError
from pipeline.sampling import (
    DEFAULT_COMPLETION_TOKENS,
    Sampling,
    SamplingDefaults,
    parse_row_sampling,
    resolve,
)


def test_a_rows_parameters_win_over_the_runs_and_those_over_openais() -> None:
    run = SamplingDefaults(temperature=0.7, top_p=0.9)
    resolved = resolve(run, parse_row_sampling({"temperature": 0}))
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.0, 0.9, 0)
    assert resolved.max_completion_tokens == DEFAULT_COMPLETION_TOKENS


def test_a_struct_with_null_fields_is_the_same_as_one_without_them() -> None:
    assert parse_row_sampling({"temperature": None, "top_p": 0.5}) == parse_row_sampling(
        json.dumps({"top_p": 0.5})
    )


@pytest.mark.parametrize("given", [None, "", " ", "null", "{}"])
def test_a_row_may_ask_for_nothing(given: Any) -> None:
    assert parse_row_sampling(given) == SamplingDefaults()


def test_the_deprecated_max_tokens_counts_and_a_row_overrides_it() -> None:
    run = SamplingDefaults(max_tokens=7)
    assert resolve(run, SamplingDefaults()).max_completion_tokens == 7
    assert resolve(run, SamplingDefaults(max_completion_tokens=9)).max_completion_tokens == 9


def test_stop_may_be_one_string_or_several() -> None:
    assert resolve(SamplingDefaults(stop="a"), SamplingDefaults()).stop == ("a",)
    assert resolve(SamplingDefaults(stop=["a", "b"]), SamplingDefaults()).stop == ("a", "b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"temperature": 2.5}, "temperature = 2.5: Input should be less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": True}, "temperature = True"),
        ({"top_p": 3}, "top_p = 3: Input should be less than or equal to 1"),
        ({"top_p": 0}, "top_p = 0"),
        ({"n": 0}, "n = 0"),
        ({"n": 1.5}, "n = 1.5"),
        ({"seed": -(2**63) - 1}, "seed = -9223372036854775809"),
        ({"seed": 2**63}, f"seed = {2**63}"),
        ({"stop": ["a"] * 33}, "at most 32 strings, got 33"),
        ({"bad_words": ["\ud800"]}, "bad_words.0 = "),
        ({"bad_words": [""]}, "bad_words.0 = ''"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0 = -1"),
        ({"truncate_prompt_tokens": 0}, "would leave nothing of the prompt"),
        ({"prompt_logprobs": 5}, "prompt_logprobs = 5: give true (or 0)"),
        ({"min_tokens": "many"}, "min_tokens = 'many'"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs is not supported; render"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not supported; say it"),
        ({"guided_json": {}}, "guided_json is not supported; give structured_outputs: {json: ...}"),
        ({"structured_outputs": {"structural_tag": "x"}}, "no key 'structural_tag'; give a JSON"),
        ({"max_new_tokens": 5}, "max_new_tokens is not supported; give max_completion_tokens"),
        ({"stop": ""}, "empty string"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "not both"),
        ({"temprature": 1}, "unknown parameter 'temprature'; known are temperature"),
        ({"x" * 10_000: 1}, "unknown parameter 'xxxx"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 = 101: Input should be less than or equal"),
        ({"logit_bias": {"-1": 1}}, "'-1' is no token id"),
        ({"logit_bias": {"the": 1}}, "'the' is no token id"),
        ({"logit_bias": "{"}, "logit_bias is not valid JSON"),
        ({"logprobs": 5}, "logprobs = 5: Input should be a valid boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs = 21: Input should be less than"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs wants logprobs: true"),
        ({"response_format": {"type": "xml"}}, "response_format.type = 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema goes with type json_schema"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format has no key 'x'"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs = {'regex': '['}: not a reg"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            "give response_format or structured_outputs, not both",
        ),
        ("{", "not valid JSON"),
        ("[]", "JSON object, not list"),
        (7, "not int"),
    ],
)
def test_a_wrong_parameter_is_the_rows_error(given: Any, words: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row_sampling(given)
    assert caught.value.code == ErrorCode.INVALID_PARAMETER
    assert words in caught.value.message


def test_a_long_value_is_quoted_in_part() -> None:
    with pytest.raises(RowError) as caught:
        parse_row_sampling({"temperature": "x" * 1_000_000})
    assert len(caught.value.message) < 1000


def test_nested_parameters_may_be_json_strings_inside_a_struct() -> None:
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    as_text = {"structured_outputs": json.dumps({"json": schema}), "logit_bias": '{"7": -100}'}
    resolved = resolve(SamplingDefaults(), parse_row_sampling(as_text))
    assert resolved.logit_bias == {7: -100.0}
    assert resolved.structure is not None
    assert json.loads(resolved.structure.spec) == schema


def test_nulls_of_a_nested_struct_are_absent_and_those_of_json_are_meant() -> None:
    nested = {"type": "json_object", "json_schema": None}
    assert parse_row_sampling({"response_format": nested}).structure is not None
    given = {"structured_outputs": {"json": {"const": None}}}
    from_struct = parse_row_sampling(given).structure
    from_json = parse_row_sampling(json.dumps(given)).structure
    assert from_struct is not None
    assert from_json is not None
    assert json.loads(from_struct.spec) == {}
    assert json.loads(from_json.spec) == {"const": None}


def test_a_row_may_turn_off_what_the_run_turned_on() -> None:
    run = SamplingDefaults.model_validate(
        {"logprobs": True, "top_logprobs": 3, "structured_outputs": {"choice": ["a"]}}
    )
    assert resolve(run, SamplingDefaults()).logprobs == 3
    row = parse_row_sampling({"logprobs": False, "response_format": {"type": "text"}})
    resolved = resolve(run, row)
    assert (resolved.logprobs, resolved.structure) == (None, None)


def test_logprobs_alone_are_those_of_the_tokens_themselves() -> None:
    assert resolve(SamplingDefaults(), parse_row_sampling({"logprobs": True})).logprobs == 0


def test_resolved_parameters_survive_as_json() -> None:
    row = parse_row_sampling({"logit_bias": {"3": 1.5}, "structured_outputs": {"regex": "a"}})
    resolved = resolve(SamplingDefaults(), row)
    assert Sampling.model_validate_json(resolved.model_dump_json()) == resolved


def test_parameters_survive_in_a_manifest_under_their_own_names() -> None:
    given = {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}
    }
    dumped = SamplingDefaults.model_validate(given).model_dump(mode="json", exclude_none=True)
    assert dumped == given


def test_log_probabilities_are_merged_part_by_part() -> None:
    run = SamplingDefaults(logprobs=True, top_logprobs=5)
    assert resolve(run, parse_row_sampling({"logprobs": True})).logprobs == 5
    assert resolve(run, parse_row_sampling({"top_logprobs": 2})).logprobs == 2
    assert resolve(run, parse_row_sampling({"logprobs": False})).logprobs is None
    with pytest.raises(RowError, match="wants logprobs: true"):
        resolve(SamplingDefaults(), parse_row_sampling({"top_logprobs": 2}))


VLLMS = {
    "min_tokens": 2,
    "ignore_eos": True,
    "stop_token_ids": [7, 8],
    "bad_words": ["ü"],
    "truncate_prompt_tokens": -1,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "prompt_logprobs": 0,
    "top_logprobs": 0,
    "logprobs": False,
    "stop": ["1", "2", "3", "4", "5"],
    "seed": -5,
    "tools": [],
}


def test_what_vllm_takes_as_it_is_is_recorded_and_handed_on() -> None:
    resolved = resolve(SamplingDefaults(), parse_row_sampling(json.dumps(VLLMS)))
    recorded = json.loads(resolved.as_json)
    as_given = set(VLLMS) - {"prompt_logprobs", "top_logprobs", "logprobs", "seed", "tools"}
    assert {name: recorded[name] for name in as_given} == {name: VLLMS[name] for name in as_given}
    assert (resolved.prompt_logprobs, resolved.logprobs) == (True, None)
    assert Sampling.model_validate_json(resolved.as_json) == resolved
    for name in ("min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens", "logprobs"):
        assert resolved.for_engine[name] == getattr(resolved, name)
    # what the prompt is cut by, and names that only this program has, are not the engine's
    assert set(resolved.for_engine).isdisjoint({"truncate_prompt_tokens", "tool_use", "n"})


def test_a_completion_may_not_be_longer_at_least_than_at_most() -> None:
    with pytest.raises(RowError, match="min_tokens = 9: is above max_completion_tokens = 8"):
        resolve(SamplingDefaults(max_completion_tokens=8), parse_row_sampling({"min_tokens": 9}))


def test_parameters_that_an_earlier_version_recorded_are_read_with_todays_defaults() -> None:
    recorded = (
        '{"temperature":0.5,"top_p":1.0,"top_k":0,"min_p":0.0,"frequency_penalty":0.0,'
        '"presence_penalty":0.0,"repetition_penalty":1.0,"max_completion_tokens":64,"stop":["x"],'
        '"n":1,"logit_bias":{"7":1.5},"logprobs":null,"prompt_logprobs":false,"structure":null,'
        '"tool_use":null}'
    )
    row = SamplingDefaults(stop="x", logit_bias={"7": 1.5}, max_completion_tokens=64)
    resolved = resolve(SamplingDefaults(temperature=0.5), row)
    assert Sampling.model_validate_json(recorded) == resolved


def test_a_row_may_offer_no_tools_where_the_run_offers_some() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    run = SamplingDefaults.model_validate({"tools": [tool]})
    assert resolve(run, SamplingDefaults()).tool_use is not None
    assert resolve(run, parse_row_sampling({"tools": []})).tool_use is None


def test_what_the_server_would_take_is_behind_the_runs_and_the_rows() -> None:
    base = SamplingDefaults(temperature=0.6, top_p=0.9, max_completion_tokens=4096)
    row = parse_row_sampling({"temperature": 0.1})
    resolved = resolve(SamplingDefaults(top_p=0.5), row, base)
    assert (resolved.temperature, resolved.top_p) == (0.1, 0.5)
    assert resolved.max_completion_tokens == 4096
