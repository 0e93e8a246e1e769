"""What is simulated: cluster sizes, run lengths, the tail, open shards, and lost replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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
    Size(512, 12_000, 0.90),
)
QUICK_SIZES = (Size(1, 2_000, 0.97), Size(2, 2_000, 0.95))
LENGTH_REPLICAS = 64
LENGTHS = (1_000, 2_000, 4_000, 8_000, 16_000)
"""Rows per replica."""
BOUND_REPLICAS = 8
MOST_OVER_BOUND = 1.03
"""On log-normal lengths."""
MOST_OVER_CHURN_BOUND = 1.10
OPEN_SHARDS = (2, 4, 8, 16, 32)
QUEUED_SHARDS = (0, 1, 4)
LATE_LENGTHS = (1_000, 4_000, 7_000)
LATE_S = 1.0
"""Between one replica's engine and the next: nodes read weights at their own pace."""
CHURN_SIZES = ((1, 96_000), (8, 32_000), (8, 96_000), (64, 16_000))
"""(replicas, rows per replica)."""
CHURN_SEEDS = 2
Kind = Callable[[int, int], Workload]
"""(rows, seed) -> rows to simulate."""
KINDS: tuple[Kind, Kind] = (log_normal, long_tail)


@dataclass(frozen=True)
class Case:
    """One run."""

    spec: ClusterSpec
    policy: Policy
    kind: Kind
    rows: int
    seed: int
    """Of the rows."""


@dataclass(frozen=True)
class Study:
    """All runs, in the order of the page's tables."""

    scale: Sequence[tuple[Size, SimulatedRun, SimulatedRun]]
    """(size, the pipeline, FIFO)."""
    lengths: Sequence[tuple[SimulatedRun, SimulatedRun]]
    """Of runs that grow: the pipeline, FIFO."""
    tail: Sequence[SimulatedRun]
    """Of each engine and kind of rows: the pipeline, FIFO."""
    open_shards: Mapping[int, Sequence[SimulatedRun]]
    """By their number; a run per kind of rows."""
    queued_shards: Mapping[int, Sequence[SimulatedRun]]
    late: Sequence[tuple[SimulatedRun, SimulatedRun]]
    """Replicas that start one after the other: the pipeline, FIFO."""
    churn: Sequence[Sequence[SimulatedRun]]
    """By size; a run per seed."""


def study(seed: int, *, quick: bool, say: Callable[[str], None], processes: int = 1) -> Study:
    """Run everything; ``quick`` is for tests: the same code on a few rows."""
    sizes = QUICK_SIZES if quick else SIZES
    length_replicas = 2 if quick else LENGTH_REPLICAS
    lengths = LENGTHS[:2] if quick else LENGTHS
    replicas = 2 if quick else BOUND_REPLICAS
    rows = replicas * (1_500 if quick else 32_000)
    open_shards = OPEN_SHARDS[1:3] if quick else OPEN_SHARDS
    queued_shards = QUEUED_SHARDS[:2] if quick else QUEUED_SHARDS
    late_lengths = LATE_LENGTHS[:1] if quick else LATE_LENGTHS
    late = ClusterSpec(
        replicas, GIVEN, ready_s=tuple(LATE_S * n for n in range(replicas)), seed=seed
    )
    churn_sizes = [(2, 20_000)] if quick else CHURN_SIZES
    seeds = 1 if quick else CHURN_SEEDS

    def case(policy: Policy, kind: Kind, engine: EngineModel = GIVEN) -> Case:
        return Case(ClusterSpec(replicas, engine, seed=seed), policy, kind, rows, seed)

    sections = (
        [
            Case(spec, policy, log_normal, size.replicas * size.rows_per_replica, seed)
            for size in sizes
            for spec in (ClusterSpec(size.replicas, GIVEN, seed=seed),)
            for policy in (PIPELINE, FIFO)
        ],
        [
            Case(spec, policy, log_normal, length_replicas * each, seed)
            for each in lengths
            for spec in (ClusterSpec(length_replicas, GIVEN, seed=seed),)
            for policy in (PIPELINE, FIFO)
        ],
        [
            case(policy, kind, engine)
            for engine in (GIVEN, TIGHT)
            for kind in KINDS
            for policy in (PIPELINE, FIFO)
        ],
        [case(replace(PIPELINE, open_shards=n), kind) for n in open_shards for kind in KINDS],
        [case(replace(PIPELINE, queued_shards=n), kind) for n in queued_shards for kind in KINDS],
        [
            Case(late, policy, kind, replicas * each, seed)
            for kind in KINDS
            for each in late_lengths
            for policy in (PIPELINE, FIFO)
        ],
        [
            Case(spec, PIPELINE, log_normal, count * each, seed)
            for count, each in churn_sizes
            for number in range(seeds)
            for spec in (ClusterSpec(count, GIVEN, churn=Churn(), seed=seed + number),)
        ],
    )
    scale, grown, tail, opened, queued, lagging, churn = _run_all(sections, processes, say)
    return Study(
        scale=[(size, *pair) for size, pair in zip(sizes, _pairs(scale), strict=True)],
        lengths=_pairs(grown),
        tail=tail,
        open_shards=dict(zip(open_shards, _pairs(opened), strict=True)),
        queued_shards=dict(zip(queued_shards, _pairs(queued), strict=True)),
        late=_pairs(lagging),
        churn=[churn[first : first + seeds] for first in range(0, len(churn), seeds)],
    )


def _run_all(
    sections: Sequence[Sequence[Case]], processes: int, say: Callable[[str], None]
) -> list[list[SimulatedRun]]:
    """Each section's runs, in its order; the largest are begun first."""
    cases = [case for section in sections for case in section]
    order = sorted(range(len(cases)), key=lambda number: -cases[number].rows)
    runs: dict[int, SimulatedRun] = {}
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(_run, [cases[number] for number in order])
        for number, run in zip(order, results, strict=True):
            runs[number] = run
            say(
                f"{run.replicas} replicas, {run.engine} engine, {run.workload}, {run.policy}: "
                f"{run.over_bound:.3f} x the bound, efficiency {run.efficiency:.3f}"
            )
    done = iter(range(len(cases)))
    return [[runs[next(done)] for _ in section] for section in sections]


def _run(case: Case) -> SimulatedRun:
    return simulate(case.spec, case.kind(case.rows, case.seed), case.policy)


def _pairs(runs: Sequence[SimulatedRun]) -> list[tuple[SimulatedRun, SimulatedRun]]:
    return list(zip(runs[::2], runs[1::2], strict=True))
