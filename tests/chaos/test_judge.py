"""The judge: each promise kept passes, each broken one fails."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.chaos.judge import (
    Check,
    Repeat,
    find_repeats,
    judge_campaign,
    judge_records,
    judge_waste,
)
from tests.chaos.ledger import Generation

Rows = list[dict[str, Any]]
OWNER = (100, 1.0)


def expected() -> Rows:
    codes = [None, None, "image_invalid"]
    return [
        {"input_file": "a.parquet", "input_row": i, "expected_error": code, "task": "t"}
        for i, code in enumerate(codes)
    ]


def records() -> Rows:
    def record(row: int, **more: Any) -> dict[str, Any]:
        return {
            "input_file": "s3://batch/in/a.parquet",
            "input_row": row,
            "sample_index": 0,
            "status": "succeeded",
            "text": f"text {row}",
            "completion_tokens": 7,
            "prompt_tokens": 3,
            "finish_reason": "stop",
            "seed": row,
            "error_code": None,
            **more,
        }

    failed = {"status": "errored", "text": None, "error_code": "image_invalid"}
    return [record(0), record(1), record(2, **failed)]


def verdicts(disturbed: Rows, reference: Rows | None = None) -> Mapping[str, bool]:
    checks = judge_records(expected(), reference or records(), disturbed)
    return {check.name: check.passed for check in checks}


def failing(checks: Mapping[str, bool]) -> set[str]:
    return {name for name, passed in checks.items() if not passed}


def changed(row: int, **changes: Any) -> Rows:
    return [{**one, **(changes if one["input_row"] == row else {})} for one in records()]


def test_a_whole_run_passes_in_whatever_order() -> None:
    assert failing(verdicts(records()[::-1])) == set()


def test_a_missing_row_fails() -> None:
    assert "rows missing" in failing(verdicts(records()[1:]))
    assert "rows missing" in failing(verdicts([]))


def test_no_input_at_all_is_no_success() -> None:
    checks = judge_records([], records(), records())
    assert not checks[0].passed


def test_a_double_record_fails() -> None:
    assert failing(verdicts([*records(), records()[0]])) == {"records double or of no row"}


def test_two_samples_of_a_row_are_no_duplicates() -> None:
    both = [*records(), {**records()[0], "sample_index": 1}]
    assert failing(verdicts(both, both)) == set()


def test_a_record_of_no_row_fails() -> None:
    stray = {**records()[0], "input_row": 99}
    assert failing(verdicts([*records(), stray])) == {"records double or of no row"}


@pytest.mark.parametrize(
    "change",
    [
        {"text": "other"},
        {"completion_tokens": 8},
        {"prompt_tokens": 8},
        {"finish_reason": "length"},
        {"seed": 5},
        {"status": "errored"},
    ],
)
def test_a_good_row_unlike_the_reference_fails(change: dict[str, Any]) -> None:
    name = "good rows equal to the reference"
    assert failing(verdicts(changed(1, **change))) == {name}
    assert name in failing(verdicts(records(), changed(1, **change)))


def test_a_good_row_that_failed_in_both_runs_fails() -> None:
    both = changed(1, status="errored", error_code="engine_fatal")
    assert failing(verdicts(both, both)) == {"good rows equal to the reference"}


@pytest.mark.parametrize(
    "change", [{"error_code": "internal_error"}, {"status": "succeeded", "error_code": None}]
)
def test_poison_with_another_code_or_none_fails(change: dict[str, Any]) -> None:
    assert failing(verdicts(changed(2, **change))) == {"poison rows have the right code"}
    assert failing(verdicts(records(), changed(2, **change))) == {
        "poison rows of the reference too"
    }


def generation(at: float, *, seed: int = 1, pid: int = OWNER[0], tokens: int = 10) -> Generation:
    return Generation(at, "0-0-0", seed, 5, tokens, pid, OWNER[1], 7)


def repeats(*generations: Generation, **more: Any) -> list[Repeat]:
    given = {"deaths": {OWNER: 110.0}, "outages": [], "journal_s": 5.0, "slack_s": 2.0, **more}
    return find_repeats(generations, given.pop("deaths"), given.pop("outages"), **given)


def test_generations_of_different_samples_are_no_repeats() -> None:
    assert repeats(generation(1), generation(2, seed=2)) == []


@pytest.mark.parametrize(("first", "excused"), [(109.0, True), (103.0, True), (102.9, False)])
def test_a_repeat_is_excused_within_the_journal_interval_before_the_death(
    first: float, excused: bool
) -> None:
    assert repeats(generation(first), generation(150, tokens=11)) == [
        Repeat(first, 150, 11, excused)
    ]


def test_a_repeat_without_a_death_is_not_excused() -> None:
    (repeat,) = repeats(generation(109), generation(111), deaths={})
    assert not repeat.excused
    (repeat,) = repeats(generation(109, pid=55), generation(111))
    assert not repeat.excused


@pytest.mark.parametrize(
    ("first", "outage", "excused"),
    [
        (87.0, (88.0, 100.0), True),  # away from 88 to 100, and 5 s until the next try
        (78.0, (88.0, 98.0), False),
        (101.0, (102.0, 108.0), True),
        (94.0, (102.0, 108.0), False),
        (102.0, (111.0, 121.0), False),
    ],
)
def test_the_time_the_store_was_away_does_not_count(
    first: float, outage: tuple[float, float], excused: bool
) -> None:
    (repeat,) = repeats(generation(first), generation(150), outages=[outage])
    assert repeat.excused is excused


def test_each_further_generation_is_a_repeat_of_the_one_before_it() -> None:
    found = repeats(generation(150), generation(50), generation(109))
    assert [(one.first_at, one.again_at) for one in found] == [(50, 109), (109, 150)]
    assert [one.excused for one in found] == [False, True]


@pytest.mark.parametrize(("wasted", "passed"), [(0, True), (10, True), (11, False)])
def test_more_than_one_percent_of_waste_fails(wasted: int, passed: bool) -> None:
    book = [generation(1, seed=seed, tokens=10) for seed in range(100)]
    waste = [Repeat(1, 2, wasted, excused=False), Repeat(1, 2, 500, excused=True)]
    assert judge_waste(waste, book).passed is passed


def test_an_empty_ledger_proves_nothing() -> None:
    assert not judge_waste([], []).passed


def campaign(**changes: Any) -> set[str]:
    fine = {
        "landed": 3,
        "wanted": 3,
        "exits": [-9, 75, 1, 0],
        "driver_kills": 1,
        "errors": ["the store is away"],
        "finished": True,
        "left_over": [],
        "troubles": [],
    }
    checks: list[Check] = judge_campaign(**{**fine, **changes})
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, set()),
        ({"landed": 2}, {"kills landed"}),
        ({"finished": False}, {"the run is complete"}),
        ({"exits": [0, 1]}, {"the run is complete"}),
        ({"exits": []}, {"the run is complete"}),
        ({"exits": [2, 0]}, {"every stop could be resumed"}),
        ({"driver_kills": 0}, {"every stop could be resumed"}),
        ({"exits": [-11, 0]}, {"every stop could be resumed"}),
        ({"troubles": ["no progress"]}, {"nobody had to help"}),
        ({"left_over": ["7 (VLLM::Worker)"]}, {"nothing left behind"}),
    ],
)
def test_a_campaign_passes_only_whole(changes: dict[str, Any], failed: set[str]) -> None:
    assert campaign(**changes) == failed
