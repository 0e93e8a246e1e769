"""The admission window follows the engine: by its size, its bursts, its KV cache."""

import random

import pytest

from pipeline.admission import AdmissionWindow, EngineLoad


class Batch:
    """An engine that runs up to ``seats`` requests; each ends in a step by chance."""

    def __init__(self, seats: int, *, steps: int = 50) -> None:
        self.seats = seats
        self.steps = steps
        self.inside = 0
        self.idle_seats = 0
        self._random = random.Random(7)

    def step(self, window: AdmissionWindow, *, preempted: int = 0) -> None:
        """One step with as many requests as the window lets in."""
        self.inside = max(self.inside, window.limit)
        running = min(self.inside, self.seats)
        self.idle_seats += self.seats - running
        finished = sum(self._random.random() < 1 / self.steps for _ in range(running))
        before, self.inside = self.inside, self.inside - finished
        waiting = max(0, before - self.seats)
        window.observe(EngineLoad(running - finished, waiting, finished, preempted), before)


@pytest.mark.parametrize("seats", [1, 8, 64, 256, 2048])
def test_an_engine_of_any_size_is_filled_within_a_few_steps_and_kept_full(seats: int) -> None:
    window, engine = AdmissionWindow(), Batch(seats)
    for _ in range(11):
        engine.step(window)
    engine.idle_seats = 0
    for _ in range(500):
        engine.step(window)
    assert engine.idle_seats == 0
    assert seats < window.limit <= max(1.5 * seats, seats + 8)


def test_rows_that_all_end_at_once_find_as_many_others_waiting() -> None:
    window = AdmissionWindow()
    for _ in range(10):
        window.observe(EngineLoad(running=0, waiting=10, finished=64), 74)
    assert window.limit >= 2 * 64


def test_a_burst_is_forgotten() -> None:
    window = AdmissionWindow()
    window.observe(EngineLoad(running=0, waiting=10, finished=64), 74)
    for _ in range(400):
        window.observe(EngineLoad(running=63, waiting=10, finished=1), 74)
    assert window.limit <= 64 + 4


def test_the_window_grows_only_while_it_is_what_holds_requests_back() -> None:
    window = AdmissionWindow(first=16)
    for _ in range(10):
        window.observe(EngineLoad(running=5, waiting=0), 5)
    assert window.limit == 16


def test_requests_on_their_way_do_not_open_the_window_without_end() -> None:
    window = AdmissionWindow()
    for _ in range(50):  # the engine never sees more than ten of those it was given
        window.observe(EngineLoad(running=10, waiting=0), window.limit)
    assert window.limit == 256


def test_preemptions_cut_the_window_below_what_ran_and_it_comes_back() -> None:
    window, engine = AdmissionWindow(), Batch(100)
    for _ in range(50):
        engine.step(window)
    window.observe(EngineLoad(running=90, waiting=20, preempted=10), 110)
    assert window.limit == 90
    for _ in range(200):
        window.observe(EngineLoad(running=89, waiting=0, finished=1), 90)
    assert window.limit > 100


def test_a_cache_that_stays_too_small_is_found_without_emptying_the_engine() -> None:
    """Preempts whenever more than 40 run; nothing but the window says so."""
    window = AdmissionWindow()
    limits = []
    for _ in range(3000):
        limit = window.limit
        run = min(limit, 60)
        window.observe(EngineLoad(min(run, 40), limit - min(run, 40), 0, max(0, run - 40)), limit)
        limits.append(limit)
    settled = limits[1000:]
    assert min(settled) >= 30
    assert sum(limit > 40 for limit in settled) < len(settled) / 2


def test_the_limit_is_never_below_one() -> None:
    window = AdmissionWindow()
    for _ in range(500):
        window.observe(EngineLoad(running=0, waiting=1, preempted=1), 1)
    assert window.limit == 1
