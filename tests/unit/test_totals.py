"""Totals: parts are added up as they come, each shard once, and none is kept."""

import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipeline.commit import PartStats
from pipeline.report_document import report_document
from pipeline.totals import Sums, Totals
from tests.report_cases import MANIFEST, SEVERAL_STARTS, Night


def summed(parts: Iterable[PartStats]) -> Sums:
    sums = Sums()
    for part in parts:
        sums.add(part)
    return sums


def document(totals: Totals) -> dict[str, Any]:
    return report_document({"seconds": 1.0}, totals, MANIFEST, datetime(2026, 11, 25, tzinfo=UTC))


def test_the_order_of_the_parts_makes_no_difference_to_the_report() -> None:
    parts = list(SEVERAL_STARTS.parts())
    shuffled = [parts[(31 * number) % len(parts)] for number in range(len(parts))]
    assert document(summed(shuffled).totals()) == document(summed(parts).totals())


def test_of_two_parts_of_a_shard_the_first_counts() -> None:
    first, other = Night(2, rows=100).parts()
    sums = Sums()
    assert sums.add(first)
    assert not sums.add(replace(other, shard=first.shard))
    assert sums.totals() != Sums().totals()
    assert (sums.totals().parts, sums.totals().rows["succeeded"]) == (1, 100)
    assert (first.shard in sums, other.shard in sums, 10_000 in sums) == (True, False, False)


def test_a_part_of_another_run_is_named() -> None:
    parts = list(Night(4).parts())
    assert summed(parts).foreign("r") is None
    assert summed([*parts[:2], replace(parts[2], run="other"), parts[3]]).foreign("r") == 2


def test_totals_stay_as_they_were_when_more_parts_come() -> None:
    parts = list(SEVERAL_STARTS.parts())
    sums = summed(parts[:20])
    totals = sums.totals()
    before = document(totals)
    for part in parts[20:]:
        sums.add(part)
    assert document(totals) == before


def test_memory_does_not_grow_with_the_number_of_parts() -> None:
    parts = list(Night(200, errors={"timeout": 1}).parts())
    sums = summed(parts)
    tracemalloc.start()
    for number in range(200, 4_000):
        sums.add(replace(parts[number % 200], shard=number))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sums.totals().parts == 4_000
    assert grown < 100 * 4_000  # bytes; the stats of one part take some 8,000
