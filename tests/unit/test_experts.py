"""Routed tokens by layer and expert: from the engine's ids to the parts' footers and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commit import Destination, PartStats, commit_outcomes, read_stats
from pipeline.engine import EngineOutput, EngineRequest
from pipeline.errors import ErrorCode
from pipeline.experts import (
    ExpertLayout,
    ExpertLoad,
    ExpertSums,
    ExpertTokens,
    PackedLoad,
    experts_document,
    layout_of,
    load_of,
)
from pipeline.heat_map import heat_row
from pipeline.plan import Shard
from pipeline.records import Failure, Prepared, Status
from pipeline.replica import Replica, ReplicaLimits
from pipeline.report import Result, RunStatus, total, write_report
from pipeline.sampling import Sampling
from tests.fakes import EchoEngine
from tests.report_cases import MANIFEST

LAYOUT = ExpertLayout((1, 3), 4)
MAVERICK = ExpertLayout(tuple(range(1, 48, 2)), 128)
# by token and layer; layers 0 and 2 are dense and hold what the engine's buffer happened to hold
ROUTED = np.array(
    [[[9], [0], [7], [3]], [[9], [1], [7], [3]], [[9], [1], [7], [2]], [[9], [1], [7], [0]]],
    dtype=np.uint8,
)


def load(*rows: list[int], layout: ExpertLayout = LAYOUT) -> ExpertLoad:
    return ExpertLoad(layout, sum(rows[0]), np.array(rows, np.int64))


def counted(routed: np.ndarray, cached: int = 0, layout: ExpertLayout = LAYOUT) -> ExpertLoad:
    found = load_of(routed, cached, layout)
    assert found is not None
    return found


def test_each_token_counts_in_each_layer_that_has_experts() -> None:
    found = counted(ROUTED)
    assert found.tokens == 4
    assert found.counts.tolist() == [[1, 3, 0, 0], [1, 0, 1, 2]]


def test_tokens_of_the_prefix_cache_are_left_out() -> None:
    found = counted(ROUTED, cached=3)
    assert (found.tokens, found.counts.tolist()) == (1, [[0, 1, 0, 0], [1, 0, 0, 0]])


def test_a_token_that_goes_to_two_experts_counts_with_both() -> None:
    routed = np.array([[[0, 2]], [[1, 2]]], dtype=np.uint16)
    found = counted(routed, layout=ExpertLayout((0,), 3))
    assert (found.tokens, found.counts.tolist()) == (2, [[1, 1, 2]])


def test_without_ids_or_layout_nothing_is_counted() -> None:
    assert load_of(None, 0, LAYOUT) is None
    assert load_of(ROUTED, 0, None) is None


def test_layers_with_experts_are_those_the_models_config_names() -> None:
    named = SimpleNamespace(moe_layers=[1, 3], num_hidden_layers=4)
    assert layout_of(named, 8) == ExpertLayout((1, 3), 8)
    assert layout_of(SimpleNamespace(num_hidden_layers=2), 8) == ExpertLayout((0, 1), 8)


def test_a_load_comes_back_from_a_footer_as_it_was() -> None:
    counts = np.random.default_rng(1).integers(0, 10**12, (24, 128))
    packed = PackedLoad.of(ExpertLoad(MAVERICK, 10**13, counts))
    stats = PartStats(0, {}, 0, {}, experts=packed)
    again = PartStats.from_json(stats.to_json()).experts
    assert again == packed
    assert again is not None
    assert again.unpacked().layout == MAVERICK
    assert np.array_equal(again.unpacked().counts, counts)


def test_a_footer_of_a_shard_of_maverick_stays_small() -> None:
    counts = np.random.default_rng(1).poisson(1000, (24, 128))
    assert len(PackedLoad.of(ExpertLoad(MAVERICK, 128_000, counts)).counts) < 12_000


@pytest.mark.parametrize("damage", ["", "AAAA", "eJwDAAAAAAE=", PackedLoad.of(load([1])).counts])
def test_damaged_counts_are_named(damage: str) -> None:
    damaged = replace(PackedLoad.of(load([1, 0, 0, 0], [0, 1, 0, 0])), counts=damage)
    with pytest.raises(ValueError, match=r"counts of experts"):
        PartStats.from_json(PartStats(0, {}, 0, {}, experts=damaged).to_json())


def test_requests_add_up_until_they_are_taken() -> None:
    tokens = ExpertTokens()
    assert tokens.take() is None
    for _ in range(3):
        tokens.add(counted(ROUTED))
    tokens.add(None)
    taken = tokens.take()
    assert taken is not None
    assert taken.tokens == 12
    assert taken.unpacked().counts.tolist() == [[3, 9, 0, 0], [3, 0, 3, 6]]
    assert tokens.take() is None


def test_parts_of_another_model_are_not_mixed_in() -> None:
    sums = ExpertSums()
    assert sums.most() is None
    other = ExpertLoad(MAVERICK, 5, np.ones((24, 128), np.int64))
    for one in (load([1, 2, 3, 4], [4, 3, 2, 1]), other, load([9, 0, 0, 0], [0, 0, 0, 9])):
        sums.add(PackedLoad.of(one))
    sums.add(None)
    most = sums.most()
    assert most is not None
    assert most.counts.tolist() == [[10, 2, 3, 4], [4, 3, 2, 10]]


def test_the_report_tells_the_busiest_expert_and_rank_of_each_layer() -> None:
    arguments = {"enable_expert_parallel": True, "tensor_parallel_size": 2}
    found = experts_document(load([10, 10, 10, 10], [40, 0, 0, 0]), arguments)
    assert (found["tokens"], found["experts"], found["ranks"]) == (40, 4, 2)
    assert (found["max_over_mean"], found["rank_max_over_mean"]) == (2.5, 1.5)
    even, uneven = found["layers"]
    assert (even["layer"], even["max_over_mean"], even["unused"]) == (1, 1.0, 0)
    assert even["rank_tokens"] == [20, 20]
    assert (uneven["layer"], uneven["busiest"], uneven["unused"]) == (3, 0, 3)
    assert (uneven["max_over_mean"], uneven["rank_max_over_mean"]) == (4.0, 2.0)
    assert uneven["tokens"] == [40, 0, 0, 0]
    assert found["balanced"] is False
    assert experts_document(load([1], [1]), {"enable_eplb": True})["balanced"] is True


def test_ranks_hold_neighbours_and_the_first_ones_what_is_over() -> None:
    """As vLLM's ``determine_expert_map``: of 5 experts on 2 ranks the first holds 3."""
    arguments = {"enable_expert_parallel": True, "data_parallel_size": 2}
    layout = ExpertLayout((0,), 5)
    found = experts_document(load([1, 1, 1, 4, 4], layout=layout), arguments)
    assert found["layers"][0]["rank_tokens"] == [3, 8]


def test_a_resumed_run_reports_the_experts_of_all_its_parts(tmp_path: Path) -> None:
    to = Destination(f"file://{tmp_path}", "r", "m")
    loads = [load([1, 2, 3, 4], [4, 3, 2, 1]), None, load([0, 0, 0, 9], [9, 0, 0, 0])]
    for index, made in enumerate(loads):  # the second by a start that did not count
        shard = Shard(index, "in.parquet", index, 1)
        lost = Failure(
            index, f"id-{index}", ErrorCode.BATCH_EXPIRED, "late", 0, status=Status.EXPIRED
        )
        commit_outcomes(
            to, shard, [lost], pa.table({}), experts=None if made is None else PackedLoad.of(made)
        )
    totals = total(read_stats(to.output_uri, range(3)))
    write_report(Result(RunStatus.COMPLETE, to.output_uri, 3, totals, 1.0), MANIFEST)
    stored = json.loads((tmp_path / "report.json").read_text())["experts"]
    assert stored["tokens"] == 19
    assert [layer["tokens"] for layer in stored["layers"]] == [[1, 2, 3, 13], [13, 3, 2, 1]]


def test_a_run_whose_engine_does_not_tell_has_no_experts_in_its_report(tmp_path: Path) -> None:
    result = Result(RunStatus.COMPLETE, f"file://{tmp_path}", 0, total([]), 1.0)
    write_report(result, MANIFEST)
    assert json.loads((tmp_path / "report.json").read_text())["experts"] is None
    assert "Load of the experts" not in (tmp_path / "report.html").read_text()


class Routing(EchoEngine):
    """Sends every token to the same experts."""

    async def generate(self, request: EngineRequest) -> EngineOutput:
        return replace(await super().generate(request), experts=counted(ROUTED))


def test_a_replica_sums_what_its_engine_tells() -> None:
    replica = Replica(Routing, ReplicaLimits())
    rows = [
        Prepared(number, f"id-{number}", [1, 2], (), 0, 2, Sampling(), (1,)) for number in range(5)
    ]
    try:
        assert sum(map(len, replica.generate(0, rows))) == 5
    finally:
        replica.shutdown()
    taken = replica.expert_tokens.take()
    assert taken is not None
    assert taken.unpacked().counts.tolist() == [[5, 15, 0, 0], [5, 0, 5, 10]]


def test_a_heat_rows_cells_are_darker_the_more_they_got_and_absent_for_none() -> None:
    shades = heat_row([0, 10, 10, 40, 400, 20] + [2] * 6)
    by_cell = {
        int(cell.split(" ")[0]): shade.opacity
        for shade in shades
        for cell in shade.path.removeprefix("M").split("M")
    }
    assert 0 not in by_cell
    assert by_cell[1] == by_cell[2] < by_cell[3] <= by_cell[4] == 1
    assert 0 < by_cell[6] <= by_cell[1]
    assert heat_row([0, 0]) == []
