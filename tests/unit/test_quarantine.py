"""Quarantine: the killer is found in log2 restarts, the innocent never convicted."""

import math
import time
from random import Random

import pytest

from pipeline.quarantine import Quarantine


def run_to_the_end(keys: list[int], killers: set[int], *, rng: Random) -> tuple[set[int], int]:
    """Feed an engine that dies once a killer is inside; (convicted, deaths)."""
    quarantine: Quarantine[int] = Quarantine()
    waiting, convicted, deaths = list(keys), set(), 0
    while waiting:
        inside = [key for key in waiting if quarantine.admits(key)]
        assert inside, "nobody may enter: rows would hang"
        fatal = [key for key in inside if key in killers]
        if fatal:
            deaths += 1
            innocent = [key for key in inside if key not in killers]
            finished = rng.sample(innocent, len(innocent) // 3)  # before the death
        else:
            finished = inside
        for key in finished:
            quarantine.ended(key)
            waiting.remove(key)
        if fatal:
            verdict = quarantine.died([key for key in inside if key in waiting])
            if verdict is not None:
                convicted.add(verdict)
                waiting.remove(verdict)
    assert not quarantine.active
    return convicted, deaths


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 100, 1024])
@pytest.mark.parametrize("seed", range(5))
def test_one_killer_costs_about_log2_restarts_and_nobody_else(size: int, seed: int) -> None:
    rng = Random(seed)
    killer = rng.randrange(size)
    convicted, deaths = run_to_the_end(list(range(size)), {killer}, rng=rng)
    assert convicted == {killer}
    assert deaths <= max(3, math.ceil(math.log2(size)) + 1)


@pytest.mark.parametrize("seed", range(10))
def test_several_killers_are_all_found(seed: int) -> None:
    rng = Random(seed)
    killers = set(rng.sample(range(64), 4))
    convicted, deaths = run_to_the_end(list(range(64)), killers, rng=rng)
    assert convicted == killers
    assert deaths <= 4 * (math.log2(64) + 2)


def test_a_death_for_another_reason_convicts_nobody_and_needs_no_further_restart() -> None:
    quarantine: Quarantine[int] = Quarantine()
    assert quarantine.died(range(8)) is None
    rounds = 0
    waiting = list(range(8))
    while quarantine.active:
        rounds += 1
        for key in [key for key in waiting if quarantine.admits(key)]:
            quarantine.ended(key)
            waiting.remove(key)
    assert not waiting
    assert rounds <= 4


def test_others_wait_until_the_suspects_are_through() -> None:
    quarantine: Quarantine[str] = Quarantine()
    assert quarantine.admits("new")
    quarantine.died(["a", "b"])
    assert quarantine.admits("a")
    assert not quarantine.admits("b")
    assert not quarantine.admits("new")
    quarantine.ended("a")
    assert quarantine.admits("b")
    quarantine.ended("b")
    assert quarantine.admits("new")


def test_only_the_end_of_a_whole_half_lets_others_in() -> None:
    quarantine: Quarantine[int] = Quarantine()
    assert not quarantine.ended(1)
    quarantine.died(range(4))
    assert [quarantine.ended(key) for key in range(4)] == [False, True, True, True]
    assert not quarantine.active


def test_a_full_engines_suspects_are_cleared_in_no_time() -> None:
    """One by one they are 16,000 steps, not 16,000 times 16,000."""
    quarantine: Quarantine[int] = Quarantine()
    quarantine.died(range(50_000))
    started = time.monotonic()
    for key in reversed(range(50_000)):
        quarantine.ended(key)
    assert time.monotonic() - started < 5  # 0.05 s; by a list's own search, minutes
    assert not quarantine.active


def test_one_death_or_two_of_a_lonely_request_are_not_enough() -> None:
    quarantine: Quarantine[str] = Quarantine()
    assert quarantine.died(["a"]) is None
    assert quarantine.died(["a"]) is None
    assert quarantine.deaths("a") == 2
    assert quarantine.died(["a"]) == "a"
    assert not quarantine.active


def test_an_idle_engine_that_dies_accuses_nobody() -> None:
    quarantine: Quarantine[str] = Quarantine()
    assert quarantine.died([]) is None
    assert quarantine.admits("a")
