"""Work on many items with a few threads: in order, and never far ahead of who takes the results."""

from itertools import count, islice

import pytest

from pipeline.faults import current_patience, patience
from pipeline.parallel import mapped


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(mapped(lambda number: number * number, range(1_000), 4)) == [
        number * number for number in range(1_000)
    ]
    assert list(mapped(str, [], 4)) == []


def test_items_are_drawn_as_their_results_are_taken() -> None:
    numbers = count()
    results = mapped(lambda number: number, numbers, 2)
    assert list(islice(results, 100)) == list(range(100))
    assert next(numbers) < 100 + 2 * 8


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    def halve(number: int) -> float:
        return 1 / (3 - number)

    results = mapped(halve, count(), 2)
    assert [next(results), next(results), next(results)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


def test_threads_have_the_patience_of_their_caller() -> None:
    with patience(1.5):
        assert list(mapped(lambda _: current_patience(), range(3), 2)) == [1.5] * 3
