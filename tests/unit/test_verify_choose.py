"""Which records are replayed, and the shards that hold just their rows."""

import json
from pathlib import Path

from jobs.verify.choose import choose, read_chosen, shards_of_rows
from pipeline.plan import Shard
from pipeline.read import InputColumns, open_input, read_shard
from pipeline.run import find_run
from tests.recorded_runs import custom_id, make_run

SUCCEEDED = {0: 400, 1: 0, 2: 1_000, 3: 600}


def places(taken: dict[int, list[int]]) -> list[int]:
    """Positions among all succeeded records."""
    before = {0: 0, 1: 400, 2: 400, 3: 1_400}
    return [before[shard] + place for shard in sorted(taken) for place in taken[shard]]


def test_the_choice_is_the_runs_own_and_spread_over_all_of_it() -> None:
    taken = choose("run-1", SUCCEEDED, 20)
    assert taken == choose("run-1", dict(reversed(SUCCEEDED.items())), 20)
    assert taken != choose("run-2", SUCCEEDED, 20)
    assert [place // 100 for place in places(taken)] == list(range(20))


def test_a_run_with_fewer_records_is_taken_whole() -> None:
    assert places(choose("r", SUCCEEDED, 2_000)) == list(range(2_000))
    assert choose("r", {0: 2, 1: 0}, 100) == {0: [0, 1]}
    assert choose("r", {}, 100) == {}


def test_only_records_that_succeeded_are_read(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    chosen = read_chosen(str(out), {0: [0, 4], 2: [1]})
    assert [each.record["custom_id"] for each in chosen] == ["f0-0", "f0-3", "f1-1"]
    assert {(each.hardware, each.engine) for each in chosen} == {("2 x CPU", "e")}


def test_rows_become_shards_of_their_own_and_neighbours_share_one() -> None:
    plan = [Shard(0, "a", 0, 50), Shard(1, "a", 50, 50), Shard(2, "b", 0, 10)]
    assert shards_of_rows(plan, {2: [3], 1: [60, 61, 50, 62]}) == [
        Shard(0, "a", 50, 1),
        Shard(1, "a", 60, 3),
        Shard(2, "b", 3, 1),
    ]


def test_rows_of_jsonl_are_found_by_their_bytes(tmp_path: Path) -> None:
    out = make_run(tmp_path, jsonl=True)
    plan = find_run(str(out)).plan.shards
    path = tmp_path / "in" / "0.jsonl"
    assert not path.read_text().endswith("\n")
    found = open_input(str(tmp_path / "in"), renamed={}, carry=None)
    shards = shards_of_rows(plan, {0: [1, 2, 5], 1: [11]})
    assert [(shard.first_row, shard.rows) for shard in shards] == [(1, 2), (5, 1), (11, 1)]
    columns = InputColumns(found.columns.request, found.columns.carried)
    lines = [
        json.loads(line)["custom_id"]
        for shard in shards
        for line in read_shard(shard, columns, planned=found.files[0]).column("line").to_pylist()
    ]
    assert lines == [custom_id(0, row) for row in (1, 2, 5, 11)]


def test_blank_lines_between_rows_of_jsonl_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"custom_id": "a"}\r\n\n   \n{"custom_id": "b"}')
    (shard,) = shards_of_rows([Shard(0, f"file://{path}", 0, 2, 1, path.stat().st_size)], {0: [1]})
    with path.open("rb") as file:
        file.seek(shard.first_byte)
        assert file.read(shard.end_byte - shard.first_byte) == b'{"custom_id": "b"}'
