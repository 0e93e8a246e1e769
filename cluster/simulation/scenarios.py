"""What is simulated: cluster sizes, the tail, the number of open shards, and lost replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.simulation.cluster import Churn, ClusterSpec, SimulatedRun, simulate
from cluster.simulation.engine import EngineModel
from cluster.simulation.policies import FIFO, PIPELINE, Policy
from cluster.simulation.workload import Workload, log_normal, long_tail

GIVEN = EngineModel(
    name="given",
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    kv_tokens=600_000,
    curve=((1, 0.012), (32, 0.018), (128, 0.028), (256, 0.040)),
    prefill_s=1 / 40_000,
)
"""An assumption, not a measurement: 6,400 completion tokens a second with all sequences."""
TIGHT = replace(GIVEN, name="given, small KV cache", kv_tokens=90_000)
"""The same with room for about two thirds of its sequences."""


@dataclass(frozen=True)
class Size:
    """One size of the cluster, and what is asked of it."""

    replicas: int
    rows_per_replica: int
    least_efficiency: float


SIZES = (
    Size(1, 32_000, 0.97),
    Size(8, 32_000, 0.95),
    Size(64, 16_000, 0.95),
    Size(512, 8_000, 0.90),
)
QUICK_SIZES = (Size(1, 2_000, 0.97), Size(2, 2_000, 0.95))
BOUND_REPLICAS = 8
MOST_OVER_BOUND = 1.03
"""On log-normal lengths."""
MOST_OVER_CHURN_BOUND = 1.10
OPEN_SHARDS = (2, 4, 8, 16, 32)
QUEUED_SHARDS = (0, 1, 4)
CHURN_SIZES = ((1, 96_000), (8, 32_000), (8, 96_000), (64, 16_000))
"""(replicas, rows per replica)."""
CHURN_SEEDS = 3


@dataclass(frozen=True)
class Study:
    """All runs, in the order of the page's tables."""

    scale: Sequence[tuple[Size, SimulatedRun, SimulatedRun]]
    """(size, the pipeline, FIFO)."""
    tail: Sequence[SimulatedRun]
    open_shards: Mapping[int, Sequence[SimulatedRun]]
    queued_shards: Mapping[int, Sequence[SimulatedRun]]
    churn: Sequence[Sequence[SimulatedRun]]
    """By size; a run per seed."""


def study(seed: int, *, quick: bool, say: Callable[[str], None]) -> Study:
    """Run everything; ``quick`` is for tests: the same code on a few rows."""
    sizes = QUICK_SIZES if quick else SIZES
    replicas = 2 if quick else BOUND_REPLICAS
    rows = replicas * (1_500 if quick else 32_000)
    kinds = (log_normal(rows, seed), long_tail(rows, seed))
    return Study(
        scale=list(_scale(sizes, seed, say)),
        tail=list(_tail(replicas, kinds, seed, say)),
        open_shards={
            count: list(_variant(replace(PIPELINE, open_shards=count), replicas, kinds, seed, say))
            for count in (OPEN_SHARDS[1:3] if quick else OPEN_SHARDS)
        },
        queued_shards={
            count: list(
                _variant(replace(PIPELINE, queued_shards=count), replicas, kinds, seed, say)
            )
            for count in (QUEUED_SHARDS[:2] if quick else QUEUED_SHARDS)
        },
        churn=[
            list(_churn(*size, 1 if quick else CHURN_SEEDS, seed, say))
            for size in ([(2, 20_000)] if quick else CHURN_SIZES)
        ],
    )


def _scale(
    sizes: Sequence[Size], seed: int, say: Callable[[str], None]
) -> Iterator[tuple[Size, SimulatedRun, SimulatedRun]]:
    for size in sizes:
        workload = log_normal(size.replicas * size.rows_per_replica, seed)
        spec = ClusterSpec(size.replicas, GIVEN, seed=seed)
        ours, fifo = (_told(spec, workload, policy, say) for policy in (PIPELINE, FIFO))
        yield size, ours, fifo


def _tail(
    replicas: int, kinds: Sequence[Workload], seed: int, say: Callable[[str], None]
) -> Iterator[SimulatedRun]:
    for engine in (GIVEN, TIGHT):
        for workload in kinds:
            named = replace(workload, name=f"{workload.name}, {engine.name} engine")
            for policy in (PIPELINE, FIFO):
                yield _told(ClusterSpec(replicas, engine, seed=seed), named, policy, say)


def _variant(
    policy: Policy,
    replicas: int,
    kinds: Sequence[Workload],
    seed: int,
    say: Callable[[str], None],
) -> Iterator[SimulatedRun]:
    for workload in kinds:
        yield _told(ClusterSpec(replicas, GIVEN, seed=seed), workload, policy, say)


def _churn(
    replicas: int, rows_per_replica: int, seeds: int, seed: int, say: Callable[[str], None]
) -> Iterator[SimulatedRun]:
    workload = log_normal(replicas * rows_per_replica, seed)
    for number in range(seeds):
        spec = ClusterSpec(replicas, GIVEN, churn=Churn(), seed=seed + number)
        yield _told(spec, workload, PIPELINE, say)


def _told(
    spec: ClusterSpec, workload: Workload, policy: Policy, say: Callable[[str], None]
) -> SimulatedRun:
    run = simulate(spec, workload, policy)
    say(
        f"{spec.replicas} replicas, {workload.name}, {policy.name}: {run.over_bound:.3f} x the "
        f"bound, efficiency {run.efficiency:.3f}"
    )
    return run
