"""The real pipeline, on real Ray and engines that sleep by a known curve, beside the model.

In: a number of replicas. Out: seconds from the first admission to the last completion, as they
were and as the model says for the same rows, the run's own plan and the moments its engines were
ready. A second pair of runs, on engines that answer at once, tells what a shard costs the driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

from cluster.simulation.cluster import ClusterSpec, StoreModel, simulate
from cluster.simulation.paced import INSTANT, PACED
from cluster.simulation.policies import PIPELINE, row_ranges
from cluster.simulation.workload import Workload
from pipeline.plan import Plan

_ROWS_PER_REPLICA = 600
_SHARD_ROWS = 64
_MEDIAN_COMPLETION = 60
_MOST_COMPLETION = 400
_MEDIAN_PROMPT = 120
_SIGMA = 0.8
_TIMEOUT_S = 600
_LOCAL_STORE = StoreModel(median_s=0.003, slow_share=0.0)
_LOCAL_DRIVER_S = 0.03


@dataclass(frozen=True)
class Validation:
    """One real run and its twin."""

    replicas: int
    rows: int
    shards: int
    real_s: float
    """From the first admission to the last completion."""
    simulated_s: float

    @property
    def ratio(self) -> float:
        """Simulated / real."""
        return self.simulated_s / self.real_s


@dataclass(frozen=True)
class DriverCost:
    """What a shard costs where engines answer at once, by the difference of two runs."""

    shards: tuple[int, int]
    cpu_s: float
    """CPU seconds of the driver's process per shard."""
    wall_s: float
    """Seconds per shard, of all that is not the engine, on this machine."""


def validate(replicas: int, seed: int) -> Validation:
    """Run both.

    Raises:
        RuntimeError: the real run did not succeed.
    """
    rows = _ROWS_PER_REPLICA * replicas
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_input(folder, rows, seed)
        _run(folder, PACED.name, replicas, _SHARD_ROWS)
        logs = [_read_log(path) for path in sorted(folder.glob("*.log"))]
        workload = _workload(folder)
        plan = Plan.from_json((folder / "out" / "_plan.json").read_bytes())
    first = min(log["first"] for log in logs if "first" in log)
    began = min(log["ready"] for log in logs)
    spec = ClusterSpec(
        replicas=replicas,
        engine=PACED,
        store=_LOCAL_STORE,
        prepare_cpus=1,
        driver_s=_LOCAL_DRIVER_S,
        ready_s=tuple(sorted(log["ready"] - began for log in logs)),
        seed=seed,
    )
    shards = row_ranges(plan)
    twin = simulate(spec, workload, replace(PIPELINE, cut=lambda *_: shards))
    return Validation(
        replicas=replicas,
        rows=rows,
        shards=len(shards),
        real_s=max(log["done"] for log in logs if "done" in log) - first,
        simulated_s=twin.last_completion - twin.first_admission,
    )


def measure_driver(shards: tuple[int, int] = (50, 400), *, seed: int = 0) -> DriverCost:
    """What the driver spends per shard.

    Raises:
        RuntimeError: a run did not succeed.
    """
    cpu, wall = zip(*(_instant_run(count, seed) for count in shards), strict=True)
    more = shards[1] - shards[0]
    return DriverCost(shards, (cpu[1] - cpu[0]) / more, (wall[1] - wall[0]) / more)


def _instant_run(shards: int, seed: int) -> tuple[float, float]:
    """CPU seconds of the driver, and seconds from the first admission to the last completion."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_input(folder, shards * 4, seed, files=shards)
        _run(folder, INSTANT.name, 1, 4)
        (log,) = (_read_log(path) for path in folder.glob("*.log"))
        return float((folder / "driver_cpu_s").read_text()), log["done"] - log["first"]


def _write_input(folder: Path, rows: int, seed: int, files: int = 1) -> None:
    dice = np.random.default_rng(seed)
    completion = _MEDIAN_COMPLETION * np.exp(_SIGMA * dice.standard_normal(rows))
    prompt = _MEDIAN_PROMPT * np.exp(_SIGMA * dice.standard_normal(rows))
    tokens = np.clip(completion, 1, _MOST_COMPLETION).astype(int).tolist()
    letters = np.clip(prompt, 1, 2000).astype(int).tolist()
    table = pa.table(
        {
            "prompt": [
                "".join(map(chr, dice.integers(ord("a"), ord("z") + 1, count))) for count in letters
            ],
            "sampling": [json.dumps({"max_completion_tokens": count}) for count in tokens],
        }
    )
    (folder / "in").mkdir()
    size = rows // files
    for number in range(files):
        part = table.slice(number * size, size)
        pq.write_table(part, folder / "in" / f"{number:04d}.parquet")


def _run(folder: Path, engine: str, replicas: int, shard_rows: int) -> None:
    config = {
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "engine": {"profile": "mini-maverick-tp1", "replicas": replicas},
        "limits": {"shard_rows": shard_rows},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.simulation.paced", "--config", str(folder / "job.yaml")],
        env={**environment, "PACED_ENGINE": engine, "PACED_ENGINE_FOLDER": str(folder)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"the real run ended with {done.returncode}: {done.stderr[-2000:]}")


def _read_log(path: Path) -> dict[str, float]:
    """When the engine was ready, got its first request, and answered last."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {what: float(when) for what, when in lines}


def _workload(folder: Path) -> Workload:
    """The rows as they were, in input order."""
    columns = ["input_row", "prompt_tokens", "completion_tokens"]
    table = ds.dataset(folder / "out" / "data").to_table(columns=columns).sort_by("input_row")
    completion = _numbers(table, "completion_tokens")
    prompt = _numbers(table, "prompt_tokens")
    return Workload("validation", prompt=prompt, completion=completion, limit=completion)


def _numbers(table: pa.Table, column: str) -> Any:
    return table.column(column).to_numpy()
