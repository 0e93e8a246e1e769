"""What a machine computes with: its processor and GPUs by name, for records and measurements."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_ASK_S = 20.0  # a driver that was idle takes some seconds


def hardware() -> str:
    """GPUs by kind, or where there are none, the processor; the same text for the same kind."""
    kinds = Counter(gpus())
    if kinds:
        return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    return f"{os.cpu_count()} x {cpu_model()}"


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
