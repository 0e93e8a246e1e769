"""What a machine computes with: its processor and GPUs by name, for records and measurements, and
how many CPUs this process may use."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIPS = Path("/proc/self/cgroup")
_ASK_S = 20.0  # a driver that was idle takes some seconds


def hardware() -> str:
    """GPUs by kind, or where there are none, the processor; the same text for the same kind."""
    kinds = Counter(gpus())
    if kinds:
        return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    return f"{os.cpu_count()} x {cpu_model()}"


def usable_cpus(groups: Path = _CGROUPS, memberships: Path = _MEMBERSHIPS) -> int:
    """CPUs this process may use at a time: its affinity, and the quotas of its control groups."""
    quotas = _cpu_quotas(groups, memberships.read_text() if memberships.exists() else "")
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)]))


def _cpu_quotas(groups: Path, memberships: str) -> Iterator[float]:
    """Quotas, in CPUs, of the process's groups and those above them; a container sees its own
    group as the root."""
    for line in memberships.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = groups / controllers
        here = base / group.lstrip("/")
        for folder in (here, *here.parents[: len(here.parts) - len(base.parts)]):
            quota, period = _first_version(folder) if controllers else _second_version(folder)
            if quota.isdigit() and period.isdigit():  # else "max", "-1" or no such file
                yield int(quota) / int(period)


def _first_version(folder: Path) -> tuple[str, str]:
    return _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")


def _second_version(folder: Path) -> tuple[str, str]:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return quota, period


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def gpus() -> list[str]:
    """The NVIDIA GPUs by name and memory; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ASK_S)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
