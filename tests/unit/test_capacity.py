"""pipeline.capacity: what fits, and what is said when it does not."""

from __future__ import annotations

import pytest

from pipeline.capacity import NodeCapacity, bundles, missing, waits_for
from pipeline.profile import EngineProfile, load_profile

ONE_NODE = load_profile("maverick-fp8-8xh100")
TWO_NODES = load_profile("maverick-fp8-2x8xh100")
MINI = load_profile("mini-maverick")


def h100(name: str, *, gpus: int = 8, accelerator: str | None = "H100") -> NodeCapacity:
    return NodeCapacity(name, cpus=208, gpus=gpus, memory_gib=1800, accelerator=accelerator)


def small(name: str, *, cpus: float = 2, memory_gib: float = 16) -> NodeCapacity:
    return NodeCapacity(name, cpus=cpus, gpus=0, memory_gib=memory_gib)


@pytest.mark.parametrize(
    ("profile", "replicas", "nodes"),
    [
        (ONE_NODE, 1, [h100("a")]),
        (ONE_NODE, 2, [h100("a"), h100("b")]),
        (ONE_NODE, 2, [h100("a", gpus=16)]),  # two replicas side by side on one node
        (TWO_NODES, 1, [h100("a"), h100("b")]),
        (TWO_NODES, 2, [h100(name) for name in "abcd"]),
        (TWO_NODES, 2, [h100("a", gpus=16), h100("b", gpus=16)]),
        (TWO_NODES, 2, [h100("a", gpus=16), h100("b"), h100("c")]),
        (MINI, 2, [small("a"), small("b")]),
        (MINI, 3, [small("a", cpus=6)]),
    ],
)
def test_what_fits_lacks_nothing(
    profile: EngineProfile, replicas: int, nodes: list[NodeCapacity]
) -> None:
    assert missing(profile, replicas, nodes) == []


@pytest.mark.parametrize(
    ("profile", "replicas", "nodes"),
    [
        (ONE_NODE, 2, [h100("a")]),
        (ONE_NODE, 1, [h100("a", gpus=4), h100("b", gpus=4)]),  # eight GPUs, on no one node
        (ONE_NODE, 1, [h100("a", accelerator="H200")]),
        (TWO_NODES, 1, [h100("a", gpus=16)]),  # its two shares go on two nodes
        (TWO_NODES, 2, [h100("a", gpus=32), h100("b")]),
        (MINI, 1, [small("a", cpus=1), small("b", cpus=1)]),
        (MINI, 1, [small("a", memory_gib=2)]),
        (MINI, 3, [small("a"), small("b")]),
        (MINI, 1, []),
    ],
)
def test_what_does_not_fit_is_said(
    profile: EngineProfile, replicas: int, nodes: list[NodeCapacity]
) -> None:
    assert missing(profile, replicas, nodes)


def test_sentence_names_what_a_replica_needs_and_the_largest_node() -> None:
    (sentence,) = missing(ONE_NODE, 1, [small("laptop")])
    assert "1 node with 8 H100 GPUs" in sentence
    assert "laptop, has 0 GPUs, 2 CPUs, 16 GiB" in sentence


def test_sentence_says_how_many_replicas_the_cluster_holds() -> None:
    (sentence,) = missing(MINI, 5, [small("a"), small("b")])
    assert sentence.startswith("5 replicas")
    assert sentence.endswith("the cluster holds 2")


def test_a_place_is_one_bundle_for_each_node() -> None:
    share = {"CPU": 32, "GPU": 8, "memory": int(256 * 0.9 * 2**30), "accelerator_type:H100": 0.001}
    assert bundles(TWO_NODES.needs) == [share, share]
    assert bundles(MINI.needs) == [{"CPU": 2, "memory": int(5 * 0.9 * 2**30)}]


def test_what_a_place_waits_for_is_said_with_what_is_free() -> None:
    free = [h100("a"), h100("b", gpus=4)]
    told = waits_for(TWO_NODES.needs, free)
    assert told is not None
    assert "2 nodes with 8 H100 GPUs" in told
    assert "1 of 2 nodes have that free" in told
    assert waits_for(ONE_NODE.needs, free) is None
    assert waits_for(ONE_NODE.needs, []) == "the cluster has no live node"
