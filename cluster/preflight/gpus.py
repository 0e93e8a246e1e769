"""GPUs and their driver: as many, as large and as free as a replica needs, and usable by torch.

In: what nvidia-smi and torch say on each node. Out: faults. Where the profile needs no GPU, nothing
is asked.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.preflight.crew import Node
from cluster.preflight.findings import Check, Fault, shared
from pipeline.profile import EngineProfile
from pipeline.redact import redacted_text

_SMI_S = 30.0  # a driver that was idle takes some seconds
_TORCH_S = 90.0  # to import torch from a slow disk
_FIELDS = "name,memory.total,memory.used,driver_version,ecc.errors.uncorrected.volatile.total"
_MIB = 2**20
_GIB = 2**30
_TORCH = """\
import json, torch
told = {"cuda": torch.version.cuda or "none", "count": 0, "nccl": "none", "error": ""}
try:
    torch.cuda.init()
    told["count"] = torch.cuda.device_count()
    told["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
except (RuntimeError, AssertionError) as error:
    told["error"] = str(error).splitlines()[0]
print(json.dumps(told))
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi tells of it."""

    kind: str
    memory_bytes: int
    used_bytes: int
    driver: str
    ecc_errors: int
    """Uncorrected memory errors since the driver was loaded."""


@dataclass(frozen=True, slots=True)
class Torch:
    """What the installed torch makes of the driver."""

    cuda: str
    """CUDA version it was built for."""
    nccl: str
    count: int
    """GPUs it can use."""
    error: str = ""
    """Why it can use none."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The GPUs of one node."""

    gpus: tuple[Gpu, ...] = ()
    torch: Torch | None = None
    """None: there is no GPU to ask it about."""
    problem: str = ""
    """Why the driver did not tell of any."""

    @property
    def versions(self) -> dict[str, str]:
        """What must be the same on all nodes with GPUs."""
        found = {"nvidia driver": self.gpus[0].driver} if self.gpus else {}
        if self.torch is not None:
            found |= {"cuda": self.torch.cuda, "nccl": self.torch.nccl}
        return found


def look_at_gpus() -> GpuFacts:
    """The GPUs of this node."""
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S)
    except FileNotFoundError:
        return GpuFacts(problem="nvidia-smi is not installed")
    except (OSError, subprocess.TimeoutExpired) as error:
        return GpuFacts(problem=redacted_text(f"nvidia-smi gives no answer ({error})"))
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        return GpuFacts(problem=redacted_text(f"nvidia-smi fails ({said})"))
    gpus = parse_gpus(done.stdout)
    return GpuFacts(gpus, _ask_torch() if gpus else None)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The GPUs of nvidia-smi's CSV; a GPU without ECC has no errors."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    return tuple(
        Gpu(
            kind=name,
            memory_bytes=int(total) * _MIB,
            used_bytes=int(used) * _MIB,
            driver=driver,
            ecc_errors=int(errors) if errors.isdecimal() else 0,
        )
        for name, total, used, driver, errors in rows
    )


def judge_gpus(
    profile: EngineProfile, found: Mapping[Node, GpuFacts], holding: Sequence[Node]
) -> list[Fault]:
    """Faults of the nodes' GPUs.

    Args:
        profile: says what a replica needs.
        found: the facts of each node.
        holding: the nodes that can hold a share of a replica.
    """
    if not profile.needs.gpus_per_node:
        return []
    told = (
        (node.name, message)
        for node, facts in found.items()
        for message in (
            _wrong(node, facts, profile) if node in holding else _uncounted(node, facts, profile)
        )
    )
    return shared(Check.GPUS, told)


def _uncounted(node: Node, facts: GpuFacts, profile: EngineProfile) -> Iterator[str]:
    """Of a node that Ray keeps out, though it has GPUs."""
    seen, counted = len(facts.gpus), node.capacity.gpus
    if seen > counted and counted < profile.needs.gpus_per_node:
        yield (
            f"the driver shows {seen} GPUs and Ray counts {counted}; start Ray there with "
            f"`--num-gpus={seen}`, and without CUDA_VISIBLE_DEVICES"
        )


def _wrong(node: Node, facts: GpuFacts, profile: EngineProfile) -> Iterator[str]:
    counted = node.capacity.gpus
    if facts.problem:
        yield f"{facts.problem}, though Ray counts {counted} GPUs; mend the driver"
        return
    if len(facts.gpus) < counted:
        yield (
            f"Ray counts {counted} GPUs and the driver shows {len(facts.gpus)}; look for Xid "
            "errors in the kernel's log, and reset or replace the machine"
        )
    yield from _unusable(facts)
    yield from _unfit(facts, profile)
    for index, gpu in enumerate(facts.gpus):
        if gpu.ecc_errors:
            yield (
                f"GPU {index} has {gpu.ecc_errors} uncorrected memory errors; reset it, and "
                "replace it if they come back"
            )
    if not node.held_gpus:
        yield from _taken(facts, profile)


def _unusable(facts: GpuFacts) -> Iterator[str]:
    torch = facts.torch
    if torch is None or (not torch.error and torch.count >= len(facts.gpus)):
        return
    reason = torch.error or f"it finds {torch.count} of {len(facts.gpus)}"
    yield (
        f"torch (CUDA {torch.cuda}) cannot use the GPUs with driver {facts.gpus[0].driver}: "
        f"{reason}; install the driver that this CUDA asks for, and the project's gpu extra"
    )


def _unfit(facts: GpuFacts, profile: EngineProfile) -> Iterator[str]:
    kinds = sorted({gpu.kind for gpu in facts.gpus})
    if len(kinds) > 1:
        yield f"its GPUs are of several kinds ({', '.join(kinds)}); replicas need equal ones"
    least_gb = profile.kv_cache.gpu_gb if profile.kv_cache else 0
    small = [gpu for gpu in facts.gpus if gpu.memory_bytes < least_gb * 1e9]
    if small:
        has = f"{small[0].kind} has {small[0].memory_bytes / 1e9:.0f} GB of memory"
        yield f"{has} and the profile counts on {least_gb:g} GB; take a profile for this GPU"


def _taken(facts: GpuFacts, profile: EngineProfile) -> Iterator[str]:
    """vLLM refuses to start where less than its share of the memory is free."""
    taken = [
        f"GPU {index} has {(gpu.memory_bytes - gpu.used_bytes) / _GIB:.0f} of "
        f"{gpu.memory_bytes / _GIB:.0f} GiB free"
        for index, gpu in enumerate(facts.gpus)
        if gpu.memory_bytes - gpu.used_bytes < profile.gpu_share * gpu.memory_bytes
    ]
    if taken:
        yield (
            f"{', '.join(taken)}, and the engine takes {profile.gpu_share:.0%}; Ray has given none "
            "of them away: end the processes that nvidia-smi lists"
        )


def _ask_torch() -> Torch:
    """In a process of its own: torch's hold on a GPU must not outlive the question."""
    environment = dict(os.environ)
    if not environment.get("CUDA_VISIBLE_DEVICES", "all"):
        del environment["CUDA_VISIBLE_DEVICES"]  # Ray's word to a process that holds no GPU
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH],
            capture_output=True,
            text=True,
            timeout=_TORCH_S,
            env=environment,
        )
        return Torch(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Torch("unknown", "unknown", 0, f"no answer within {_TORCH_S:g} s")
    except (IndexError, ValueError, TypeError):
        said = done.stderr.strip().splitlines()
        return Torch("unknown", "unknown", 0, redacted_text(said[-1] if said else "it crashed"))
