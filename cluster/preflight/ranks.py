"""Runs one node's processes of an all-reduce, and reads what they say.

In: a ``Part``, the node's share of a group. Out: how far each rank came and what it measured. The
processes are stopped at the latest when ``Pace`` says, however they hang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO

from cluster.ports import free_ports
from pipeline.redact import redacted_text

RANK_SCRIPT = Path(__file__).with_name("rank.py")
_POLL_S = 0.05
_GLOO_SIZES = (2**16, 2**20, 2**24)
_NCCL_SIZES = (2**16, 2**22, 2**28)


class Stage(IntEnum):
    """How far a rank came."""

    SILENT = 0
    STARTING = 1
    JOINING = 2
    JOINED = 3
    REDUCING = 4
    DONE = 5


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a rank waits for the others, and how often it measures."""

    start_s: float = 60.0
    """To import torch, from a slow disk or on a busy machine."""
    join_s: float = 60.0
    """For all to have started."""
    reduce_s: float = 30.0
    """For one all-reduce: a hundred times what the largest takes on a slow network."""
    warmups: int = 2
    repeats: int = 10

    @property
    def most_s(self) -> float:
        """From the start of the processes to their end, whatever happens."""
        return self.start_s + self.join_s + self.reduce_s


@dataclass(frozen=True, slots=True)
class Part:
    """What one node does in a group; picklable."""

    ranks: tuple[int, ...]
    world: int
    backend: str
    """nccl, or gloo."""
    address: str
    """Of the node with rank 0, where all meet."""
    port: int
    env: Mapping[str, str]
    """What the profile sets for the engine's processes."""
    pace: Pace


@dataclass(frozen=True, slots=True)
class Timing:
    """All-reduces of one size as one rank saw them."""

    size: int
    """Bytes."""
    seconds: float
    """Each took, on average."""
    right: bool
    """Whether the sum was."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """What became of one rank."""

    rank: int
    stage: Stage
    timings: tuple[Timing, ...] = ()
    error: str = ""
    """The last line it wrote to stderr, without secrets."""


def free_port() -> int:
    """A port of this node for the group to meet at."""
    return free_ports(1)[0]


def run_part(part: Part) -> tuple[RankReport, ...]:
    """Run the node's ranks to their end, or to that of ``part.pace``."""
    with ExitStack() as stack:
        running = [stack.enter_context(_rank(part, index)) for index in range(len(part.ranks))]
        until = time.monotonic() + part.pace.most_s
        while time.monotonic() < until and any(one.process.poll() is None for one in running):
            time.sleep(_POLL_S)
        return tuple(_report(rank, one) for rank, one in zip(part.ranks, running, strict=True))


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]


@contextmanager
def _rank(part: Part, index: int) -> Iterator[_Running]:
    """A rank's process, which is gone afterwards."""
    task = {
        "rank": part.ranks[index],
        "world": part.world,
        "backend": part.backend,
        "device": index,
        "address": part.address,
        "port": part.port,
        "sizes": _NCCL_SIZES if part.backend == "nccl" else _GLOO_SIZES,
        "join_s": part.pace.join_s,
        "reduce_s": part.pace.reduce_s,
        "warmups": part.pace.warmups,
        "repeats": part.pace.repeats,
    }
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-P", str(RANK_SCRIPT), json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **part.env},
        )
        try:
            yield _Running(process, out, err)
        finally:
            process.kill()
            process.wait()


def _report(rank: int, running: _Running) -> RankReport:
    stage, timings = Stage.SILENT, []
    for line in _lines(running.out):
        told = json.loads(line)
        if "stage" in told:
            stage = Stage[told["stage"].upper()]
        else:
            timings.append(Timing(told["bytes"], told["seconds"], told["right"]))
    last = (_lines(running.err) or [""])[-1]
    error = redacted_text(last.strip()) if stage is not Stage.DONE else ""
    return RankReport(rank, stage, tuple(timings), error)


def _lines(file: IO[bytes]) -> list[str]:
    """What is there of whole lines."""
    file.seek(0)
    return file.read().decode(errors="replace").rpartition("\n")[0].splitlines()
