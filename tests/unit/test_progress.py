"""Progress lines: rows, speed, failures and time left, in a log without a terminal."""

import logging

import pytest

from pipeline.errors import ErrorCode
from pipeline.progress import Pace, ProgressDisplay, Rate, RowTally, Tally
from pipeline.records import Completion, Failure, Outcome


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def completion(row: int, sample: int = 0, code: ErrorCode | None = None) -> Completion:
    return Completion(row, "id", sample, "text", "stop", 10, 5, 4, 2, 0, 0.1, code=code)


def test_tallies_add_up() -> None:
    assert Tally(1, 2, 3) + Tally(10, 20, 30) == Tally(11, 22, 33)
    one, other = Tally(errors={"timeout": 2, "length": 1}), Tally(errors={"timeout": 2})
    assert (one + other).errors == {"timeout": 4, "length": 1}
    assert (one - other).errors == {"length": 1}


def test_outcomes_are_counted_by_row_and_by_record() -> None:
    outcomes: list[Outcome] = [
        completion(0),
        completion(0, sample=1, code=ErrorCode.LENGTH),
        Failure(1, "id", ErrorCode.TIMEOUT, "too long", 0, prompt_tokens=7, image_tokens=3),
    ]
    assert RowTally({0: 2, 1: 1}).count(outcomes) == Tally(
        rows=2,
        failed=2,
        tokens=10,
        prompt_tokens=27,
        cached_tokens=8,
        image_tokens=7,
        errors={"length": 1, "timeout": 1},
    )
    known = RowTally({0: 2, 1: 1}).count(outcomes, known=True)
    assert (known.rows, known.known_rows, known.known_tokens) == (2, 2, 10)


def test_a_row_of_several_samples_fails_once_and_ends_with_its_last_sample() -> None:
    rows = RowTally({0: 8, 1: 8})
    seen = Tally()
    for sample in range(8):
        seen += rows.count([completion(0, sample, ErrorCode.LENGTH), completion(1, sample)])
        assert (seen.rows, seen.failed) == ((2, 1) if sample == 7 else (0, 0))
    assert (seen.errors, seen.tokens) == ({"length": 8}, 80)


def test_the_rate_is_of_the_last_minute_and_of_the_time_since_the_first_row() -> None:
    clock = Clock()
    pace = Pace(clock)
    for second in range(300):  # engines start for 100 s, then 2 rows a second, then 1
        clock.now = 1000.0 + second
        rows = 0 if second <= 100 else 2 * (second - 100) if second <= 200 else 100 + second - 100
        pace.note(Tally(rows=rows, tokens=10 * rows))
    assert pace.lately() == Rate(1.0, 10.0)
    assert pace.overall() == Rate(round(299 / 199, 3), round(2990 / 199, 3))


def test_rows_of_earlier_attempts_are_not_this_starts_work() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.note(Tally())
    clock.now += 10
    pace.note(Tally(rows=500, tokens=900, known_rows=490, known_tokens=800))
    assert pace.lately() == pace.overall() == Rate(1.0, 10.0)


def test_a_tally_that_shrinks_is_no_negative_rate() -> None:
    clock = Clock()
    pace = Pace(clock)
    for rows in (0, 50, 40):
        pace.note(Tally(rows=rows))
        clock.now += 60
    assert pace.lately() == Rate()


def test_a_log_gets_plain_lines_at_intervals_not_one_per_update(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with ProgressDisplay(total=100, done=40) as display:
        display.update(Tally())
        for rows in range(1, 50):
            display.update(Tally(rows, 1, rows * 10))
    assert [record.message for record in caplog.records] == ["rows 40/100  starting engines"]


def test_engines_that_are_up_and_through_with_nothing_yet_are_not_called_starting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    ProgressDisplay(total=100, done=0).update(Tally(), running=2)
    assert [record.message for record in caplog.records] == ["rows 0/100  no row is through yet"]


def test_the_first_counts_are_shown_with_speed_failures_and_time_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    ProgressDisplay(total=100, done=40).update(Tally(30, 2, 500))
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("rows 70/100  ")
    assert "tok/s  failed 2  ETA 0:" in line
