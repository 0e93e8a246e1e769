"""Completion lengths: survival curves with cut completions, kinds, ranges, and what is upheld."""

import numpy as np
import pytest

from pipeline.lengths import Caps, Curve, FromRun, Given, Kind, Observed, rounded_cap

SHORT = Kind(False, 6, 4)
LONG = Kind(False, 12, 4)


def curve(tokens: list[int], cut: list[int] | None = None) -> Curve:
    return Curve(np.array(tokens), np.array(cut or [0] * len(tokens), bool))


def learnt(*groups: tuple[Kind, list[int], list[bool]]) -> FromRun:
    kinds = [
        [kind.with_images, kind.cap_bits, kind.prompt_bits]
        for kind, tokens, _ in groups
        for _ in tokens
    ]
    observed = Observed(
        np.array([each for _, tokens, _ in groups for each in tokens]),
        np.array([each for _, _, cut in groups for each in cut]),
        np.array(kinds, np.int64),
    )
    return FromRun(observed, run="s3://b/r", finished_at="2026-11-24T00:00:00+00:00", records=99)


def run_of(rng: np.random.Generator, rows: int) -> dict[int, np.ndarray]:
    """Natural lengths by cap: what is asked for little is short, what is asked for much is long."""
    return {
        48: rng.lognormal(2.5, 0.8, rows).astype(int) + 1,
        2000: rng.lognormal(5.5, 1.0, rows).astype(int) + 1,
    }


def test_without_cuts_the_mean_under_a_cap_is_that_of_the_capped_lengths() -> None:
    lengths = curve([2, 4, 4, 10])
    assert lengths.within(100).value == pytest.approx(5.0)
    assert lengths.within(4).value == pytest.approx((2 + 4 + 4 + 4) / 4)
    assert lengths.within(3).value == pytest.approx((2 + 3 + 3 + 3) / 4)
    assert lengths.within(100).sd == pytest.approx(np.std([2, 4, 4, 10]))
    assert lengths.within(100).low == lengths.within(100).high == pytest.approx(5.0)


def test_a_cut_completion_counts_as_at_least_that_long() -> None:
    # S = 1 to 2, 3/4 to 4; one of the three left is cut there, one of two ends at 6: 3/8 to 8
    lengths = curve([2, 4, 6, 8], [0, 1, 0, 0])
    assert lengths.within(8).value == pytest.approx(2 + 0.75 * 4 + 0.375 * 2)


def test_beyond_what_was_seen_the_curve_goes_on_at_its_rate_and_the_range_tells_what_is_open() -> (
    None
):
    lengths = curve([10, 10, 10, 10], [0, 0, 1, 1])  # half end, at a rate of 2 in 40 tokens
    found = lengths.within(30)
    assert found.low == pytest.approx(10)
    assert found.high == pytest.approx(10 + 0.5 * 20)
    assert found.value == pytest.approx(10 + 0.5 * (1 - np.exp(-20 / 20)) * 20)
    assert curve([10], [1]).within(30).value == pytest.approx(30), "none has ended: none will"


def test_empty_completions_stay_empty() -> None:
    assert curve([0, 0]).within(100).value == 0


def test_a_kind_with_few_completions_is_judged_by_a_broader_one() -> None:
    model = learnt(
        (SHORT, [5] * 40, [False] * 40),
        (LONG, [500] * 29, [False] * 29),
    )
    assert model.mean(SHORT, 60) == pytest.approx(5)
    assert model.mean(LONG, 4000) == pytest.approx((5 * 40 + 500 * 29) / 69)
    assert model.mean(Kind(True, 6, 4), 60) < 60, "a kind never seen"


@pytest.mark.parametrize("seed", range(5))
def test_a_run_of_the_same_distribution_is_met_within_15_percent_and_the_range(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = run_of(rng, 400), run_of(rng, 1000)
    model = learnt(
        *(
            (Kind(False, cap.bit_length(), 5), np.minimum(each, cap).tolist(), list(each > cap))
            for cap, each in before.items()
        )
    )
    cells = {(Kind(False, cap.bit_length(), 5), cap): 1000.0 for cap in after}
    truth = sum(np.minimum(each, cap).sum() for cap, each in after.items())
    found = model.total(cells, 1000 * 2048, 0.0)
    assert abs(found.value / truth - 1) < 0.15
    assert found.low < truth < found.high


def test_lengths_under_one_cap_tell_those_under_another() -> None:
    natural = np.random.default_rng(1).lognormal(4, 1, 4000).astype(int) + 1
    model = learnt((LONG, np.minimum(natural, 2500).tolist(), list(natural > 2500)))
    assert model.mean(LONG, 64) == pytest.approx(np.minimum(natural, 64).mean(), rel=0.01)


def test_the_range_grows_with_what_a_sample_leaves_open_and_never_passes_the_caps() -> None:
    model = learnt((SHORT, [1, 60] * 20, [False] * 40))
    cells = {(SHORT, 60): 100.0}
    narrow, wide = (model.total(cells, 6000, sd) for sd in (0.0, 400.0))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert model.total(cells, narrow.value + 1, 0.0).high == narrow.value + 1


def test_caps_are_an_upper_bound_and_a_given_mean_ends_at_them() -> None:
    cells = {(SHORT, 60): 10.0, (LONG, 4000): 1.0}
    assert Caps().total(cells, 4600, 0.0).value == 4600
    assert Given(100).total(cells, 4600, 0.0).value == 10 * 60 + 100
    assert Given(100).total(cells, 4600, 0.0).high == 4600


def test_caps_people_write_stay_exact_and_others_within_1_percent() -> None:
    assert [rounded_cap(cap) for cap in (0, 1, 64, 100, 500, 2000, 4096)] == [
        *(0, 1, 64, 100, 500, 2000, 4096)
    ]
    assert all(abs(rounded_cap(cap) / cap - 1) < 0.008 for cap in range(1, 40_000, 7))
