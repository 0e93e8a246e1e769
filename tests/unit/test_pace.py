"""Pace: when rows were finished, in few bins that add up exactly."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ErrorCode
from pipeline.pace import MOST_BINS, Pace, PaceSum
from pipeline.records import Completion, Failure, Outcome

NOON = 1_795_608_000.0


def completion(row: int, at: float | None, sample: int = 0) -> Completion:
    return Completion(row, "a", sample, "x", "stop", 5, 10, 0, 0, 1, 0.5, finished_at=at)


def test_rows_count_once_and_tokens_of_all_samples_in_the_second_they_were_finished() -> None:
    outcomes: list[Outcome] = [
        completion(0, NOON + 0.1),
        completion(0, NOON + 0.9, sample=1),
        completion(1, NOON + 3),
        Failure(2, "b", ErrorCode.TIMEOUT, "m", 1, finished_at=NOON + 3.999),
        completion(3, None),
    ]
    assert Pace.of(outcomes) == Pace(1, int(NOON), (0, 3), (1, 2), (20, 10))


def test_a_shard_over_hours_has_few_bins_and_loses_no_row() -> None:
    pace = Pace.of(completion(row, NOON + 7 * row) for row in range(5_000))
    assert MOST_BINS / 2 <= len(pace.rows) <= MOST_BINS
    assert (sum(pace.rows), sum(pace.tokens)) == (5_000, 50_000)


def test_rows_of_another_day_do_not_make_the_bins_wider() -> None:
    pace = Pace.of(
        [completion(0, NOON), completion(1, NOON + 86_400), completion(2, NOON + 86_401)]
    )
    assert (pace.bin_s, pace.offsets) == (1, (0, 86_400, 86_401))


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(NOON, NOON + 40_000), max_size=90), max_size=6))
def test_sums_are_those_of_all_rows_at_any_width(times: list[list[float]]) -> None:
    total = PaceSum()
    for shard in times:
        total.add(Pace.of((completion(0, at) for at in shard), most_bins=16))
    for bin_s in (1, 64, 1024):
        pace = total.total(bin_s)
        found = {number: rows for number, rows, _ in pace.bins()}
        numbers = [int(at) // pace.bin_s for shard in times for at in shard]
        assert found == {number: numbers.count(number) for number in numbers}


def test_a_sum_of_weeks_by_the_second_stays_small() -> None:
    total = PaceSum()
    for hour in range(600):
        first = int(NOON) + 3600 * hour
        total.add(Pace(1, first, tuple(range(0, 3600, 60)), (1,) * 60, (2,) * 60))
    pace = total.total()
    assert len(pace.rows) <= 8192
    assert (sum(pace.rows), sum(pace.tokens)) == (36_000, 72_000)
