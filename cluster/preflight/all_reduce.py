"""All-reduce between the workers of a replica: that it works at all, and how fast.

In: the nodes that can hold a share of a replica. Out: measured groups, and faults. A group is what
one replica takes: its nodes, with one process per worker (per GPU with NCCL). Neighbours by name
make a group, and every node is in one; which nodes a replica really gets is up to Ray and vLLM.

Bandwidth is the bus bandwidth of nccl-tests (doc/PERFORMANCE.md): bytes / seconds x 2(n-1)/n for n
ranks, which does not depend on n and can be held against the hardware's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.preflight.crew import Crew, Node, Unanswered
from cluster.preflight.findings import Check, Fault, listed
from cluster.preflight.memory import workers_per_node
from cluster.preflight.ranks import Pace, Part, RankReport, Stage, free_port, run_part
from pipeline.profile import EngineProfile

_PORT_S = 10.0
_BEYOND_S = 20.0
"""What a node gets to answer after its ranks are stopped."""
_SLOW_SHARE = 0.5
"""Of the median of all groups: slower ones have a bad link."""
_GROUPS_TO_COMPARE = 3


@dataclass(frozen=True, slots=True)
class Least:
    """Bus bandwidth below which the fast way is not in use, GB/s."""

    within: float
    """Between GPUs of one node."""
    between: float
    """Between nodes."""


LEAST = {"H100": Least(within=100, between=10), "H200": Least(within=100, between=10)}
"""By accelerator. NVSwitch gives some 350-480, PCIe alone 15-25; several 400 Gb/s cards give some
hundreds, one 100 Gb/s card 12, and TCP sockets 1-5. Not measured by this project."""


@dataclass(frozen=True, slots=True)
class Group:
    """The nodes of one replica, in the order of their ranks."""

    nodes: tuple[Node, ...]
    per_node: int
    """Ranks on each."""
    backend: str

    @property
    def world(self) -> int:
        """All of its ranks."""
        return len(self.nodes) * self.per_node

    def node_of(self, rank: int) -> str:
        """The name of the node a rank is on."""
        return self.nodes[rank // self.per_node].name

    @property
    def names(self) -> tuple[str, ...]:
        """Of its nodes."""
        return tuple(node.name for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """All-reduces of one size, as the slowest rank saw them."""

    size: int
    seconds: float
    bus_gb_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of one group."""

    group: Group
    reports: tuple[RankReport, ...] = ()
    missing: Mapping[str, str] | None = None
    """Why nodes gave no report, by name; None: all did."""

    @property
    def whole(self) -> bool:
        """Whether every rank came to its end."""
        done = sum(report.stage is Stage.DONE for report in self.reports)
        return done == self.group.world

    @property
    def bandwidths(self) -> list[Bandwidth]:
        """By size, smallest first; none if a rank did not come to its end."""
        if not self.whole:
            return []
        found = []
        for timings in zip(*(report.timings for report in self.reports), strict=True):
            size, seconds = timings[0].size, max(timing.seconds for timing in timings)
            found.append(Bandwidth(size, seconds, bus_gb_s(size, seconds, self.group.world)))
        return found

    @property
    def best_gb_s(self) -> float | None:
        """Bus bandwidth at the largest size."""
        return self.bandwidths[-1].bus_gb_s if self.bandwidths else None


def bus_gb_s(size: int, seconds: float, ranks: int) -> float:
    """Bus bandwidth of an all-reduce, GB/s (see above)."""
    return size / seconds * 2 * (ranks - 1) / ranks / 1e9


def make_groups(profile: EngineProfile, nodes: Sequence[Node]) -> list[Group]:
    """Groups in which every node is; the last takes nodes of an earlier one if it is short."""
    size = profile.needs.nodes
    if len(nodes) < size:
        return []
    ordered = sorted(nodes, key=lambda node: node.name)
    starts = [min(start, len(ordered) - size) for start in range(0, len(ordered), size)]
    backend = "nccl" if profile.needs.gpus_per_node else "gloo"
    groups = [
        Group(tuple(ordered[start : start + size]), workers_per_node(profile), backend)
        for start in starts
    ]
    return [group for group in groups if group.world > 1]


def measure(
    crew: Crew, groups: Sequence[Group], env: Mapping[str, str], pace: Pace
) -> list[Measured]:
    """Run all groups: side by side, as they would work, but for one that shares a node."""
    busy: set[str] = set()
    waves: list[list[Group]] = [[], []]
    for group in groups:
        ids = {node.id for node in group.nodes}
        waves[1 if ids & busy else 0].append(group)
        busy |= ids
    return [one for wave in waves if wave for one in _measure(crew, wave, env, pace)]


def judge_all_reduce(found: Sequence[Measured], accelerator: str | None) -> list[Fault]:
    """Faults of the groups."""
    best = [one.best_gb_s for one in found if one.best_gb_s is not None]
    median = statistics.median(best) if len(best) >= _GROUPS_TO_COMPARE else None
    faults = []
    for one in found:
        message = _stuck(one) if not one.whole else _wrong(one) or _slow(one, accelerator, median)
        if message:
            prefix = f"all-reduce ({one.group.backend}, {one.group.world} processes)"
            faults.append(Fault(Check.ALL_REDUCE, one.group.names, f"{prefix} {message}"))
    return faults


def _measure(
    crew: Crew, groups: Sequence[Group], env: Mapping[str, str], pace: Pace
) -> list[Measured]:
    held = {group: _held(group) for group in groups}
    free = [group for group in groups if not held[group]]
    ports = crew.ask({group.nodes[0].id: free_port for group in free}, timeout_s=_PORT_S)
    questions = {}
    for group in free:
        port = ports[group.nodes[0].id]
        if not isinstance(port, Unanswered):
            for index, node in enumerate(group.nodes):
                part = _part(group, index, port, env, pace)
                questions[node.id] = partial(run_part, part)
    gpus = groups[0].per_node if groups[0].backend == "nccl" else 0
    answers = crew.ask(questions, timeout_s=pace.most_s + _BEYOND_S, gpus=gpus)
    return [
        Measured(group, missing=held[group]) if held[group] else _gather(group, ports, answers)
        for group in groups
    ]


def _held(group: Group) -> dict[str, str]:
    """Nodes whose GPUs are not free, and what is said of them."""
    if group.backend != "nccl":
        return {}
    return {
        node.name: f"{node.held_gpus:g} of its {node.capacity.gpus} GPUs are held"
        for node in group.nodes
        if node.capacity.gpus - node.held_gpus < group.per_node
    }


def _part(group: Group, index: int, port: int, env: Mapping[str, str], pace: Pace) -> Part:
    first = index * group.per_node
    return Part(
        ranks=tuple(range(first, first + group.per_node)),
        world=group.world,
        backend=group.backend,
        address=group.nodes[0].address,
        port=port,
        env=env,
        pace=pace,
    )


def _gather(
    group: Group,
    ports: Mapping[str, int | Unanswered],
    answers: Mapping[str, tuple[RankReport, ...] | Unanswered],
) -> Measured:
    first = ports[group.nodes[0].id]
    if isinstance(first, Unanswered):
        return Measured(group, missing={group.names[0]: first.reason})
    reports: list[RankReport] = []
    missing = {}
    for node in group.nodes:
        answer = answers[node.id]
        if isinstance(answer, Unanswered):
            missing[node.name] = answer.reason
        else:
            reports += answer
    return Measured(group, tuple(reports), missing or None)


def _stuck(one: Measured) -> str:
    """How far it came, who is behind, and what to do."""
    if one.missing:
        told = "; ".join(f"{name}: {reason}" for name, reason in one.missing.items())
        return f"was not measured ({told}); see to that, and try again"
    behind = min(report.stage for report in one.reports)
    last = sorted({one.group.node_of(r.rank) for r in one.reports if r.stage == behind})
    errors = [report.error for report in one.reports if report.error]
    said = f" ({errors[0]})" if errors else ""
    return f"does not end: {listed(last)} {_CAME[behind]}{said}; {_STUCK_REMEDY[behind]}"


_CAME = {
    Stage.SILENT: "could not start a process",
    Stage.STARTING: "did not get beyond importing torch",
    Stage.JOINING: "waited in vain to join the others",
    Stage.JOINED: "joined and then took no part",
    Stage.REDUCING: "waited in vain for the sum",
}
_NETWORK = (
    "open all TCP ports between these nodes, and name the interface between them in the profile's "
    "env (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
)
_STUCK_REMEDY = {
    Stage.SILENT: "look at that node's memory and its Python",
    Stage.STARTING: "install the project there anew",
    Stage.JOINING: _NETWORK,
    Stage.JOINED: "look at that node: its network, its GPUs and the kernel's log",
    Stage.REDUCING: _NETWORK,
}


def _wrong(one: Measured) -> str:
    bad = sorted(
        {
            one.group.node_of(report.rank)
            for report in one.reports
            if not all(timing.right for timing in report.timings)
        }
    )
    return f"gives a wrong sum on {listed(bad)}; take these nodes out of the cluster" if bad else ""


def _slow(one: Measured, accelerator: str | None, median: float | None) -> str:
    found, least = one.best_gb_s, LEAST.get(accelerator or "")
    if found is None:
        return ""
    if one.group.backend == "nccl" and least is not None:
        several = len(one.group.nodes) > 1
        limit = least.between if several else least.within
        if found < limit:
            remedy = _SLOW_NETWORK if several else _SLOW_LINKS
            return f"has {found:.1f} GB/s, less than {limit:g} GB/s; {remedy}"
    if median is not None and found < _SLOW_SHARE * median:
        return (
            f"has {found:.2f} GB/s, and the median of all groups is {median:.2f} GB/s; look for a "
            "bad cable, a slower network card or a busy machine among these nodes"
        )
    return ""


_SLOW_NETWORK = (
    "NCCL does not use RDMA: look at what NCCL_DEBUG=INFO says of NET/IB, and give the containers "
    "/dev/infiniband and a locked-memory limit"
)
_SLOW_LINKS = "NCCL does not use NVLink: look at `nvidia-smi nvlink -s` and the fabric manager"
