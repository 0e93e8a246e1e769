"""All checks, in order: every one is carried out, whatever the others found, and ends in time.

In: a config, its profile and a crew. Out: a ``Report``. Facts are asked of all nodes at once; what
they mean is judged here, in the driver, by the checks' own pure functions.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from cluster.preflight import bucket
from cluster.preflight.all_reduce import judge_all_reduce, make_groups, measure
from cluster.preflight.bucket import BucketFacts, Trial, judge_bucket, try_bucket
from cluster.preflight.clocks import Offset, judge_clocks, measure_clocks
from cluster.preflight.crew import Crew, Unanswered, silent, split
from cluster.preflight.findings import Check, Fault
from cluster.preflight.gpus import judge_gpus
from cluster.preflight.machine import Machine, look_at_machine
from cluster.preflight.memory import judge_memory, judge_shared_memory
from cluster.preflight.ranks import Pace
from cluster.preflight.report import NodeView, Report
from cluster.preflight.versions import installed, judge_versions
from cluster.preflight.weight_files import Weights, look_at_weights
from cluster.preflight.weights import judge_weights
from jobs.settle import lacking, waiting
from pipeline import storage
from pipeline.capacity import slots
from pipeline.config import JobConfig
from pipeline.errors import StorageError
from pipeline.profile import EngineProfile

log = logging.getLogger(__name__)

T = TypeVar("T")

DRIVER = "driver"
"""This process among the nodes' names."""
_HASHED_BYTES_PER_S = 50e6  # far below any disk that holds a model
_PREFIX = "_preflight-"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long nodes get to answer, seconds."""

    machine_s: float = 180
    """A first process on each node, nvidia-smi and torch."""
    weights_s: float = 120
    """Headers and small files, of network disks, too; checksums get more, by their size."""
    pace: Pace = field(default_factory=Pace)


def inspect(
    config: JobConfig,
    profile: EngineProfile,
    crew: Crew,
    *,
    checksums: bool,
    patience: Patience | None = None,
) -> Report:
    """Look at everything a run of ``config`` would rely on.

    Args:
        config: of the run; its input and output are tried.
        profile: its engine's.
        crew: the cluster's nodes.
        checksums: whether to hash all of the model's files.
        patience: how long nodes get to answer.
    """
    return _Inspection(config, profile, crew, checksums, patience or Patience()).report()


class _Inspection:
    def __init__(
        self,
        config: JobConfig,
        profile: EngineProfile,
        crew: Crew,
        checksums: bool,
        patience: Patience,
    ) -> None:
        self._config = config
        self._profile = profile
        self._crew = crew
        self._checksums = checksums
        self._patience = patience
        self._started = time.monotonic()
        self._nodes = {node.id: node for node in crew.nodes}
        self._names = {node.id: node.name for node in crew.nodes}
        fitting = [node for node in crew.nodes if slots(node.capacity, profile.needs) > 0]
        self._holding = fitting
        self._candidates = fitting or ([] if crew.grows else list(crew.nodes))
        """Where a replica could run; all nodes, if none is large enough and none will come."""
        self._faults: list[Fault] = []
        self._waits: list[str] = []

    def report(self) -> Report:
        self._check_capacity()
        machines = self._machines()
        clocks = self._clocks(list(machines))
        weights = self._weights()
        buckets = self._buckets()
        self._judge_clocks(clocks, buckets)
        groups = make_groups(self._profile, self._holding)
        if groups:
            log.info("all-reduce in %d group(s) of %d processes", len(groups), groups[0].world)
        measured = measure(self._crew, groups, self._profile.env, self._patience.pace)
        self._faults += judge_all_reduce(measured, self._profile.needs.accelerator)
        views = [
            NodeView(
                node=node,
                replicas=slots(node.capacity, self._profile.needs),
                machine=machines.get(node.id),
                clock=clocks.get(node.id),
                weights=weights.get(node.id),
                bucket=buckets.get(node.name),
            )
            for node in self._crew.nodes
        ]
        return Report(
            config=self._config,
            profile=self._profile,
            nodes=tuple(views),
            measured=tuple(measured),
            faults=tuple(self._faults),
            waits=tuple(self._waits),
            seconds=time.monotonic() - self._started,
        )

    def _check_capacity(self) -> None:
        lacks = lacking(self._config, self._profile, [node.capacity for node in self._crew.nodes])
        if self._crew.grows:
            self._waits = waiting(lacks)
            return
        engine = self._config.engine
        advice = f"add nodes, or lower engine.replicas (now {engine.replicas} x {engine.profile})"
        self._faults += [Fault(Check.CAPACITY, (), f"{lack}; {advice}") for lack in lacks]

    def _machines(self) -> dict[str, Machine]:
        log.info("versions, GPUs and memory of %d node(s)", len(self._nodes))
        look = partial(look_at_machine, with_gpus=self._profile.needs.gpus_per_node > 0)
        answers = self._crew.ask(
            dict.fromkeys(self._nodes, look), timeout_s=self._patience.machine_s
        )
        found = self._answered(Check.VERSIONS, answers)
        versions = {self._names[node]: machine.versions for node, machine in found.items()}
        self._faults += judge_versions({DRIVER: installed(), **versions})
        gpus = {self._nodes[node]: machine.gpus for node, machine in found.items()}
        self._faults += judge_gpus(self._profile, gpus, self._holding)
        memory = {node: found[node.id].memory for node in self._holding if node.id in found}
        self._faults += judge_memory(self._profile, memory)
        self._faults += judge_shared_memory(self._profile, memory)
        return found

    def _clocks(self, node_ids: list[str]) -> dict[str, Offset]:
        return self._answered(Check.CLOCKS, measure_clocks(self._crew, node_ids))

    def _judge_clocks(
        self, clocks: Mapping[str, Offset], buckets: Mapping[str, BucketFacts]
    ) -> None:
        nodes = {self._names[node]: found for node, found in clocks.items()}
        stores = {name: facts.clock for name, facts in buckets.items() if facts.clock is not None}
        self._faults += judge_clocks(nodes, stores)

    def _weights(self) -> dict[str, Weights]:
        log.info("files of %s on %d node(s)", self._profile.model, len(self._candidates))
        found, missing = split(self._look_at_weights(self._patience.weights_s, checksums=False))
        if self._checksums and found:
            size = max(weights.size for weights in found.values())
            log.info("checksums of %.1f GB on each node: this takes minutes", size / 1e9)
            limit = self._patience.weights_s + size / _HASHED_BYTES_PER_S
            found, missing = split(self._look_at_weights(limit, checksums=True))
        self._faults += silent(Check.WEIGHTS, self._names, missing)
        named = {self._names[node]: weights for node, weights in found.items()}
        self._faults += judge_weights(named)
        return found

    def _look_at_weights(
        self, timeout_s: float, *, checksums: bool
    ) -> dict[str, Weights | Unanswered]:
        look = partial(
            look_at_weights,
            self._profile.model,
            self._profile.revision,
            needs_tensors=self._profile.engine_args.get("load_format") != "dummy",
            checksums=checksums,
        )
        ids = [node.id for node in self._candidates]
        return self._crew.ask(dict.fromkeys(ids, look), timeout_s=timeout_s)

    def _buckets(self) -> dict[str, BucketFacts]:
        """What came of the trials, by node name; the driver, which plans and commits, is one."""
        log.info("input and output, from %d node(s) and the driver", len(self._nodes))
        given = self._config.input.uri
        output = self._config.output.uri
        files, problems = bucket.first_files([given] if isinstance(given, str) else given)
        self._faults += [Fault(Check.BUCKET, (DRIVER,), problem) for problem in problems]
        prefix = f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        folder = storage.absolute(output)
        marker = storage.join(folder, prefix)
        made = bucket.new_folder(output)
        marked = bucket.put_marker(marker)
        trials = {
            node: Trial(
                files=tuple(files),
                roots=tuple(self._config.images.roots),
                output=output,
                probe=f"{prefix}-{node}",
                marker=marker if marked else None,
            )
            for node in (DRIVER, *self._nodes)
        }
        try:
            found = {DRIVER: try_bucket(trials.pop(DRIVER)), **self._try_buckets(trials)}
        finally:
            if marked:
                probes = [storage.join(folder, f"{prefix}-{node}") for node in self._nodes]
                _clean_up([marker, *probes], made)
        self._faults += judge_bucket(found)
        return found

    def _try_buckets(self, trials: Mapping[str, Trial]) -> dict[str, BucketFacts]:
        answers = self._crew.ask(
            {node: partial(try_bucket, trial) for node, trial in trials.items()},
            timeout_s=max((trial.most_s for trial in trials.values()), default=0),
        )
        found = self._answered(Check.BUCKET, answers)
        return {self._names[node]: facts for node, facts in found.items()}

    def _answered(self, check: Check, answers: Mapping[str, T | Unanswered]) -> dict[str, T]:
        found, missing = split(answers)
        self._faults += silent(check, self._names, missing)
        return found


def _clean_up(uris: Sequence[str], made: str | None) -> None:
    """What a node that was cut off may have left; a failure costs a small object."""
    try:
        bucket.clean_up(uris, made)
    except StorageError as error:
        log.warning("%s may be left behind: %s", ", ".join(uris), error)
