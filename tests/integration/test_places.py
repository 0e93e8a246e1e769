"""Places on real Ray nodes whose GPUs are only numbers: exact, given back, taken up again.

Workers are real actors with the echo engine. Not covered: more than four nodes (many_nodes.py, and
test_pool behind the same protocol, have up to 64), and engines (test_two_nodes runs one over two).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import ray
from ray._private import services
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from pipeline.actor import ReplicaSpec
from pipeline.commit import Destination
from pipeline.engine_spec import EngineSpec
from pipeline.errors import EngineError, EngineRefusalError
from pipeline.pool import Pool
from pipeline.profile import Needs
from pipeline.ray_cluster import RayCluster
from pipeline.replica import ReplicaLimits
from pipeline.roster import Phase, Pulse, Snapshot
from pipeline.roster_actor import RosterActor
from tests.fakes import EchoEngine
from tests.variables import variables

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NODE = {"num_cpus": 64, "num_gpus": 8, "resources": {"accelerator_type:H100": 1}, "memory": 2**36}
ONE_NODE = Needs(gpus_per_node=8, cpus_per_node=32, memory_gib_per_node=4, accelerator="H100")
WHOLE_NODE = Needs(gpus_per_node=8, cpus_per_node=64, memory_gib_per_node=4, accelerator="H100")
TWO_NODES = Needs(
    nodes=2, gpus_per_node=8, cpus_per_node=32, memory_gib_per_node=4, accelerator="H100"
)
PAIR = Needs(gpus_per_node=2, cpus_per_node=8, memory_gib_per_node=4, accelerator="H100")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without GPUs, and three nodes with eight each."""
    with tempfile.TemporaryDirectory(
        prefix="mv-places-",
        dir="/tmp",  # sockets: short
        ignore_cleanup_errors=True,  # a worker that just starts may still write its log
    ) as folder:
        yield from cluster_in(folder)


_PATIENCE = {"RAY_worker_register_timeout_seconds": "300"}
"""A dozen processes start at once."""


def cluster_in(folder: str) -> Iterator[Cluster]:
    """Not in Ray's own folder, which need not be there, and where others would find and join it.

    Ray reads once per process whether tokens are asked for, and servers read it from the
    environment, where a mini-cluster's may have come since.
    """
    (Path(folder) / "ray").mkdir()
    mode = "token" if is_token_auth_enabled() else "disabled"
    with variables({"RAY_AUTH_MODE": mode, "RAY_TMPDIR": folder, **_PATIENCE}):
        yield from started_in(folder)


def started_in(folder: str) -> Iterator[Cluster]:
    head = {"num_cpus": 2, "num_gpus": 0, "temp_dir": folder}
    with patient_ray():
        found = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(3):
            add_node(found)
        found.wait_for_nodes(timeout=180)
        ray.init(address=found.address, log_to_driver=False)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def add_node(cluster: Cluster) -> None:
    with patient_ray():
        cluster.add_node(wait=False, **NODE)


@contextmanager
def patient_ray() -> Iterator[None]:
    """Ray gives a node 30 s to come up, by asking for it again and again; here it has 180."""
    ask = services.get_node

    def get_node(*which: Any) -> Any:
        until_s = time.monotonic() + 180
        while True:
            try:
                return ask(*which)
            except RuntimeError:
                if time.monotonic() > until_s:
                    raise
            time.sleep(0.2)

    with mock.patch.object(services, "get_node", get_node):
        yield


def echo(_spec: EngineSpec) -> EchoEngine:
    return EchoEngine()


def fail(_spec: EngineSpec) -> EchoEngine:
    raise EngineError("no memory")


def refuse(_spec: EngineSpec) -> EchoEngine:
    raise EngineRefusalError("no such model")


def follow(_spec: EngineSpec) -> None:
    time.sleep(600)


def pool_of(
    needs: Needs,
    replicas: int,
    start: Callable[[EngineSpec], EchoEngine] = echo,
    *,
    spare_cpus: int = 1,
) -> Pool[Any, Any, Any, Any]:
    spec = ReplicaSpec(
        to=Destination("/nowhere", "run", "model"),
        engine=EngineSpec("model", None, {}, {}),
        start_engine=start,
        limits=ReplicaLimits(),
        follow_engine=follow,
    )
    names = [f"{number:032x}" for number in range(replicas)]
    cluster = RayCluster(spec, needs, RosterActor.start().handle)
    return Pool(cluster, names, depth=2, spare_cpus=spare_cpus)


def up(pool: Pool[Any, Any, Any, Any]) -> int:
    """Replicas that are."""
    return pool.room // 2


def until(pool: Pool[Any, Any, Any, Any], ready: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 400
    while time.monotonic() < until_s:
        list(pool.step(0.1))
        if ready():
            return
    raise AssertionError(f"it never came: {up(pool)} are up, {pool.lacking}")


def groups() -> dict[str, list[str]]:
    """Placement groups that hold something, and the nodes they are on."""
    return {
        name: sorted(group["bundles_to_node_id"].values())
        for name, group in placement_group_table().items()
        if group["state"] == "CREATED"
    }


def free_gpus() -> float:
    return float(ray.available_resources().get("GPU", 0))


def all_is_given_back() -> bool:
    """Ray's view of what is free lags a moment behind."""
    until_s = time.monotonic() + 90
    while time.monotonic() < until_s and free_gpus() < ray.cluster_resources()["GPU"]:
        time.sleep(0.2)
    waiting = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    return not waiting and free_gpus() == ray.cluster_resources()["GPU"]


@pytest.mark.usefixtures("nodes")
def test_a_replica_over_two_nodes_takes_both_whole_and_the_next_says_what_it_waits_for() -> None:
    with pool_of(TWO_NODES, 2) as pool:
        until(pool, lambda: up(pool) == 1)
        (places,) = groups().values()
        assert len(set(places)) == 2
        assert free_gpus() == 8
        assert pool.lacking is not None
        assert "replica 2 of 2 waits: a replica needs 2 nodes with 8 H100 GPUs" in pool.lacking
        assert "1 of 4 nodes have that free" in pool.lacking
    assert all_is_given_back()


@pytest.mark.usefixtures("nodes")
def test_small_replicas_share_a_node_without_sharing_a_gpu() -> None:
    with pool_of(PAIR, 12) as pool:
        until(pool, lambda: up(pool) == 12)
        assert free_gpus() == 0
        on_a_node = [place for (place,) in groups().values()]
        assert sorted(map(on_a_node.count, set(on_a_node))) == [4, 4, 4]
    assert all_is_given_back()


@pytest.mark.usefixtures("nodes")
def test_profiles_of_all_sizes_share_a_cluster_and_the_last_gets_what_another_gave_back() -> None:
    with pool_of(PAIR, 4) as small, pool_of(ONE_NODE, 1) as middle:
        with pool_of(TWO_NODES, 1) as large:
            until(large, lambda: up(large) == 1)
            until(small, lambda: up(small) == 4)
            until(middle, lambda: middle.lacking is not None)
            assert (up(middle), free_gpus()) == (0, 0)
            taken = [node for places in groups().values() for node in places]
            assert sorted(map(taken.count, set(taken))) == [1, 1, 4]
        until(middle, lambda: up(middle) == 1)
        assert len(groups()) == 5
    assert all_is_given_back()


@pytest.mark.usefixtures("nodes")
def test_replicas_that_ask_together_give_back_no_more_places_than_must_stay_free() -> None:
    with pool_of(WHOLE_NODE, 3, spare_cpus=3) as pool:  # the head has two
        until(pool, lambda: up(pool) == 2)
        assert pool.lacking is not None
        assert "3 CPU must stay free" in pool.lacking
    assert all_is_given_back()


def test_a_lost_node_costs_its_replica_and_a_new_one_brings_it_back(nodes: Cluster) -> None:
    with pool_of(ONE_NODE, 3) as pool:
        until(pool, lambda: up(pool) == 3)
        before = groups()
        assert pool.kill(f"{0:032x}")
        assert up(pool) == 2
        until(pool, lambda: up(pool) == 3)
        assert groups() == before  # the successor is where its predecessor was
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        until(pool, lambda: up(pool) == 2 and pool.lacking is not None)
        assert len(groups()) == 2
        add_node(nodes)
        nodes.wait_for_nodes(timeout=180)
        until(pool, lambda: up(pool) == 3)
        assert pool.lacking is None
    assert all_is_given_back()


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(
    ("start", "told"), [(fail, "5 replicas did not come up: no memory"), (refuse, "no such model")]
)
def test_engines_that_do_not_start_leave_nothing_behind(
    start: Callable[[EngineSpec], EchoEngine], told: str
) -> None:
    with pool_of(TWO_NODES, 1, start) as pool, pytest.raises(EngineError, match=told):
        until(pool, lambda: False)
    assert all_is_given_back()


@pytest.mark.usefixtures("nodes")
def test_a_roster_that_does_not_answer_is_waited_for_without_holding_the_driver() -> None:
    roster = RosterActor.start(answer_s=30.0)
    process = psutil.Process(ray.get(roster.handle.__ray_call__.remote(lambda _: os.getpid())))
    assert seen(roster).running == 0
    process.suspend()
    try:
        asked = time.monotonic()
        assert roster.look() is None
        assert time.monotonic() - asked < 20  # a run's other work goes on
        process.resume()
        assert seen(roster) == Snapshot()
        process.suspend()
        with pytest.raises(EngineError, match="has not answered for"):
            seen(roster)
        process.resume()
        roster.drain(5.0)
        beat = Pulse("a", "a1", Phase.RUNNING, {}, 0)
        assert ray.get(roster.handle.beat.remote(beat)).drain_s is not None
        process.suspend()
        asked = time.monotonic()
        while time.monotonic() < asked + 3:  # no error now: the run ends in any case
            roster.look()
    finally:
        process.resume()


def seen(roster: RosterActor) -> Snapshot:
    """What the roster answers, at once or later."""
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s:
        if (found := roster.look()) is not None:
            return found
    raise AssertionError("the roster never answered")
