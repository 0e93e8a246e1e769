"""Blocks of several datasets: in order, the next one begun before the last is drained."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.blocks import Blocks, Rest, Window
from tests.waiting import wait_until


@dataclass
class FakeDataset:
    """Numbers for references to blocks; notes when it begins."""

    first: int
    blocks: int
    begun: list[int]
    fails: bool = False

    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        self.begun.append(self.first)
        for number in range(self.first, self.first + self.blocks):
            yield SimpleNamespace(block_refs=[number])
        if self.fails:
            raise RuntimeError("a file is gone")


def _same(dataset: Any) -> Any:
    return dataset


def windows(*sizes: int, begun: list[int], fails: bool = False) -> list[Window]:
    made = []
    for number, size in enumerate(sizes):
        dataset: Any = FakeDataset(sum(sizes[:number]), size, begun, fails)
        made.append(Window(partial(_same, dataset), size))
    return made


def test_all_blocks_come_once_in_the_order_of_the_windows() -> None:
    with Blocks(windows(3, 1, 2, 40, begun=[]), ahead=2) as blocks:
        assert list(blocks) == list(range(46))
        assert blocks.all_taken


def test_without_a_window_there_is_no_block() -> None:
    with Blocks([], ahead=2) as blocks:
        assert list(blocks) == []


def test_the_next_dataset_begins_when_half_of_one_is_taken_and_no_further_one_does() -> None:
    begun: list[int] = []
    with Blocks(windows(20, 20, 20, begun=begun), ahead=2) as blocks:
        taken = iter(blocks)
        assert [next(taken) for _ in range(8)] == list(range(8))
        assert begun == [0]
        assert [next(taken) for _ in range(4)] == [8, 9, 10, 11]
        wait_until(lambda: begun == [0, 20])
        time.sleep(0.3)  # the third would begin, if anything made it
        assert begun == [0, 20]


def test_what_ends_a_dataset_is_raised_where_blocks_are_taken() -> None:
    broken = windows(3, begun=[], fails=True)
    with Blocks(broken, ahead=8) as blocks, pytest.raises(RuntimeError, match="a file is gone"):
        list(blocks)


def test_a_dataset_rests_between_two_steps_in_which_nothing_happened() -> None:
    work = SimpleNamespace(num_tasks_submitted=3, num_task_outputs_generated=2, num_outputs_taken=0)
    executor: Any = SimpleNamespace(_topology=[SimpleNamespace(metrics=work)])
    rest = Rest()

    def seconds(*, taken: int) -> float:
        began = time.monotonic()
        for _ in range(20):
            work.num_outputs_taken += taken
            rest.on_execution_step(executor)
        return time.monotonic() - began

    assert seconds(taken=1) < 0.5 < seconds(taken=0)
