"""Progress lines: rows, speed, failures and time left, in a log without a terminal."""

import logging

import pytest

from pipeline.progress import ProgressDisplay, Tally


def test_tallies_add_up() -> None:
    assert Tally(1, 2, 3) + Tally(10, 20, 30) == Tally(11, 22, 33)


def test_a_log_gets_plain_lines_at_intervals_not_one_per_update(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with ProgressDisplay(total=100, done=40) as display:
        display.update(Tally())
        for rows in range(1, 50):
            display.update(Tally(rows, 1, rows * 10))
    assert [record.message for record in caplog.records] == ["rows 40/100  starting engines"]


def test_the_first_counts_are_shown_with_speed_failures_and_time_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    ProgressDisplay(total=100, done=40).update(Tally(30, 2, 500))
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("rows 70/100  ")
    assert "tok/s  failed 2  ETA 0:" in line
