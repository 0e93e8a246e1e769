"""The pool: places that are exact, workers that come and go, shards that are done once."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from pipeline.budget import Budget
from pipeline.errors import (
    AccountingError,
    EngineError,
    EngineRefusalError,
    StorageUnavailableError,
)
from pipeline.pool import Done, Pool, Suspected
from pipeline.profile import Needs
from tests.unit.fake_cluster import FakeCluster, FakePlace, FakeWorker, Node, SlowCluster

ONE_NODE = Needs(nodes=1, gpus_per_node=8, cpus_per_node=32, memory_gib_per_node=256)
TWO_NODES = Needs(nodes=2, gpus_per_node=8, cpus_per_node=32, memory_gib_per_node=256)
PAIR_OF_GPUS = Needs(nodes=1, gpus_per_node=2, cpus_per_node=8, memory_gib_per_node=64)
ONE_CPU = Needs(nodes=1, cpus_per_node=1, memory_gib_per_node=1)

FakePool = Pool[FakePlace, FakeWorker, str, str | None]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pool_of(
    cluster: FakeCluster,
    replicas: int,
    *,
    depth: int = 2,
    clock: Clock | None = None,
    spare_cpus: float = 1,
) -> FakePool:
    names = [f"replica-{number}" for number in range(1, replicas + 1)]
    return Pool(cluster, names, depth=depth, spare_cpus=spare_cpus, clock=clock or Clock())


def all_up(cluster: FakeCluster, pool: FakePool) -> None:
    list(pool.step(0))
    for worker in cluster.working:
        if not worker.up:
            cluster.come_up(worker)
    list(pool.step(0))


def finish_all(cluster: FakeCluster, pool: FakePool) -> Iterator[str]:
    """Until the pool is idle."""
    for _ in range(10_000):
        if pool.idle:
            return
        for worker in cluster.working:
            if not worker.up:
                cluster.come_up(worker)
            for ticket in list(worker.work):
                cluster.finish(worker, ticket)
        yield from filter(None, pool.step(0))
    raise AssertionError("shards are left that nobody takes up")


@pytest.mark.parametrize(
    ("needs", "nodes", "replicas", "held"),
    [
        (ONE_NODE, 1, 1, 1),
        (ONE_NODE, 64, 64, 64),
        (ONE_NODE, 3, 5, 3),
        (TWO_NODES, 64, 32, 32),
        (TWO_NODES, 5, 4, 2),  # of the fifth node, half a replica is not taken
        (PAIR_OF_GPUS, 1, 4, 4),  # side by side on one node
        (PAIR_OF_GPUS, 16, 64, 64),
    ],
)
def test_replicas_take_as_many_places_as_there_are(
    needs: Needs, nodes: int, replicas: int, held: int
) -> None:
    cluster = FakeCluster(nodes, needs)
    with pool_of(cluster, replicas) as pool:
        all_up(cluster, pool)
        assert len(cluster.held) == len(cluster.working) == held
        assert all(len(set(place.nodes)) == needs.nodes for place in cluster.held)
    assert cluster.places == []
    assert cluster.working == []


def test_a_replica_that_is_up_works_while_another_loads() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        list(pool.step(0))
        first, second = cluster.working
        cluster.come_up(first)
        for shard in "abc":
            pool.offer(shard)
        list(pool.step(0))
        assert (list(first.work.values()), second.work) == (["a", "b"], {})
        assert pool.waiting == 1


def test_a_shard_goes_to_the_replica_with_the_fewest() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        for shard in "abc":
            pool.offer(shard)
        list(pool.step(0))
        first, second = cluster.working
        assert list(first.work.values()) == ["a", "c"]
        assert list(second.work.values()) == ["b"]
        assert (pool.room, pool.waiting) == (1, 0)


def test_a_dead_workers_shards_go_first_to_the_next_that_is_free() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        for shard in "abcdef":
            pool.offer(shard)
        list(pool.step(0))
        first, second = cluster.working
        cluster.end(first)
        list(pool.step(0))
        for ticket in list(second.work):
            cluster.finish(second, ticket)
        assert list(pool.step(0)) == ["b", "d"]
        assert list(second.work.values()) == ["a", "c"]
        assert sorted(finish_all(cluster, pool)) == ["a", "c", "e", "f"]


def test_a_successor_starts_in_the_same_place() -> None:
    cluster = FakeCluster(3, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        first = cluster.working[0]
        cluster.end(first)
        list(pool.step(0))
        list(pool.step(0))
        assert cluster.started_in[-1] is first.place
        assert (len(cluster.held), len(cluster.working)) == (2, 2)
        assert cluster.working[-1].name == first.name


@pytest.mark.parametrize("needs", [ONE_NODE, TWO_NODES])
def test_a_lost_node_gives_its_place_back_and_another_is_taken_when_there_is_one(
    needs: Needs,
) -> None:
    cluster = FakeCluster(2 * needs.nodes, needs)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        lost = cluster.working[0]
        for shard in "abcd":
            pool.offer(shard)
        list(pool.step(0))
        cluster.lose_node(lost.place.nodes[-1])
        list(pool.step(0))
        assert lost.place.released
        assert (len(cluster.held), len(cluster.working)) == (1, 1)
        assert pool.lacking is not None
        assert "replica 1 of 2 waits: a replica needs" in pool.lacking
        assert "8 GPUs, 32 CPUs" in pool.lacking
        cluster.add_node()
        list(pool.step(0))
        assert (len(cluster.held), len(cluster.working)) == (2, 2)
        assert pool.lacking is None
        assert sorted(finish_all(cluster, pool)) == ["a", "b", "c", "d"]


def test_a_node_that_never_comes_back_keeps_no_shard() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        for shard in "abcdefgh":
            pool.offer(shard)
        list(pool.step(0))
        cluster.lose_node(cluster.working[0].place.nodes[0])
        assert sorted(finish_all(cluster, pool)) == list("abcdefgh")


def test_a_replica_on_a_node_that_goes_ends_its_rows_there_and_comes_back_elsewhere() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        (leaving,) = cluster.working
        pool.offer("a")
        list(pool.step(0))
        cluster.going.update(leaving.place.nodes)
        pool.offer("b")
        list(pool.step(0))
        assert (list(leaving.work.values()), pool.waiting, pool.room) == (["a"], 1, 0)
        cluster.end(leaving)
        list(pool.step(0))
        list(pool.step(0))
        assert leaving.place.released
        (successor,) = cluster.working
        assert not cluster.going & set(successor.place.nodes)
        assert sorted(finish_all(cluster, pool)) == ["a", "b"]


def test_replicas_come_as_the_cluster_grows() -> None:
    cluster = FakeCluster(0, ONE_NODE)
    with pool_of(cluster, 3) as pool:
        pool.offer("a")
        list(pool.step(0))
        assert pool.lacking == "replica 1, 2, 3 of 3 waits: the cluster has no live node"
        for number in range(1, 5):
            cluster.add_node()
            list(pool.step(0))
            assert len(cluster.working) == min(number, 3)
        assert list(finish_all(cluster, pool)) == ["a"]


def test_a_killed_replica_is_replaced_and_late_words_of_it_are_not_heard() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        pool.offer("a")
        list(pool.step(0))
        (hung,) = cluster.working
        assert pool.kill("replica-1")
        cluster.finish(hung, 1)
        assert list(pool.step(0)) == []
        assert cluster.working[0] is not hung
        assert list(finish_all(cluster, pool)) == ["a"]
        assert not pool.kill("no such name")


def test_a_replica_that_is_still_starting_is_not_killed_for_its_predecessors_silence() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        assert pool.kill("replica-1")
        list(pool.step(0))
        assert not pool.kill("replica-1")
        assert len(cluster.working) == 1


def test_an_engine_that_refuses_to_start_ends_the_run_at_once() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        list(pool.step(0))
        cluster.end(cluster.working[0], EngineRefusalError("no such model"))
        with pytest.raises(EngineRefusalError, match="no such model"):
            list(pool.step(0))
    assert cluster.places == []


def test_workers_end_in_order_but_at_once_if_the_run_was_cut_short() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1):
        pass
    assert cluster.closed_within_s == 10
    with pool_of(cluster, 1) as pool:
        pool.draining = True
    assert cluster.closed_within_s == 3
    with pool_of(cluster, 1) as pool:
        pool.draining, pool.budget = True, Budget.of(1)
    assert 0 < cluster.closed_within_s <= 1
    with pytest.raises(KeyboardInterrupt), pool_of(cluster, 1):
        raise KeyboardInterrupt
    assert cluster.closed_within_s == 0


def test_workers_that_never_come_up_end_the_run_with_the_last_reason() -> None:
    cluster = FakeCluster(1, ONE_NODE)

    def fail_on() -> None:
        while True:
            list(pool.step(0))
            for worker in cluster.working:
                cluster.end(worker, EngineError("CUDA out of memory"))

    with (
        pool_of(cluster, 1) as pool,
        pytest.raises(EngineError, match=r"5 replicas did not come up: CUDA out of memory"),
    ):
        fail_on()
    assert (cluster.places, cluster.working) == ([], [])


def test_no_place_takes_the_cpu_that_prepares_rows_until_all_are_read() -> None:
    cluster = FakeCluster(3, ONE_CPU, Node(gpus=0, cpus=1))
    clock = Clock()
    with pool_of(cluster, 2, clock=clock) as pool:
        all_up(cluster, pool)
        cluster.lose_node(cluster.working[0].place.nodes[0])
        list(pool.step(0))
        clock.now += 11
        list(pool.step(0))
        assert (len(cluster.held), len(cluster.working)) == (1, 1)
        assert pool.lacking == "replica 1 of 2 waits: 1 CPU must stay free to prepare rows with"
        for shard in "abc":  # one more than a replica takes
            pool.offer(shard)
        pool.all_read = True
        list(pool.step(0))
        list(pool.step(0))
        assert len(cluster.working) == 2


def test_when_the_node_that_prepared_rows_is_lost_a_replica_makes_room() -> None:
    cluster = FakeCluster(3, ONE_CPU, Node(gpus=0, cpus=1))
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        (spare,) = set(cluster.nodes) - {worker.place.nodes[0] for worker in cluster.working}
        pool.offer("a")
        list(pool.step(0))
        cluster.lose_node(spare)
        list(pool.step(0))
        assert [list(worker.work.values()) for worker in cluster.working] == [["a"]]
        pool.all_read = True
        assert list(finish_all(cluster, pool)) == ["a"]


def test_runs_beside_each_other_leave_a_cpu_to_prepare_rows() -> None:
    cluster = FakeCluster(3, ONE_CPU, Node(gpus=0, cpus=1))
    beside = FakeCluster(0, ONE_CPU, beside=cluster)
    with pool_of(cluster, 2) as first, pool_of(beside, 2) as second:
        all_up(cluster, first)
        all_up(beside, second)
        assert (len(cluster.working), len(beside.working)) == (2, 0)
        assert second.lacking is not None
        assert "1 CPU must stay free" in second.lacking


def slow_cluster(
    nodes: int, replicas: int, *, spare_cpus: float = 1
) -> tuple[SlowCluster, FakePool, Clock]:
    """Nodes of one CPU each, and a pool that is to leave ``spare_cpus`` of them free."""
    clock = Clock()
    cluster = SlowCluster(nodes, ONE_CPU, Node(gpus=0, cpus=1), clock)
    pool = pool_of(cluster, replicas, clock=clock, spare_cpus=spare_cpus)
    return cluster, pool, clock


def step_for(seconds: float, pool: FakePool, clock: Clock) -> None:
    for _ in range(round(10 * seconds)):
        clock.now += 0.1
        list(pool.step(0))


def test_replicas_that_ask_together_keep_all_places_but_the_one_that_must_stay_free() -> None:
    cluster, pool, clock = slow_cluster(8, 8)
    step_for(10, pool, clock)
    assert len(cluster.working) == 7


def test_of_replicas_that_gave_their_places_back_one_at_a_time_asks_again() -> None:
    cluster, pool, clock = slow_cluster(8, 8, spare_cpus=5)
    step_for(2, pool, clock)
    most_at_once = 0
    for _ in range(600):
        step_for(0.1, pool, clock)
        most_at_once = max(most_at_once, len(cluster.waiting))
    assert (len(cluster.working), most_at_once) == (3, 1)


def test_a_place_on_a_node_that_has_just_come_is_not_taken_for_lost() -> None:
    cluster, pool, clock = slow_cluster(1, 2)
    pool.all_read = True
    step_for(0.3, pool, clock)  # the list of nodes is read, the table of places not yet
    pool.offer("a")
    step_for(0.4, pool, clock)
    cluster.add_node(Node(gpus=0, cpus=1))
    step_for(1, pool, clock)
    assert (len(cluster.working), len(cluster.workers)) == (2, 2)


def test_the_table_of_places_is_read_once_however_many_replicas_ask() -> None:
    cluster, pool, clock = slow_cluster(200, 100)
    clock.now += 1
    list(pool.step(0))
    assert cluster.reads == 1


def test_a_pool_that_drains_starts_no_worker_and_gives_no_shard_out() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        for shard in "ab":
            pool.offer(shard)
        list(pool.step(0))
        first, second = cluster.working
        pool.draining = True
        cluster.end(first)
        list(pool.step(0))
        list(pool.step(0))
        assert cluster.working == [second]
        assert list(second.work.values()) == ["b"]


def test_a_bad_node_costs_its_replica_only() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        list(pool.step(0))
        good, bad = cluster.working
        cluster.come_up(good)
        bad_node = bad.place
        for number in range(40):
            pool.offer(str(number))
            list(pool.step(0))
            for worker in cluster.working:
                if worker is not good:
                    cluster.end(worker, EngineRefusalError("no weights here"))
            for ticket in list(good.work):
                cluster.finish(good, ticket)
            list(pool.step(0))
        assert good in cluster.working
        assert bad_node.released  # after two starts that failed, another place is asked for


def test_a_replica_that_stops_by_itself_is_replaced_and_its_shards_are_done() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        pool.offer("a")
        list(pool.step(0))
        (worker,) = cluster.working
        cluster.events.append(Done(worker, 1, None))
        assert list(pool.step(0)) == []
        assert worker.gone
        assert list(finish_all(cluster, pool)) == ["a"]


def test_a_replica_that_loses_the_store_is_replaced_and_costs_the_others_nothing() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        for shard in "abcd":
            pool.offer(shard)
        list(pool.step(0))
        first, second = cluster.working
        for ticket in list(first.work):
            cluster.fail(first, ticket, StorageUnavailableError("503 for two minutes"))
        list(pool.step(0))
        assert (first.gone, second.gone) == (True, False)
        assert sorted(finish_all(cluster, pool)) == ["a", "b", "c", "d"]


def test_several_replicas_in_a_row_without_the_store_fail_the_run_and_the_rest_can_be_drained() -> (
    None
):
    cluster = FakeCluster(4, ONE_NODE)
    with pool_of(cluster, 4) as pool:
        all_up(cluster, pool)
        for shard in "abcdefgh":
            pool.offer(shard)
        list(pool.step(0))
        *lost, last = cluster.working
        for worker in lost:
            for ticket in list(worker.work):
                cluster.fail(worker, ticket, StorageUnavailableError("503 for two minutes"))
        with pytest.raises(StorageUnavailableError, match="503"):
            list(pool.step(0))
        pool.draining = True
        assert not last.gone
        for ticket in list(last.work):
            cluster.finish(last, ticket)
        assert list(pool.step(0)) == ["d", "h"]
        assert not pool.working


def test_replicas_that_lose_the_store_now_and_then_do_not_fail_the_run() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        for shard in "abcdef":
            pool.offer(shard)
        done = []
        for _ in range(5):
            all_up(cluster, pool)
            (worker,) = cluster.working
            first, second = worker.work
            cluster.finish(worker, first)
            cluster.fail(worker, second, StorageUnavailableError("503"))
            done += list(pool.step(0))
            pool.note_progress()
        assert len(done) == 5


def test_a_shard_that_no_replica_can_do_ends_the_run_and_no_result_beside_it_is_lost() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        for shard in "ab":
            pool.offer(shard)
        list(pool.step(0))
        (worker,) = cluster.working
        first, second = worker.work
        cluster.fail(worker, first, AccountingError("a sample has two records"))
        cluster.finish(worker, second)
        step = pool.step(0)
        assert next(step) == "b"
        with pytest.raises(AccountingError, match="two records"):
            next(step)


def test_a_replica_that_stops_by_itself_ends_once_its_other_shards_have_come_back() -> None:
    cluster, clock = FakeCluster(1, ONE_NODE), Clock()
    with pool_of(cluster, 1, clock=clock) as pool:
        all_up(cluster, pool)
        for shard in "abc":
            pool.offer(shard)
        list(pool.step(0))
        (worker,) = cluster.working
        first, second = worker.work
        cluster.events.append(Done(worker, first, None))
        list(pool.step(0))
        assert (worker.gone, list(worker.work)) == (False, [first, second])  # nothing more
        cluster.events.append(Done(worker, second, None))
        list(pool.step(0))
        assert worker.gone
        assert list(finish_all(cluster, pool)) == ["a", "b", "c"]


def test_a_replica_that_stops_by_itself_does_not_wait_for_a_shard_for_ever() -> None:
    cluster, clock = FakeCluster(1, ONE_NODE), Clock()
    with pool_of(cluster, 1, clock=clock) as pool:
        all_up(cluster, pool)
        for shard in "ab":
            pool.offer(shard)
        list(pool.step(0))
        (worker,) = cluster.working
        cluster.events.append(Done(worker, 1, None))
        list(pool.step(0))
        clock.now += 60
        list(pool.step(0))
        assert worker.gone
        assert list(finish_all(cluster, pool)) == ["a", "b"]


def test_replicas_that_went_with_their_nodes_are_no_dead_ends() -> None:
    cluster = FakeCluster(8, ONE_NODE)
    with pool_of(cluster, 8) as pool:
        all_up(cluster, pool)
        pool.offer("a")
        for worker in list(cluster.working):
            cluster.end(worker)  # one each
        list(pool.step(0))
        for name in list(cluster.nodes)[1:]:
            cluster.lose_node(name)
        all_up(cluster, pool)
        assert pool.dead_ends == 0
        for _ in range(25):
            (worker,) = cluster.working
            cluster.end(worker)
            all_up(cluster, pool)
        assert pool.dead_ends == 33
        pool.note_progress()
        assert pool.dead_ends == 0


def deaths_of(cluster: FakeCluster, pool: FakePool, killer: str, *, until: int) -> list[FakeWorker]:
    """The workers that end as they hold the shard ``killer``, which is done after ``until``."""
    died: list[FakeWorker] = []
    done: list[str] = []
    for _ in range(10_000):
        if pool.idle:
            return died
        for worker in cluster.working:
            if not worker.up:
                cluster.come_up(worker)
            if killer in worker.work.values() and len(died) < until:
                died.append(worker)
                cluster.end(worker)
            for ticket in [] if worker.gone else list(worker.work):
                cluster.finish(worker, ticket)
        done += filter(None, pool.step(0))
    raise AssertionError("shards are left that nobody takes up")


def test_a_shard_that_workers_die_of_runs_alone_and_the_others_are_done_beside_it() -> None:
    cluster = FakeCluster(4, ONE_NODE)
    with pool_of(cluster, 4, depth=5) as pool:
        for number in range(100):
            pool.offer(str(number))
        died = deaths_of(cluster, pool, "7", until=9)
        assert len(died) == 9
        assert [worker.alone for worker in died] == [False] * 2 + [True] * 7
        assert pool.idle


def test_a_suspect_goes_from_node_to_node() -> None:
    cluster = FakeCluster(4, ONE_NODE)
    with pool_of(cluster, 4, depth=5) as pool:
        for number in range(100):
            pool.offer(str(number))
        died = [worker for worker in deaths_of(cluster, pool, "7", until=12) if worker.alone]
        nodes = [worker.place.nodes[0] for worker in died]
        assert len(set(nodes[:3])) > 1
        counts = [nodes.count(node) for node in cluster.nodes]
        assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize("until", [1, 2, 8])
def test_one_replica_alone_can_try_a_suspect_too(until: int) -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1, depth=5) as pool:
        for number in range(20):
            pool.offer(str(number))
        pool.all_read = True
        died = deaths_of(cluster, pool, "3", until=until)
        assert len(died) == until
        assert sum(worker.alone for worker in died) == max(0, until - 2)


def test_a_shard_that_an_earlier_start_died_of_runs_alone_at_once() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        for shard in "ab":
            pool.offer(shard)
        list(pool.step(0))
        (worker,) = cluster.working
        worker.work.pop(1)
        cluster.events.append(Suspected(worker, 1))
        list(pool.step(0))
        assert list(worker.work.values()) == ["b"]  # until it is through, nothing more
        cluster.finish(worker, 2)
        assert list(pool.step(0)) == ["b"]
        assert (list(worker.work.values()), worker.alone) == (["a"], True)
        assert list(finish_all(cluster, pool)) == ["a"]


def test_a_worker_that_goes_with_its_node_or_loses_the_store_makes_no_suspect() -> None:
    cluster = FakeCluster(8, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        pool.offer("a")
        for _ in range(3):
            all_up(cluster, pool)
            cluster.lose_node(cluster.working[0].place.nodes[0])
            cluster.events.clear()  # Ray tells of the node first
            all_up(cluster, pool)
            (worker,) = cluster.working
            cluster.events.append(Done(worker, 1, None))
            list(pool.step(0))
        all_up(cluster, pool)
        assert [worker.alone for worker in cluster.working] == [False]
        assert list(finish_all(cluster, pool)) == ["a"]


def test_deaths_of_suspects_alone_are_bounded_too() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        pool.offer("a")
        deaths = 0
        while not pool.dead_ends:
            all_up(cluster, pool)
            cluster.end(cluster.working[0])
            list(pool.step(0))
            deaths += 1
        assert deaths == 9


def test_a_drained_replica_gives_its_shards_back_undone() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        pool.offer("a")
        list(pool.step(0))
        pool.draining = True
        cluster.events.append(Done(cluster.working[0], 1, None))
        assert list(pool.step(0)) == [None]
        assert not pool.working


def test_a_replica_that_ends_during_a_drain_gets_no_successor() -> None:
    cluster = FakeCluster(1, ONE_NODE)
    with pool_of(cluster, 1) as pool:
        all_up(cluster, pool)
        pool.offer("a")
        list(pool.step(0))
        pool.draining = True
        cluster.end(cluster.working[0])
        list(pool.step(0))
        list(pool.step(0))
        assert cluster.working == []
        assert not pool.working


def test_a_dead_replica_does_not_come_back_for_nothing() -> None:
    cluster = FakeCluster(2, ONE_NODE)
    with pool_of(cluster, 2) as pool:
        all_up(cluster, pool)
        pool.offer("a")
        pool.all_read = True
        list(pool.step(0))
        working, idle = cluster.working
        cluster.end(idle)
        list(pool.step(0))
        list(pool.step(0))
        assert cluster.working == [working]
        cluster.end(working)
        assert list(finish_all(cluster, pool)) == ["a"]


@pytest.mark.parametrize("loaded", [True, False])
def test_a_node_that_goes_is_left_by_a_replica_without_rows(loaded: bool) -> None:
    cluster = FakeCluster(2, TWO_NODES)
    with pool_of(cluster, 1) as pool:
        list(pool.step(0))
        (worker,) = cluster.working
        if loaded:
            cluster.come_up(worker)
            list(pool.step(0))
        cluster.going.add(worker.place.nodes[-1])
        list(pool.step(0))
        assert (worker.gone, worker.place.released) == (True, True)
        assert pool.lacking is not None
        assert "1 of 1 nodes have that free" in pool.lacking


def test_a_seat_that_waits_says_so_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(1, TWO_NODES)
    clock = Clock()
    with pool_of(cluster, 1, clock=clock) as pool:
        for _ in range(130):
            clock.now += 1
            list(pool.step(0))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "1 of 1 nodes have that free" in lines[0]


@pytest.mark.parametrize("seed", range(24))
def test_whatever_happens_every_shard_is_done_and_nothing_leaks(seed: int) -> None:
    """Nodes come and go, workers fail to start and die, at random; 1 to 64 nodes, mixed needs."""
    rng = random.Random(seed)
    needs = rng.choice([ONE_NODE, TWO_NODES, PAIR_OF_GPUS])
    cluster = FakeCluster(rng.randint(1, 64), needs)
    shards = [str(number) for number in range(rng.randint(0, 300))]
    waiting = list(shards)
    done: list[str] = []
    with pool_of(cluster, rng.randint(1, 64), depth=rng.randint(1, 17)) as pool:
        for _ in range(300):
            while waiting and pool.waiting < 2 + pool.room:
                pool.offer(waiting.pop(0))
            done += filter(None, pool.step(0))
            for worker in rng.sample(cluster.working, min(3, len(cluster.working))):
                match rng.choice(["up", "up", "finish", "finish", "die"]):
                    case "up" if not worker.up:
                        cluster.come_up(worker)
                    case "finish" if worker.work:
                        cluster.finish(worker, rng.choice(list(worker.work)))
                    case "die" if worker.up and rng.random() < 0.3:
                        cluster.end(worker)
            if rng.random() < 0.1 and len(cluster.nodes) > 1:
                cluster.lose_node(rng.choice(list(cluster.nodes)))
            if rng.random() < 0.1 and len(cluster.nodes) < 64:
                cluster.add_node()
            cluster.free(rng.choice(list(cluster.nodes)))  # fails if a GPU is taken twice
        while len(cluster.nodes) < needs.nodes:
            cluster.add_node()
        for shard in waiting:
            pool.offer(shard)
        done += finish_all(cluster, pool)
    assert sorted(done) == sorted(shards)
    assert (cluster.places, cluster.working) == ([], [])


def test_runs_that_share_a_full_cluster_do_not_block_each_other() -> None:
    """Each takes what it can use at once; who comes late gets what the other gives back."""
    cluster = FakeCluster(3, TWO_NODES)
    beside = FakeCluster(0, TWO_NODES, beside=cluster)
    with pool_of(beside, 2) as late:
        with pool_of(cluster, 2) as first:
            all_up(cluster, first)
            first.offer("a")
            late.offer("b")
            list(late.step(0))
            assert (len(cluster.working), len(beside.working)) == (1, 0)
            assert list(finish_all(cluster, first)) == ["a"]
        assert list(finish_all(beside, late)) == ["b"]
    assert cluster.everyones == []
