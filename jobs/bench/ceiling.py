"""The pipeline's own ceiling: ``jobs.nightly`` with an engine that answers at once.

``python -m jobs.bench.ceiling --workload text|images|memory [--rows N] [--out FOLDER]``

text, images: rows per second in the steady state (from the first part to the last), and CPU seconds
per 1,000 rows by step, as the slope between two sizes, so that start-up drops out. The sum of the
steps is compared with what the operating system counts for all processes. memory: one long run, the
resident memory of each kind of process over time, and its slope. Writes JSON, and for memory a
plot. Runs on local files and a Ray of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from PIL import Image

from pipeline.cpu import Step

_SAMPLE_S = 0.5
_FILE_ROWS = {"text": 50_000, "images": 1_000}
_JPEG_BYTES = 50_000
_JPEG_SIDES = (512, 384)  # pixels
_DISTINCT_IMAGES = 32
_WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as")
_MIB = 2**20
_TASKS = ("ray::IDLE", "ray::Read")
"""How the titles of processes begin that read and prepare: Ray's actors have their class's name."""
_WARM_UP = 0.25
"""Share of a memory run after which memory should no longer grow."""


class Workload(StrEnum):
    """What is run."""

    TEXT = "text"
    IMAGES = "images"
    MEMORY = "memory"


_ROWS = {Workload.TEXT: 100_000, Workload.IMAGES: 4_000, Workload.MEMORY: 1_000_000}
_PROFILES = {
    Workload.TEXT: "smollm2",
    Workload.IMAGES: "mini-maverick-tp1",
    Workload.MEMORY: "smollm2",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """One look at the processes of a run, by kind of process."""

    seconds: float
    """Since the run's start."""
    cpu_s: Mapping[str, float]
    """Since each process's start; of processes that ended, what they had at the last look."""
    private_mib: Mapping[str, float]
    """Resident and not shared."""
    object_store_mib: float
    """What the raylet has mapped of it."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the job was seen to take."""

    rows: int
    rows_per_s: float
    """From the first part committed to the last."""
    report_cpu_s: Mapping[str, float]
    usage: tuple[Usage, ...]

    @property
    def cpu_s(self) -> Mapping[str, float]:
        """Of all processes by kind, at the last look."""
        return self.usage[-1].cpu_s


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, print and write what was seen."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.ceiling", description="What the pipeline itself costs."
    )
    parser.add_argument("--workload", type=Workload, choices=list(Workload), required=True)
    parser.add_argument("--rows", type=int, help="default: 100,000 text, 4,000 images, 1,000,000")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results")
    arguments = parser.parse_args(argv)
    workload: Workload = arguments.workload
    rows = arguments.rows or _ROWS[workload]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ceiling-") as folder:
        measure = _memory if workload is Workload.MEMORY else _cost
        found = measure(workload, rows, Path(folder), arguments.out)
    document = {"workload": workload, "rows": rows, "cores": os.cpu_count(), **found}
    target = arguments.out / f"ceiling-{workload}.json"
    target.write_text(json.dumps(document, indent=2) + "\n")
    sys.stdout.write(json.dumps({k: v for k, v in document.items() if k != "samples"}, indent=2))
    sys.stdout.write(f"\n{target}\n")
    return 0


def _cost(workload: Workload, rows: int, folder: Path, _out: Path) -> dict[str, Any]:
    """Rows per second, and CPU per 1,000 rows by step, from a run of ``rows`` and a quarter."""
    small = run_null(workload, rows // 4, folder / "small")
    large = run_null(workload, rows, folder / "large")
    return {"rows_per_s": round(large.rows_per_s, 1), **cpu_per_1000(small, large)}


def cpu_per_1000(small: Run, large: Run) -> dict[str, Any]:
    """CPU seconds per 1,000 rows: each step's, the processes without steps, and the whole."""
    steps = _slope(small, large, small.report_cpu_s, large.report_cpu_s)
    start = steps.pop(Step.START)  # once per process: no cost of rows
    processes = _slope(small, large, small.cpu_s, large.cpu_s)
    processes["workers"] -= start
    whole = sum(processes.values())
    outside = {kind: processes.get(kind, 0.0) for kind in ("driver", "ray services")}
    known = sum(steps.values()) + sum(outside.values())
    return {
        "cpu_s_per_1000_rows": _rounded({**steps, **outside, "unaccounted": whole - known}),
        "processes": _rounded(processes),
        "whole": round(whole, 4),
        "accounted": round(known / whole, 3),
    }


def _slope(
    small: Run, large: Run, of_small: Mapping[str, float], of_large: Mapping[str, float]
) -> dict[str, float]:
    thousands = (large.rows - small.rows) / 1000
    return {
        key: (of_large[key] - of_small.get(key, 0.0)) / thousands
        for key in sorted(of_large, key=_order)
    }


def _order(key: str) -> tuple[int, str]:
    steps = [str(step) for step in Step]
    return (steps.index(key) if key in steps else len(steps), key)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


def _memory(workload: Workload, rows: int, folder: Path, out: Path) -> dict[str, Any]:
    """Resident memory over one run, and what it grows by per 100,000 rows after the warm-up."""
    run = run_null(workload, rows, folder / "memory")
    first, last = run.usage[0].seconds, run.usage[-1].seconds
    settled = [u for u in run.usage if u.seconds >= first + _WARM_UP * (last - first)]
    kinds = sorted({kind for usage in run.usage for kind in usage.private_mib})
    rows_per_s = rows / (last - first)
    series = {kind: [u.private_mib.get(kind, 0.0) for u in settled] for kind in kinds}
    series["object store"] = [u.object_store_mib for u in settled]
    seconds = [u.seconds for u in settled]
    _plot(run, kinds, out / "ceiling-memory.svg")
    return {
        "rows_per_s": round(run.rows_per_s, 1),
        "peak_mib": _rounded({kind: max(values) for kind, values in series.items()}),
        "mib_per_100k_rows": _rounded(
            {
                kind: float(np.polyfit(seconds, values, 1)[0]) / rows_per_s * 100_000
                for kind, values in series.items()
            }
        ),
        "samples": [
            {
                "seconds": round(u.seconds, 1),
                **_rounded(u.private_mib),
                "object store": round(u.object_store_mib, 1),
            }
            for u in run.usage
        ],
    }


def _plot(run: Run, kinds: Sequence[str], target: Path) -> None:
    """The run's memory by kind of process over time, as an SVG."""
    from matplotlib.figure import Figure  # a benchmark's own dependency

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    seconds = [usage.seconds for usage in run.usage]
    for kind in kinds:
        axes.plot(seconds, [u.private_mib.get(kind, 0.0) for u in run.usage], label=kind)
    axes.plot(seconds, [u.object_store_mib for u in run.usage], label="object store", linestyle=":")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("resident memory, MiB")
    axes.set_title(f"{run.rows:,} text rows through a null engine")
    axes.legend()
    figure.savefig(target)


def run_null(workload: Workload, rows: int, folder: Path) -> Run:
    """Make ``rows`` rows, and run the job on them with the null engine, watching its processes.

    Raises:
        RuntimeError: the job failed; its log is in the message.
    """
    source, target = folder / "input", folder / "run"
    source.mkdir(parents=True)
    write_rows(workload, rows, source)
    config = {
        "name": f"ceiling-{workload}",
        "input": {"uri": str(source)},
        "output": {"uri": str(target)},
        "sampling": {"temperature": 0.0, "max_completion_tokens": 16},
        "engine": {"profile": _PROFILES[workload]},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    log = folder / "log.txt"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.bench.null_engine", "--config", str(path)]
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, stdout=sink, stderr=sink, env=environment) as job,
    ):
        usage = tuple(_watch(job))
    if job.returncode != 0:
        raise RuntimeError(f"the job ended with {job.returncode}: {log.read_text()[-4000:]}")
    report = json.loads((target / "report.json").read_text())
    return Run(rows, _steady_rate(target / "data"), report["cpu_s"], usage)


def _steady_rate(data: Path) -> float:
    """Rows per second between the first part's commit and the last's."""
    parts = sorted(data.glob("part-*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    seconds = (parts[-1].stat().st_mtime_ns - parts[0].stat().st_mtime_ns) / 1e9
    rows = sum(int(pq.read_metadata(part).num_rows) for part in parts[1:])
    return rows / seconds


def _watch(job: subprocess.Popen[bytes]) -> Iterator[Usage]:
    """Look at the job and its descendants until it ends."""
    started = time.monotonic()
    root = psutil.Process(job.pid)
    kinds: dict[int, str] = {}
    spent: dict[int, float] = {}
    while job.poll() is None:
        private: defaultdict[str, float] = defaultdict(float)
        store = 0.0
        for process in _family(root):
            try:
                with process.oneshot():
                    kind = kinds[process.pid] = _kind(process, root.pid)
                    times, memory = process.cpu_times(), process.memory_info()
                    name = process.name()
            except psutil.Error:  # it has just ended
                continue
            spent[process.pid] = times.user + times.system
            private[kind] += (memory.rss - memory.shared) / _MIB
            if name == "raylet":
                store = memory.shared / _MIB
        cpu: defaultdict[str, float] = defaultdict(float)
        for pid, seconds in spent.items():
            cpu[kinds[pid]] += seconds
        yield Usage(time.monotonic() - started, dict(cpu), dict(private), store)
        time.sleep(_SAMPLE_S)


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _kind(process: psutil.Process, driver: int) -> str:
    """Which part a process has, by the title Ray gives it."""
    title = " ".join(process.cmdline())
    if process.pid == driver or title.startswith("ray::Roster"):
        return "driver"
    if "ReplicaActor" in title:
        return "replica"
    return "workers" if title.startswith(_TASKS) else "ray services"


def write_rows(workload: Workload, rows: int, folder: Path) -> None:
    """The input: ``rows`` prompts of some 40 words, or with an image of 50 KB each."""
    images = workload is Workload.IMAGES
    per_file = _FILE_ROWS["images" if images else "text"]
    generator = np.random.default_rng(20261122)
    pictures = [_jpeg(generator) for _ in range(_DISTINCT_IMAGES)] if images else []
    for first in range(0, rows, per_file):
        numbers = range(first, min(first + per_file, rows))
        words = generator.integers(0, len(_WORDS), (len(numbers), 40))
        columns: dict[str, Any] = {
            "custom_id": [f"row-{number}" for number in numbers],
            "prompt": [" ".join(_WORDS[i] for i in row) for row in words],
        }
        if images:
            columns["images"] = [[pictures[number % len(pictures)]] for number in numbers]
        pq.write_table(pa.table(columns), folder / f"rows-{first:09d}.parquet")


def _jpeg(generator: np.random.Generator) -> bytes:
    """A picture whose JPEG has about 50 KB: a smooth one, with noise on it."""
    width, height = _JPEG_SIDES
    coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise: NDArray[np.int16] = generator.integers(-24, 25, smooth.shape, dtype=np.int16)
    picture = Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))
    encoded = [_encoded(picture, quality) for quality in range(20, 96, 5)]
    return min(encoded, key=lambda data: abs(len(data) - _JPEG_BYTES))


def _encoded(picture: Image.Image, quality: int) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


if __name__ == "__main__":
    sys.exit(main())
