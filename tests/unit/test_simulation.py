"""The cluster's model: nothing is lost, nothing is faster than it can be, and losses cost."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.simulation.cluster import (
    Churn,
    ClusterSpec,
    SimulatedRun,
    StoreModel,
    adjusted_bound,
    simulate,
)
from cluster.simulation.driver import measure
from cluster.simulation.engine import EngineModel, SimulatedEngine
from cluster.simulation.memory import DriverMemory, measure_memory
from cluster.simulation.paced import PacedEngine
from cluster.simulation.page import page
from cluster.simulation.policies import FIFO, PIPELINE, Policy
from cluster.simulation.scenarios import study
from cluster.simulation.validation import DriverCost, Validation
from cluster.simulation.workload import Workload, log_normal, long_tail
from pipeline.admission import EngineLoad
from pipeline.cpu import Meter
from pipeline.engine import EngineRequest
from pipeline.sampling import Sampling

ENGINE = EngineModel(
    name="small",
    max_num_seqs=8,
    max_num_batched_tokens=1000,
    kv_tokens=100_000,
    curve=((1, 1.0), (8, 2.0)),
    prefill_s=0.001,
)
TIGHT = replace(ENGINE, kv_tokens=6_000)
EVEN_STORE = StoreModel(median_s=0.01, sigma=0.0, slow_share=0.0)


def finish_times(model: EngineModel, *requests: tuple[int, int]) -> dict[int, float]:
    """When each of (prompt, completion) ends, all submitted at 0."""
    engine, now = SimulatedEngine(model), 0.0
    ends: dict[int, float] = {}
    for number, request in enumerate(requests):
        engine.submit(number, *request)
    while (end := engine.begin(now)) is not None:
        assert engine.kv_used <= model.kv_tokens
        now = end
        ends |= dict.fromkeys(engine.end(), now)
    return ends


def test_a_request_alone_takes_its_prompt_and_a_step_per_token() -> None:
    assert finish_times(ENGINE, (500, 10)) == {0: pytest.approx(0.5 + 10 * 1.0)}


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    assert finish_times(ENGINE, (2500, 1)) == {0: pytest.approx(2.5 + 3 * 1.0)}


def test_a_batch_shares_its_steps_and_the_rest_speeds_up_when_one_is_done() -> None:
    step = ENGINE.step_s
    ends = finish_times(ENGINE, (0, 4), (0, 10))
    assert ends == {0: pytest.approx(4 * step[2]), 1: pytest.approx(4 * step[2] + 6 * step[1])}


def test_who_finds_no_place_waits_for_the_first_that_ends() -> None:
    ends = finish_times(ENGINE, *[(0, 5)] * 8, (0, 1))
    assert ends[8] == pytest.approx(5 * 2.0 + 1.0)


def test_an_arrival_joins_at_the_end_of_the_step_on_its_way() -> None:
    engine = SimulatedEngine(ENGINE)
    engine.submit(0, 0, 10)
    first = engine.begin(0.0)
    assert first == pytest.approx(10.0)
    engine.submit(1, 0, 10)
    assert engine.cut(3.5) == pytest.approx(4.0)
    assert engine.end() == []
    assert engine.begin(4.0) == pytest.approx(4.0 + 6 * ENGINE.step_s[2])
    assert engine.running == 2


def test_a_full_cache_preempts_the_last_and_all_end_once() -> None:
    engine, now = SimulatedEngine(replace(ENGINE, kv_tokens=250)), 0.0
    for number in range(4):
        engine.submit(number, 50, 100)
    ends: list[int] = []
    preempted = 0
    while (end := engine.begin(now)) is not None:
        preempted += engine.preempted_now
        now = end
        ends += engine.end()
        assert engine.kv_used <= 250
    assert preempted > 0
    assert sorted(ends) == [0, 1, 2, 3]
    assert ends[0] == 0


def test_no_request_is_admitted_that_could_never_run() -> None:
    with pytest.raises(AssertionError):
        SimulatedEngine(TIGHT).submit(0, 6_000, 1)


WORKLOADS: list[Callable[[int, int], Workload]] = [log_normal, long_tail]


@pytest.mark.parametrize("policy", [PIPELINE, FIFO], ids=["pipeline", "fifo"])
@pytest.mark.parametrize("engine", [ENGINE, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_every_row_is_committed_once_and_no_bound_is_beaten(
    policy: Policy, engine: EngineModel, workload: Callable[[int, int], Workload], replicas: int
) -> None:
    for churn in (None, Churn(every_s=4000.0, boot_s=100.0)):
        spec = ClusterSpec(replicas, engine, churn=churn, seed=replicas)
        run = simulate(spec, workload(700, replicas), policy)
        assert set(run.times_done) == {1}
        assert run.efficiency <= 1
        assert run.over_bound >= 1
        assert 0 <= run.first_admission < run.last_completion < run.makespan


def test_a_loss_while_shards_are_opened_or_committed_commits_none_twice() -> None:
    slow_store = StoreModel(median_s=200.0)
    churn = Churn(every_s=3000.0, boot_s=100.0)
    spec = ClusterSpec(2, ENGINE, store=slow_store, churn=churn)
    run = simulate(spec, log_normal(700, 1), replace(PIPELINE, open_shards=2))
    assert run.losses
    assert set(run.times_done) == {1}


def test_the_engines_did_exactly_the_rows_tokens() -> None:
    workload = replace(log_normal(600, 1), prompt=np.zeros(600, np.int64))
    flat = replace(ENGINE, curve=((1, 1.0), (8, 1.0)), kv_tokens=10**9)
    run = simulate(ClusterSpec(2, flat), workload, PIPELINE)
    assert sum(run.running.values()) == pytest.approx(int(workload.completion.sum()))


def test_a_long_queue_keeps_an_engine_as_busy_as_it_can_be() -> None:
    rows = np.full(4_000, 10)
    workload = Workload("even", prompt=rows, completion=rows, limit=rows)
    run = simulate(ClusterSpec(1, ENGINE, store=EVEN_STORE), workload, PIPELINE)
    assert run.efficiency > 0.99


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> SimulatedRun:
        spec = ClusterSpec(2, ENGINE, churn=Churn(every_s=3000.0, boot_s=50.0), seed=seed)
        return simulate(spec, log_normal(500, 1), PIPELINE)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_what_a_lost_replica_had_not_journaled_is_made_again() -> None:
    workload = log_normal(1_500, 1)
    spec = ClusterSpec(2, ENGINE, churn=Churn(every_s=1000.0, boot_s=30.0))
    calm = simulate(replace(spec, churn=None), workload, PIPELINE)
    often = simulate(spec, workload, PIPELINE)
    never_journaled = simulate(replace(spec, journal_s=1e9), workload, PIPELINE)
    assert not calm.losses
    assert often.losses
    assert calm.redone_tokens == 0
    assert 0 < often.redone_tokens < never_journaled.redone_tokens
    assert calm.makespan < often.makespan < never_journaled.makespan


def test_the_bound_counts_the_time_that_replicas_are_away() -> None:
    assert adjusted_bound(100.0, 2, []) == 50.0
    assert adjusted_bound(100.0, 2, [(10.0, 30.0)]) == 60.0
    assert adjusted_bound(100.0, 1, [(50.0, 80.0)]) == 130.0
    assert adjusted_bound(100.0, 2, [(70.0, 90.0)]) == 50.0


def test_a_replica_that_is_ready_later_starts_later() -> None:
    workload = log_normal(300, 1)
    at_once = simulate(ClusterSpec(1, ENGINE), workload, PIPELINE)
    late = simulate(ClusterSpec(1, ENGINE, ready_s=(100.0,)), workload, PIPELINE)
    assert at_once.first_admission < 100.0 <= late.first_admission


def test_the_paced_engine_answers_all_and_tells_of_each(tmp_path: Path) -> None:
    fast = replace(ENGINE, curve=((1, 0.001), (8, 0.001)), prefill_s=0.0)
    loads: list[EngineLoad] = []

    async def ask(count: int) -> list[int]:
        engine = PacedEngine(fast, tmp_path / "log")
        engine.listen(loads.append, Meter())
        answers = await asyncio.gather(
            *(
                engine.generate(
                    EngineRequest(str(n), [1, 2], (), Sampling(max_completion_tokens=n + 1), n)
                )
                for n in range(count)
            )
        )
        engine.shutdown()
        return [answer.completion_tokens for answer in answers]

    assert asyncio.run(ask(20)) == list(range(1, 21))
    assert sum(load.finished for load in loads) == 20
    assert max(load.running + load.finished for load in loads) == 8
    events = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert events[:2] == ["ready", "first"]
    assert set(events[2:]) == {"done"}


def test_the_page_has_every_run_and_its_pictures(tmp_path: Path) -> None:
    from cluster.simulation.plots import draw

    told: list[str] = []
    found = study(1, quick=True, say=told.append)
    pictures = draw(found, tmp_path)
    text = page(
        found,
        measure(20_000, 8),
        DriverMemory(100_000, 200, 230),
        [Validation(1, 600, 19, 64.0, 80.0)],
        DriverCost((50, 400), 0.005, 0.016),
        command="the command",
        pictures=pictures,
    )
    assert "| 1 | 600 | 19 | 64.0 s | 80.0 s | **1.250** | missed |" in text
    for size, ours, _ in found.scale:
        assert f"| {size.replicas} | {ours.rows:,} | {ours.shards:,} |" in text
    for picture in pictures:
        assert f"]({picture})" in text
        assert (tmp_path / picture).read_text().startswith("<?xml")
    for ours, fifo in found.lengths:
        assert f"| **{ours.efficiency:.3f}** | {fifo.efficiency:.3f} |" in text
    for ours, fifo in found.late:
        assert f"| **{ours.over_bound:.3f}** | {fifo.over_bound:.3f} |" in text
    pairs = len(found.scale) + len(found.lengths) + len(found.late)
    assert len(told) == 2 * pairs + len(found.tail) + 2 * 4 + 1


def test_the_memory_of_a_driver_grows_by_a_few_hundred_bytes_a_shard() -> None:
    found = measure_memory(100_000)
    assert found.shards == 100_000
    assert found.peak_mib - found.imports_mib < 100  # at a million: below 1 GB


def test_the_driver_is_measured_on_a_part_for_each_shard() -> None:
    times = measure(3_000, 2)
    assert times.shards == len(PIPELINE.cut(3_000, 2))
    assert times.footer_requests == times.shards
    assert times.listings == 1
