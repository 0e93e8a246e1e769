"""What a preflight tells: a table and sentences for people, one JSON object for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.preflight.all_reduce import Measured
from cluster.preflight.bucket import BucketFacts
from cluster.preflight.clocks import Offset
from cluster.preflight.crew import Node
from cluster.preflight.findings import Check, Fault
from cluster.preflight.machine import Machine
from cluster.preflight.memory import workers_per_node
from cluster.preflight.weight_files import Weights
from pipeline.config import JobConfig
from pipeline.errors import ExitCode
from pipeline.profile import EngineProfile
from pipeline.redact import redacted_text

_PLAIN_WIDTH = 140
"""Columns where no terminal says."""
_OF_REPLICAS = (Check.GPUS, Check.MEMORY, Check.SHARED_MEMORY)
"""Checks of nodes that can hold a replica."""
_OF_MACHINES = (*_OF_REPLICAS, Check.CLOCKS)
"""Checks that begin with a look at the machine."""
_SIGNIFICANT = 4
"""Digits of figures in the last line."""


class Outcome(StrEnum):
    """How one check ended."""

    OK = "ok"
    FAULTS = "faults"
    NOT_NEEDED = "not_needed"
    """The profile asks for nothing of that kind."""
    WAITS = "waits"
    """The cluster's autoscaler will see to it: it says nothing of nodes that are not there yet."""
    NOT_DONE = "not_done"
    """It could not be done, or not on every node."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node and what was found there; None: it did not answer, or was not asked."""

    node: Node
    replicas: int
    """Shares of a replica it can hold."""
    machine: Machine | None
    clock: Offset | None
    """Against the driver's."""
    weights: Weights | None
    bucket: BucketFacts | None


@dataclass(frozen=True, slots=True)
class Report:
    """A finished preflight."""

    config: JobConfig
    profile: EngineProfile
    nodes: tuple[NodeView, ...]
    measured: tuple[Measured, ...]
    faults: tuple[Fault, ...]
    waits: tuple[str, ...]
    """What an autoscaler will have to add."""
    seconds: float

    @property
    def status(self) -> str:
        """``ok`` or ``faults``."""
        return Outcome.FAULTS if self.faults else Outcome.OK

    @property
    def error(self) -> str | None:
        """The last words on stderr."""
        count = len(self.faults)
        return f"{count} fault{'s' if count > 1 else ''} found" if count else None

    @property
    def exit_code(self) -> ExitCode:
        """0 without a fault, else 1."""
        return ExitCode.FAILED if self.faults else ExitCode.DONE

    def outcome(self, check: Check) -> Outcome:
        """How that check ended."""
        if any(fault.check is check for fault in self.faults):
            return Outcome.FAULTS
        if check is Check.CAPACITY and self.waits:
            return Outcome.WAITS
        if check is Check.GPUS and not self.profile.needs.gpus_per_node:
            return Outcome.NOT_NEEDED
        if check is Check.ALL_REDUCE and not self.measured:
            workers = self.profile.needs.nodes * workers_per_node(self.profile)
            return Outcome.NOT_NEEDED if workers == 1 else Outcome.NOT_DONE
        if check in _OF_REPLICAS and not any(view.replicas for view in self.nodes):
            return Outcome.NOT_DONE
        if check in _OF_MACHINES and any(view.machine is None for view in self.nodes):
            return Outcome.NOT_DONE
        if check is Check.WEIGHTS and not any(view.weights for view in self.nodes):
            return Outcome.NOT_DONE
        return Outcome.OK

    def to_json(self) -> dict[str, Any]:
        """The last line on stdout."""
        told = {
            "status": self.status,
            "profile": self.config.engine.profile,
            "checks": {check.value: self.outcome(check).value for check in Check},
            "faults": [
                {"check": fault.check, "nodes": list(fault.nodes), "message": fault.message}
                for fault in self.faults
            ],
            "waits": list(self.waits),
            "nodes": [_node_json(view) for view in self.nodes],
            "all_reduce": [_group_json(one) for one in self.measured],
            "seconds": self.seconds,
            "exit_code": int(self.exit_code),
        }
        rounded: dict[str, Any] = _rounded(told)
        return rounded

    def show(self) -> None:
        """The table, the groups and the faults, on stderr."""
        console = Console(stderr=True, highlight=False)
        if not console.is_terminal:
            console = Console(stderr=True, highlight=False, width=_PLAIN_WIDTH)
        console.print(self._node_table())
        console.print(self._versions(), markup=False, soft_wrap=True)
        if self.measured:
            console.print(_group_table(self.measured))
        for told in self.waits:
            console.print(f"{Check.CAPACITY}: {told}.", markup=False, soft_wrap=True)
        for fault in self.faults:
            sentence = redacted_text(f"{fault.check}: {fault.sentence}")
            console.print(sentence, markup=False, soft_wrap=True)
        if not self.faults:
            console.print("No fault was found.", style="green")

    def _node_table(self) -> Table:
        table = Table(
            *("node", "address", "replicas", "CPUs", "GPUs", "memory", "/dev/shm"),
            *("clock", "model", "store"),
        )
        for view in self.nodes:
            bad = {fault.check for fault in self.faults if view.node.name in fault.nodes}
            table.add_row(view.node.name, view.node.address, str(view.replicas), *_cells(view, bad))
        return table

    def _versions(self) -> str:
        machines = [view.machine for view in self.nodes if view.machine is not None]
        names = dict.fromkeys(name for machine in machines for name in machine.versions)
        told = []
        for name in names:
            values = dict.fromkeys(m.versions[name] for m in machines if name in m.versions)
            told.append(f"{name} {' / '.join(values)}")
        return f"versions: {', '.join(told)}"


def _cells(view: NodeView, bad: set[Check]) -> list[str]:
    """The node's values, those with a fault marked."""
    node, machine = view.node, view.machine
    cells = {
        None: f"{node.capacity.cpus:g} ({node.held_cpus:g} held)",
        Check.GPUS: f"{node.capacity.gpus} ({node.held_gpus:g} held)"
        if node.capacity.gpus
        else "-",
        Check.MEMORY: f"{machine.memory.available_gib:.1f}/{machine.memory.total_gib:.1f} GiB"
        if machine
        else "?",
        Check.SHARED_MEMORY: f"{machine.memory.shared_gib:.1f} GiB"
        if machine and machine.memory.shared_gib is not None
        else "?",
        Check.CLOCKS: f"{view.clock.seconds * 1000:+.1f} ms" if view.clock else "?",
        Check.WEIGHTS: _model(view.weights),
        Check.BUCKET: "read, written" if view.bucket else "?",
    }
    return [
        f"[red]✗ {escape(text)}[/red]" if check in bad else escape(text)
        for check, text in cells.items()
    ]


def _model(weights: Weights | None) -> str:
    if weights is None:
        return "-"
    if not weights.folder:
        return "absent"
    hashed = len(weights.files) - weights.unhashed
    return f"{_amount(weights.size)}, {hashed}/{len(weights.files)} hashed"


def _group_table(measured: tuple[Measured, ...]) -> Table:
    sizes = [one.size for one in max((m.bandwidths for m in measured), key=len)]
    table = Table("all-reduce", "backend", "processes", *(f"{_bytes(size)}" for size in sizes))
    for one in measured:
        cells = [
            f"{each.bus_gb_s:.2f} GB/s, {each.seconds * 1e3:.2f} ms" for each in one.bandwidths
        ]
        missing = ["not measured"] * (len(sizes) - len(cells))
        group = one.group
        table.add_row(", ".join(group.names), group.backend, str(group.world), *cells, *missing)
    return table


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _bytes(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


def _rounded(value: Any) -> Any:
    """A copy whose fractions have four significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_SIGNIFICANT}g}") if isinstance(value, float) else value


def _node_json(view: NodeView) -> dict[str, Any]:
    node, machine, weights = view.node, view.machine, view.weights
    return {
        "name": node.name,
        "address": node.address,
        "replicas": view.replicas,
        "cpus": node.capacity.cpus,
        "cpus_held": node.held_cpus,
        "gpus": node.capacity.gpus,
        "gpus_held": node.held_gpus,
        "accelerator": node.capacity.accelerator,
        "gpus_seen": [gpu.kind for gpu in machine.gpus.gpus] if machine else None,
        "memory": asdict(machine.memory) if machine else None,
        "versions": machine.versions if machine else None,
        "clock": asdict(view.clock) if view.clock else None,
        "store_clock": asdict(view.bucket.clock) if view.bucket and view.bucket.clock else None,
        "model": {
            "folder": weights.folder,
            "files": len(weights.files),
            "bytes": weights.size,
            "hashed": len(weights.files) - weights.unhashed,
            "vouched": weights.vouched,
        }
        if weights
        else None,
    }


def _group_json(one: Measured) -> dict[str, Any]:
    return {
        "nodes": list(one.group.names),
        "backend": one.group.backend,
        "processes": one.group.world,
        "bus_gb_s": one.best_gb_s,
        "sizes": [asdict(each) for each in one.bandwidths],
    }
