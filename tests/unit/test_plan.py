"""Plans: every row in exactly one shard, whatever the files; the same input gives the same plan."""

import json
import math
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.plan import OPEN_SHARDS, Extents, InputFile, Plan, fingerprint, make_plan


def file(name: str, rows: int, row_bytes: int = 100) -> InputFile:
    return InputFile(f"s3://b/{name}.parquet", rows * row_bytes, "v1", rows, rows * row_bytes)


FILE = asdict(file("a", 5))


def covered(plan: Plan) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for shard in plan.shards:
        rows.setdefault(shard.uri, []).extend(range(shard.first_row, shard.first_row + shard.rows))
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_every_row_of_every_file_is_in_exactly_one_shard(seed: int) -> None:
    dice = random.Random(seed)
    files = [file(f"f{i}", dice.choice([0, 1, 5, 700, 3000])) for i in range(dice.randint(1, 6))]
    plan = make_plan(
        files,
        shard_rows=dice.choice([1, 7, 512]),
        shard_bytes=2**20,
        replicas=dice.choice([1, 8, 512]),
    )
    rows = covered(plan)
    for each in files:
        assert rows.get(each.uri, []) == list(range(each.rows))
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))


def test_shards_respect_both_caps() -> None:
    plan = make_plan([file("a", 10_000, row_bytes=50_000)], shard_rows=512, shard_bytes=2**20)
    assert max(shard.rows for shard in plan.shards) == 2**20 // 50_000
    wide = make_plan([file("a", 1_000_000)], shard_rows=512, shard_bytes=2**30)
    assert max(shard.rows for shard in wide.shards) == 512


def test_a_row_larger_than_the_byte_cap_still_gets_a_shard() -> None:
    plan = make_plan([file("a", 3, row_bytes=2**30)], shard_rows=512, shard_bytes=2**20)
    assert [shard.rows for shard in plan.shards] == [1, 1, 1]


@settings(deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 10**7)), min_size=1, max_size=8),
    size=st.integers(1, 2**27),
)
def test_shards_are_cut_by_the_sizes_of_their_files_parts(
    parts: list[tuple[int, int]], size: int
) -> None:
    """``parts`` are (rows, bytes of a row): a file whose average says nothing of its rows."""
    row_bytes = np.concatenate([np.full(rows, each) for rows, each in parts]).cumsum()
    before = np.concatenate([[0], row_bytes])
    ends = np.cumsum([0, *(rows for rows, _ in parts)])
    extents = Extents(ends.astype(np.float64), before[ends].astype(np.float64))
    total = int(ends[-1])
    one = InputFile("s3://b/a.parquet", 1, "v1", total, int(before[-1]))
    plan = make_plan([one], shard_rows=10**6, shard_bytes=size, extents={one.uri: extents})
    assert covered(plan)[one.uri] == list(range(total))
    for shard in plan.shards:
        held = before[shard.first_row + shard.rows] - before[shard.first_row]
        assert shard.rows == 1 or held <= size
    cut_alike = make_plan([file("b", 1000, row_bytes=7)], shard_rows=100, shard_bytes=21)
    extents = Extents(np.array([0.0, 1000.0]), np.array([0.0, 7000.0]))
    uri = cut_alike.files[0].uri
    again = make_plan(cut_alike.files, shard_rows=100, shard_bytes=21, extents={uri: extents})
    assert again == cut_alike


def sizes(rows: int, replicas: int) -> list[int]:
    plan = make_plan([file("a", rows)], shard_rows=512, shard_bytes=2**30, replicas=replicas)
    return [shard.rows for shard in plan.shards]


def test_shards_shrink_towards_the_end() -> None:
    found = sizes(20_000, replicas=1)
    assert found[0] == 512
    assert found[-2] <= 32
    assert found == sorted(found, reverse=True)


@settings(deadline=None)
@given(rows=st.integers(1, 50_000), replicas=st.integers(1, 600), cap=st.integers(32, 1000))
def test_beyond_what_is_taken_at_once_a_shard_is_a_quarter_of_a_replicas_share_of_the_rest(
    rows: int, replicas: int, cap: int
) -> None:
    assume(rows > replicas * OPEN_SHARDS * cap)
    plan = make_plan([file("a", rows)], shard_rows=cap, shard_bytes=2**40, replicas=replicas)
    left = rows
    for shard in plan.shards:
        assert shard.rows == min(cap, max(32, left // (4 * replicas)), left)
        left -= shard.rows
    assert left == 0


@settings(deadline=None)
@given(rows=st.integers(1, 50_000), replicas=st.integers(1, 600), cap=st.integers(32, 1000))
def test_what_all_replicas_take_at_once_is_cut_evenly_so_that_none_takes_more(
    rows: int, replicas: int, cap: int
) -> None:
    assume(rows <= replicas * OPEN_SHARDS * cap)
    plan = make_plan([file("a", rows)], shard_rows=cap, shard_bytes=2**40, replicas=replicas)
    found = [shard.rows for shard in plan.shards]
    assert sum(found) == rows
    assert len(found) == math.ceil(rows / max(32, math.ceil(rows / (replicas * OPEN_SHARDS))))
    assert max(found) - min(found) <= 1
    assert len(found) == 1 or min(found) >= 16  # crumbs cost a PUT and a footer each


def test_files_are_cut_evenly_each_by_itself() -> None:
    files = [file("a", 1000), file("b", 10), file("c", 1000)]
    plan = make_plan(files, shard_rows=512, shard_bytes=2**30, replicas=1)
    cut = [[shard.rows for shard in plan.shards if shard.uri == file.uri] for file in files]
    assert cut == [[125] * 8, [10], [125] * 8]


def test_more_replicas_get_more_shards_from_the_same_input() -> None:
    counts = [len(sizes(100_000, replicas)) for replicas in (1, 8, 64)]
    assert counts == sorted(set(counts))
    assert max(sizes(200_000, 8)) == 512
    assert max(sizes(100_000, 64)) == math.ceil(100_000 / (16 * 64))


def test_ten_million_rows_are_planned_in_a_blink_and_saved_compactly() -> None:
    plan = make_plan(
        [file(f"f{i}", 10_000) for i in range(1000)],
        shard_rows=512,
        shard_bytes=2**30,
        replicas=512,
    )
    assert plan.rows == 10_000_000
    assert len(plan.to_json()) < 2_000_000


def test_an_input_without_rows_is_one_empty_shard() -> None:
    plan = make_plan([file("a", 0), file("b", 0)], shard_rows=512, shard_bytes=2**20)
    assert [(shard.first_row, shard.rows) for shard in plan.shards] == [(0, 0)]


def test_a_saved_plan_comes_back_the_same() -> None:
    plan = make_plan([file("a", 3000), file("b", 17)], shard_rows=100, shard_bytes=2**20)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (None, "not an object"),
        ([], "not an object"),
        ({"files": []}, "files and shards"),
        ({"files": [], "shards": []}, "no shards"),
        ({"files": [FILE], "shards": 3}, "another form"),
        ({"files": [FILE], "shards": [[0, 0]]}, "not enough values"),
        ({"files": [FILE], "shards": [[1, 0, 5]]}, "another form"),
        ({"files": [{"uri": "a"}], "shards": [[0, 0, 5]]}, "another form"),
        ({"files": [FILE], "shards": [[0, 0, 2], [0, 3, 2]]}, "shard 1 does not start"),
        ({"files": [FILE], "shards": [[0, 0, 2], [0, 0, 3]]}, "shard 1 does not start"),
        ({"files": [FILE], "shards": [[0, 0, 2]]}, "2 of 5 rows"),
        ({"files": [FILE], "shards": [[0, 0, 9]]}, "9 of 5 rows"),
    ],
)
def test_what_is_no_whole_plan_is_refused_with_the_fault(document: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Plan.from_json(json.dumps(document))


def test_the_fingerprint_follows_every_file() -> None:
    files = [file("a", 100), file("b", 100)]
    assert fingerprint(files) == fingerprint(list(files))
    others = [[file("a", 101), file("b", 100)], files[:1], [file("a", 100), file("c", 100)]]
    assert len({fingerprint(each) for each in [files, *others]}) == 4


def test_what_changed_of_a_file_is_named_old_to_new() -> None:
    planned = InputFile("s3://b/a.parquet", 10, "v1", 2, 100)
    assert planned.changes(replace(planned, size=20, rows=3)) == "size 10 -> 20, rows 2 -> 3"
    assert planned.changes(replace(planned, version="v2")) == "version v1 -> v2"
    local = replace(planned, version="1795390200.25")
    assert local.changes(replace(local, version="1.0")) == (
        "version 2026-11-22T23:30:00.250000+00:00 -> 1970-01-01T00:00:01+00:00"
    )
    assert planned.changes(planned) == ""


@pytest.mark.parametrize("seed", range(20))
def test_shards_of_jsonl_are_ranges_of_bytes_that_meet_both_caps(seed: int) -> None:
    dice = random.Random(seed)
    files, offsets = [], {}
    for number in range(dice.randint(1, 4)):
        lengths = [dice.choice([10, 100, 5000]) for _ in range(dice.choice([0, 1, 2000]))]
        starts = np.array([0, *np.cumsum(lengths)], np.int64)
        uri = f"s3://b/{number}.jsonl"
        files.append(InputFile(uri, int(starts[-1]), "v1", len(lengths), int(starts[-1])))
        offsets[uri] = starts[:-1]
    plan = make_plan(files, shard_rows=50, shard_bytes=20_000, offsets=offsets)
    rows = covered(plan)
    for each in files:
        assert rows.get(each.uri, []) == list(range(each.rows))
        bounds = [*offsets[each.uri].tolist(), each.size]
        for shard in plan.shards:
            if shard.uri == each.uri and shard.rows:
                assert shard.first_byte == bounds[shard.first_row]
                assert shard.end_byte == bounds[shard.first_row + shard.rows]
                assert shard.end_byte - shard.first_byte <= 20_000
    assert all(shard.rows <= 50 for shard in plan.shards)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_line_larger_than_the_byte_cap_is_a_shard_by_itself() -> None:
    uri = "s3://b/a.jsonl"
    starts = np.array([0, 10, 10_010], np.int64)
    files = [InputFile(uri, 10_020, "v1", 3, 10_020)]
    plan = make_plan(files, shard_rows=50, shard_bytes=100, offsets={uri: starts})
    assert [(shard.first_byte, shard.end_byte) for shard in plan.shards] == [
        (0, 10),
        (10, 10_010),
        (10_010, 10_020),
    ]
