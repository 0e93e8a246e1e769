"""Versions, which must be the same everywhere: tasks and actors pass pickles, and replicas kernels.

In: what is installed on each node. Out: faults, one per package that differs.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from cluster.preflight.findings import Check, Fault
from pipeline.engine_spec import engine_version
from pipeline.profile import REPO_ROOT

_PACKAGES = ("ray", "torch", "transformers", "pyarrow")
_OWN_FOLDERS = ("pipeline", "jobs", "cluster")
_CODE_DIGITS = 12
ABSENT = "not installed"


def installed() -> dict[str, str]:
    """Versions by name, of this node; ``code`` stands for this project's own sources."""
    return {
        "python": platform.python_version(),
        "vllm": engine_version(),
        **{package: _version(package) for package in _PACKAGES},
        "code": _code(),
    }


def judge_versions(found: Mapping[str, Mapping[str, str]]) -> list[Fault]:
    """Faults of versions by node name; a name that a node does not have at all is not compared."""
    names = dict.fromkeys(name for versions in found.values() for name in versions)
    return [fault for name in names if (fault := _compare(name, found)) is not None]


def _compare(name: str, found: Mapping[str, Mapping[str, str]]) -> Fault | None:
    nodes: dict[str, list[str]] = {}
    for node, versions in found.items():
        if name in versions:
            nodes.setdefault(versions[name], []).append(node)
    if len(nodes) == 1:
        return None if ABSENT not in nodes else _absent(name, nodes[ABSENT])
    told = "; ".join(f"{version} on {', '.join(names)}" for version, names in nodes.items())
    fewest = min(len(names) for names in nodes.values())
    odd = tuple(node for names in nodes.values() if len(names) == fewest for node in names)
    return Fault(Check.VERSIONS, odd, f"{name} is not the same everywhere: {told}; {_remedy(name)}")


def _absent(name: str, nodes: list[str]) -> Fault:
    return Fault(Check.VERSIONS, tuple(nodes), f"{name} is {ABSENT}; {_remedy(name)}")


def _remedy(name: str) -> str:
    if name == "code":
        return "check the same commit out on every node, or submit with `--working-dir .`"
    if name in ("nvidia driver", "cuda", "nccl"):
        return "install the same driver and the same torch on every node"
    return "run `python3.11 cluster/install.py` of the same commit on every node"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def _code() -> str:
    """A digest of this project's modules as they lie on this node, by path and content."""
    digest = hashlib.sha256()
    for folder in _OWN_FOLDERS:
        for path in sorted((REPO_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(REPO_ROOT)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:_CODE_DIGITS]
