"""The backlog: every sample once, stragglers first, prefixes together, no shard starved."""

import itertools
import random
from collections.abc import Iterable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backlog import Backlog, Waiting, prefix_key

SYSTEM = 100  # tokens


def prompt(group: int, question: int) -> list[int]:
    """A system prompt of its group, then a short question."""
    return [*[group * 1000 + place for place in range(SYSTEM)], *[question] * 10]


def waiting(name: object, tokens: Sequence[int], expected: float = 100) -> Waiting[object]:
    return Waiting(name, prefix_key(tokens), expected)


def order(backlog: Backlog[object]) -> list[object]:
    found = []
    while (sample := backlog.pop()) is not None:
        found.append(sample)
    return found


def changes(groups: Iterable[object]) -> int:
    """Times that one is followed by another."""
    listed = list(groups)
    return sum(one != other for one, other in itertools.pairwise(listed))


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5000)), max_size=30)
    ),
    st.integers(1, 9),
)
def test_every_sample_comes_out_once(
    shards: list[list[tuple[int, int, int]]], open_shards: int
) -> None:
    backlog: Backlog[object] = Backlog(open_shards)
    for number, rows in enumerate(shards):
        backlog.add(
            [
                waiting((number, row), prompt(group, question)[: expected % 120], expected)
                for row, (group, question, expected) in enumerate(rows)
            ]
        )
    everything = {(number, row) for number, rows in enumerate(shards) for row in range(len(rows))}
    assert len(backlog) == len(everything)
    found = order(backlog)
    assert len(found) == len(everything)
    assert set(found) == everything
    assert len(backlog) == 0


def test_samples_that_share_a_prefix_are_neighbours_across_the_shards_of_a_wave() -> None:
    shuffled = [(row % 16, row) for row in range(256)]
    random.Random(1).shuffle(shuffled)
    backlog: Backlog[object] = Backlog(open_shards=8)
    for first in range(0, 256, 64):
        rows = shuffled[first : first + 64]
        backlog.add([waiting((group, row), prompt(group, row)) for group, row in rows])
    found = order(backlog)
    assert changes(pair[0] for pair in found if isinstance(pair, tuple)) == 15


def test_shards_that_come_one_by_one_join_the_wave_that_runs() -> None:
    shuffled = [(row % 16, row) for row in range(256)]
    random.Random(1).shuffle(shuffled)
    backlog: Backlog[object] = Backlog(open_shards=32)
    found: list[object] = []
    for first in range(0, 256, 16):
        rows = shuffled[first : first + 16]
        backlog.add([waiting((group, row), prompt(group, row)) for group, row in rows])
        found += [backlog.pop()] if first < 128 else []
    found += order(backlog)
    assert len(set(found)) == 256
    assert changes(pair[0] for pair in found if isinstance(pair, tuple)) < 20


def test_a_wave_that_is_full_takes_no_more_shards() -> None:
    backlog: Backlog[object] = Backlog(open_shards=4)
    found: list[object] = []
    for shard in range(4):
        backlog.add([waiting((shard, row), prompt(row, shard)) for row in range(3)])
        found += [] if found else [backlog.pop()]
    found += [backlog.pop() for _ in range(5)]
    assert {pair[0] for pair in found if isinstance(pair, tuple)} == {0, 1}


def test_the_last_of_a_group_is_not_left_behind_when_a_shard_joins() -> None:
    backlog: Backlog[object] = Backlog(open_shards=4)
    backlog.add([waiting(f"{g}{row}", prompt(ord(g), row)) for g in "AB" for row in range(3)])
    found = [backlog.pop() for _ in range(2)]
    backlog.add([waiting(f"C{row}", prompt(ord("C"), row)) for row in range(3)])
    found += order(backlog)
    assert changes(str(name)[0] for name in found) == 2


def test_a_wave_begins_with_the_prefix_that_the_last_one_ended_with() -> None:
    backlog: Backlog[object] = Backlog(open_shards=2)
    for _ in range(2):
        rows = [(group, row) for group in range(4) for row in range(3)]
        backlog.add([waiting(group, prompt(group, row)) for group, row in rows])
    found = order(backlog)
    assert found[11] == found[12]
    assert changes(found) == 6


def test_rows_of_one_chat_template_are_not_taken_for_a_group() -> None:
    backlog: Backlog[object] = Backlog(open_shards=8)
    prompts = {name: [7] * 20 + [token] * 10 for name, token in (("a", 9), ("b", 3), ("c", 5))}
    backlog.add([waiting(name, tokens) for name, tokens in prompts.items()])
    assert order(backlog) == ["a", "b", "c"]


def test_stragglers_go_first_whatever_their_prefix_then_the_longest_expected() -> None:
    backlog: Backlog[object] = Backlog(open_shards=8)
    lengths = {"short": 60, "usual": 100, "long": 300, "huge": 3000, "same": 110}
    backlog.add(
        [waiting(name, prompt(1, 1), length) for name, length in lengths.items()]
        + [waiting("other", prompt(2, 2), 2000)]
    )
    assert order(backlog) == ["huge", "other", "long", "usual", "same", "short"]


def test_the_older_half_of_the_open_shards_goes_before_the_younger() -> None:
    backlog: Backlog[object] = Backlog(open_shards=4)
    for shard in range(4):
        backlog.add([waiting(shard, prompt(group, shard)) for group in range(5)])
    found = order(backlog)
    assert set(found[:10]) == {0, 1}
    assert set(found[10:]) == {2, 3}


def test_a_shard_that_comes_late_waits_for_the_wave_to_end() -> None:
    backlog: Backlog[object] = Backlog(open_shards=2)
    backlog.add([waiting("first", prompt(1, row)) for row in range(3)])
    found = [backlog.pop()]
    backlog.add([waiting("second", prompt(1, 9))])
    assert found + order(backlog) == ["first", "first", "first", "second"]


def test_the_stragglers_of_a_shard_that_comes_late_do_not_wait() -> None:
    backlog: Backlog[object] = Backlog(open_shards=2)
    backlog.add([waiting("first", prompt(1, row)) for row in range(3)])
    found = [backlog.pop()]
    backlog.add([*[waiting("second", prompt(1, 9))] * 3, waiting("long", prompt(3, 3), 5000)])
    assert [*found, *order(backlog)][:4] == ["first", "long", "first", "first"]
