"""Request parameters: merged in the right order, refused with parameter, value and range."""

import json
from typing import Any

import pytest

from pipeline.errors import ErrorCode, RowError
from pipeline.sampling import (
    DEFAULT_COMPLETION_TOKENS,
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
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, f"seed = {2**63}"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "at most 4 strings, got 5"),
        ({"stop": ""}, "empty string"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "not both"),
        ({"temprature": 1}, "unknown parameter 'temprature'; known are temperature"),
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
