"""All-reduce: real processes with gloo on this machine, and what is made of their reports.

Not covered: NCCL, and a network between machines.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.preflight.all_reduce import (
    Group,
    Measured,
    bus_gb_s,
    judge_all_reduce,
    make_groups,
    measure,
)
from cluster.preflight.crew import Unanswered
from cluster.preflight.findings import Fault
from cluster.preflight.ranks import Pace, Part, RankReport, Stage, Timing, free_port, run_part
from pipeline.profile import load_profile
from tests.preflight_cases import HereCrew, cpu_node, gpu_node

MINI = load_profile("mini-maverick-tp1")
TWO_NODES = MINI.model_copy(update={"needs": MINI.needs.model_copy(update={"nodes": 2})})
H100 = load_profile("maverick-fp8-8xh100")
PAIR = Group((cpu_node("a"), cpu_node("b")), per_node=1, backend="gloo")
QUICK = Pace(warmups=0, repeats=2)
PEER = """\
import json, sys, time
from datetime import timedelta
from torch import distributed
task = json.loads(sys.argv[1])
limit = timedelta(seconds=60)
store = distributed.TCPStore("127.0.0.1", task["port"], 2, is_master=False, timeout=limit)
distributed.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=limit)
time.sleep(600)
"""


def done(rank: int, seconds: float = 0.01, *, right: bool = True) -> RankReport:
    return RankReport(rank, Stage.DONE, (Timing(2**24, seconds, right),))


def pair(name: str, seconds: float) -> Measured:
    group = Group((gpu_node(f"{name}1"), gpu_node(f"{name}2")), per_node=1, backend="nccl")
    return Measured(group, (done(0, seconds), done(1, seconds / 2)))


def fault_of(*reports: RankReport) -> Fault:
    (fault,) = judge_all_reduce([Measured(PAIR, reports)], None)
    assert fault.nodes == ("a", "b")
    return fault


def part(rank: int, port: int, pace: Pace) -> Part:
    return Part((rank,), 2, "gloo", "127.0.0.1", port, {}, pace)


def test_two_nodes_sum_right_and_their_bandwidth_is_measured() -> None:
    crew = HereCrew(PAIR.nodes)
    found = measure(crew, make_groups(TWO_NODES, PAIR.nodes), {}, QUICK)
    assert judge_all_reduce(found, None) == []
    (one,) = found
    assert [each.size for each in one.bandwidths] == [2**16, 2**20, 2**24]
    assert all(each.seconds > 0 for each in one.bandwidths)
    assert one.best_gb_s is not None
    assert one.best_gb_s == pytest.approx(2**24 / one.bandwidths[-1].seconds / 1e9)


def test_a_peer_that_joins_and_then_hangs_is_named() -> None:
    port = free_port()
    pace = Pace(reduce_s=15, warmups=0, repeats=1)
    peer = subprocess.Popen([sys.executable, "-c", PEER, json.dumps({"port": port})])
    try:
        reports = run_part(part(0, port, pace))
    finally:
        peer.kill()
        peer.wait()
    assert [report.stage for report in reports] == [Stage.REDUCING]
    message = fault_of(*reports, RankReport(1, Stage.JOINED)).message
    assert "does not end: node b joined and then took no part" in message
    assert "timed out" in message.lower()


def test_processes_that_hang_are_ended_in_time() -> None:
    pace = Pace(start_s=0.5, join_s=0, reduce_s=0)
    with ThreadPoolExecutor(1) as pool:
        (report,) = pool.submit(run_part, part(0, free_port(), pace)).result(timeout=30)
    assert report == RankReport(0, report.stage), "it was ended, and did not end with an error"
    assert report.stage < Stage.JOINED


def test_a_node_that_does_not_answer_is_named() -> None:
    crew = HereCrew(
        PAIR.nodes,
        {("a", "run_part"): (done(0),), ("b", "run_part"): Unanswered("no answer within 5 s")},
    )
    (fault,) = judge_all_reduce(measure(crew, [PAIR], {}, QUICK), None)
    assert "was not measured (b: no answer within 5 s)" in fault.message


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((Stage.DONE, Stage.SILENT), "node b could not start a process"),
        ((Stage.STARTING, Stage.JOINING), "node a did not get beyond importing torch"),
        ((Stage.JOINING, Stage.JOINING), "nodes a, b waited in vain to join.*GLOO_SOCKET_IFNAME"),
        ((Stage.REDUCING, Stage.REDUCING), "nodes a, b waited in vain for the sum"),
    ],
)
def test_who_is_furthest_behind_is_told(stages: tuple[Stage, Stage], words: str) -> None:
    reports = [RankReport(rank, stage, error="why") for rank, stage in enumerate(stages)]
    assert re.search(words, fault_of(*reports).message)


def test_a_wrong_sum_is_a_fault_of_its_node() -> None:
    assert "gives a wrong sum on node b" in fault_of(done(0), done(1, right=False)).message


def test_the_slowest_rank_counts_and_bandwidth_is_that_of_nccl_tests() -> None:
    (found,) = Measured(PAIR, (done(0, 0.01), done(1, 0.02))).bandwidths
    assert found.seconds == 0.02
    assert found.bus_gb_s == pytest.approx(2**24 / 0.02 * 2 * 1 / 2 / 1e9)
    assert bus_gb_s(10**9, 1.0, 8) == pytest.approx(1.75)


def test_gpus_that_reduce_over_sockets_are_a_fault() -> None:
    slow, fast = pair("a", 2**24 / 3e9), pair("b", 2**24 / 40e9)
    (fault,) = judge_all_reduce([slow, fast], "H100")
    assert fault.nodes == ("a1", "a2")
    assert "has 3.0 GB/s, less than 10 GB/s; NCCL does not use RDMA" in fault.message
    assert judge_all_reduce([slow], None) == [], "no least is known of other GPUs"


def test_gpus_of_one_node_without_nvlink_are_a_fault() -> None:
    group = Group((gpu_node("a"),), per_node=8, backend="nccl")
    reports = tuple(done(rank, 2**24 / 20e9) for rank in range(8))
    (fault,) = judge_all_reduce([Measured(group, reports)], "H100")
    assert "NCCL does not use NVLink" in fault.message


def test_a_group_far_below_the_others_is_a_fault() -> None:
    found = [pair(name, 2**24 / 40e9) for name in "abc"] + [pair("d", 2**24 / 15e9)]
    (fault,) = judge_all_reduce(found, "H100")
    assert fault.nodes == ("d1", "d2")
    assert "the median of all groups is 40.00 GB/s" in fault.message


def test_gpus_that_a_job_holds_are_told_and_not_measured() -> None:
    node = gpu_node("a", held_gpus=8)
    crew = HereCrew([node])
    found = measure(crew, make_groups(H100, [node]), {}, QUICK)
    (fault,) = judge_all_reduce(found, "H100")
    assert "was not measured (a: 8 of its 8 GPUs are held)" in fault.message
    assert crew.asked == []


def test_every_node_is_in_a_group() -> None:
    nodes = [cpu_node(name) for name in "cab"]
    groups = make_groups(TWO_NODES, nodes)
    assert [group.names for group in groups] == [("a", "b"), ("b", "c")]
    assert make_groups(TWO_NODES, nodes[:1]) == []
    assert make_groups(MINI, nodes) == [], "one process alone has nobody to reduce with"


def test_groups_that_share_a_node_take_turns() -> None:
    nodes = [cpu_node(name) for name in "abc"]

    def reduce(asked: Part) -> tuple[RankReport, ...]:
        return tuple(done(rank) for rank in asked.ranks)

    crew = HereCrew(nodes, {(name, "run_part"): reduce for name in "abc"})
    found = measure(crew, make_groups(TWO_NODES, nodes), {}, QUICK)
    assert [one.group.names for one in found] == [("a", "b"), ("b", "c")]
    assert all(one.whole for one in found)
    assert crew.asked.count(("b", "run_part")) == 2


def test_a_group_has_a_process_for_each_worker() -> None:
    (group,) = make_groups(H100, [gpu_node("a")])
    assert (group.world, group.backend) == (8, "nccl")
    (mini,) = make_groups(load_profile("mini-maverick"), [cpu_node("a")])
    assert (mini.world, mini.backend) == (2, "gloo")
