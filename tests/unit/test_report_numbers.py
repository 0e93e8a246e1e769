"""What people get to read: numbers with units, buckets, axes."""

import pytest

from pipeline import formats
from pipeline.charts import TimeAxis, latency_chart, length_chart, nice_ceiling
from pipeline.errors import ErrorCode
from pipeline.histogram import (
    latency_bounds,
    latency_bucket,
    length_bounds,
    length_bucket,
    quantile_bucket,
)
from pipeline.remedies import REMEDIES
from pipeline.report_page import visible


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (formats.integer(10_000_000), "10,000,000"),
        (formats.compact(99_999), "99,999"),
        (formats.compact(1_234_567), "1.23 M"),
        (formats.compact(999_999), "1.00 M"),
        (formats.compact(12_345_678_901), "12.3 B"),
        (formats.rate(0), "0"),
        (formats.rate(0.0123), "0.0123"),
        (formats.rate(9_999), "9,999"),
        (formats.round_number(40_000), "40 k"),
        (formats.duration(0), "0 s"),
        (formats.duration(4.21), "4.2 s"),
        (formats.duration(119.6), "2 min"),
        (formats.duration(3_599.7), "1 h"),
        (formats.duration(4_353), "1 h 13 min"),
        (formats.duration(200_000), "2 d 8 h"),
        (formats.latency(0.2134), "0.213 s"),
        (formats.latency(None), "none"),
        (formats.percent(0), "0 %"),
        (formats.percent(1e-7), "< 0.01 %"),
        (formats.percent(0.9999999), "> 99.99 %"),
        (formats.percent(0.0586), "5.86 %"),
        (formats.percent(1), "100 %"),
        (formats.amount(1_234.5, "USD"), "1,234.50 USD"),
        (formats.amount(0.00123, "USD"), "0.0012 USD"),
        (visible("a\u202eb\x00\n"), "a\\u202eb\\u0000\n"),
    ],
)
def test_numbers_and_texts_are_written_for_people(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize("seconds", [1e-9, 0.001, 0.5, 1.0, 1.0001, 7.3, 600, 90_000])
def test_a_latency_lies_in_its_bucket_which_is_at_most_a_tenth_wide(seconds: float) -> None:
    low, high = latency_bounds(latency_bucket(seconds))
    assert low < max(seconds, 2**-10) <= high < 1.0906 * low


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 255, 256, 1_000_000])
def test_a_length_lies_in_its_bucket(tokens: int) -> None:
    low, high = length_bounds(length_bucket(tokens))
    assert low <= tokens <= high


def test_quantiles_are_the_buckets_that_hold_them() -> None:
    counts = {3: 50, 4: 40, 9: 9, 20: 1}
    found = [quantile_bucket(counts, share) for share in (0.5, 0.51, 0.9, 0.99, 1.0)]
    assert found == [3, 4, 4, 9, 20]
    assert quantile_bucket({}, 0.5) is None


def test_every_error_code_has_a_remedy_of_one_sentence() -> None:
    assert set(REMEDIES) == set(ErrorCode)
    for remedy in REMEDIES.values():
        assert remedy.endswith(".")


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (1, 1), (3, 4), (41, 50), (100, 100), (101, 200), (0.03, 0.04)]
)
def test_axes_end_at_round_numbers(value: float, top: float) -> None:
    assert nice_ceiling(value) == pytest.approx(top)


def test_time_runs_from_left_to_right_and_stands_still_in_pauses() -> None:
    stretches = [
        {"start": "2026-11-25T00:00:00+00:00", "rows": [1] * 30, "completion_tokens": [1] * 30},
        {"start": "2026-11-26T00:00:00+00:00", "rows": [1] * 30, "completion_tokens": [1] * 30},
    ]
    axis = TimeAxis({"bin_s": 60, "stretches": stretches})
    begin, day = formats.epoch("2026-11-25T00:00:00+00:00"), 86_400
    places = [axis.at(begin + at) for at in (-5, 0, 300, 1_800, 40_000, day, day + 1_800, 2 * day)]
    assert places == sorted(places)
    assert (places[0], places[1]) == (0, 0)
    assert places[-1] == pytest.approx(100)
    assert places[3] == places[4] < places[5]
    assert axis.pauses()[0].title.startswith("Nothing ran for 23 h 30 min")
    labels = [tick.label for tick in axis.ticks()]
    assert labels[0] == "25 Nov 00:00"
    assert "26 Nov 00:00" in labels
    assert axis.ends() == ("25 Nov 00:00", "26 Nov 00:30")


def test_histograms_keep_all_counts_and_the_empty_places_between() -> None:
    lengths = [{"from": 0, "to": 0, "rows": 3}, {"from": 64, "to": 127, "rows": 4}]
    chart = length_chart(lengths, "rows")
    assert [bar.value for bar in chart.bars] == [3, 0, 0, 0, 0, 0, 0, 4]
    latencies = [{"to": latency_bounds(bucket)[1], "completions": 2} for bucket in range(-40, 100)]
    chart = latency_chart(latencies)
    assert sum(bar.value for bar in chart.bars) == 280
    assert len(chart.bars) <= 41
