"""What the driver's process holds of a run with many shards, measured on the code that runs.

``python -m cluster.simulation.memory SHARDS``: one JSON object with MiB resident. A process by
itself, as its peak is what counts.

In: a number of shards of one row each. Done is what a resume does of a run that is half done: plan,
save, load, find what is left, and fold parts. Not in it are Ray, whose datasets are as large as a
window of shards, and the parts of the store's listings, which are read by the page.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib import import_module

from pipeline.commit import summarize
from pipeline.plan import InputFile, Plan, make_plan
from pipeline.records import Completion
from pipeline.run import Run
from pipeline.totals import Sums

_DRIVER = ("jobs.batch", "pipeline.flow")
"""Modules that a driver has imported, and the measuring process alone."""
_FILES = 100
_FOLDED = 20_000
"""Parts that are folded, over all shards: their number leaves no trace in the memory."""
_KIB_PER_MIB = 1024


@dataclass(frozen=True)
class DriverMemory:
    """Peaks of the resident memory, in MiB."""

    shards: int
    imports_mib: int
    """Of the program before it does anything."""
    peak_mib: int


def measure_memory(shards: int) -> DriverMemory:
    """Measure it in a process of its own."""
    command = [sys.executable, "-m", "cluster.simulation.memory", str(shards)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return DriverMemory(**json.loads(done.stdout))


def _measure(shards: int) -> DriverMemory:
    for module in _DRIVER:
        import_module(module)
    before = _peak_mib()
    rows = shards // _FILES
    files = [InputFile(f"s3://b/in/{n}.parquet", rows, "e", rows, rows) for n in range(_FILES)]
    text = make_plan(files, shard_rows=1, shard_bytes=1, replicas=64).to_json()
    plan = Plan.from_json(text)
    done = frozenset(range(0, len(plan.shards), 2))
    run = Run("s3://b/run", {"id": "r"}, plan, done, exists=True, finished=False)
    assert len(run.pending) == len(plan.shards) // 2
    _fold(plan)
    return DriverMemory(len(plan.shards), before, _peak_mib())


def _fold(plan: Plan) -> None:
    completion = Completion(0, "row-0", 0, "Yes.", "stop", 100, 2, 0, 0, 1, 1.0)
    part = summarize(plan.shards[0], [completion], 1.0, "run")
    sums = Sums()
    for shard in range(0, len(plan.shards), max(1, len(plan.shards) // _FOLDED)):
        sums.add(replace(part, shard=shard))
    sums.totals()


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // _KIB_PER_MIB


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_measure(int(sys.argv[1])))) + "\n")
