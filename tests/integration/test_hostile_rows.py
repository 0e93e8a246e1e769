"""Hostile, broken and odd rows through the whole job, with the real engine: each ends as it should,
the good rows between them are as if alone, memory stays bounded, and no secret gets out.

Not covered here: web servers that mean harm (the tests of fetching have some).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from tests.hostile import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, PLANTED, Case, cases
from tests.variables import without_ray

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

NEIGHBOUR = "Count to 3."
ANSWER = "1 2 3"
MOST_MEMORY = 1_500 * 2**20
"""Peak of any process besides the engine's, bytes: Python with transformers takes a third of it."""
STATUSES = ("succeeded", "errored", "expired", "cancelled")
SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("sampling", pa.string()),
    ]
)


@dataclass(frozen=True)
class Run:
    """What the job left behind."""

    cases: list[Case]
    exit_code: int
    result: dict[str, Any]
    printed: str
    folder: Path
    ray_logs: str
    records: dict[str, dict[str, Any]]
    """By ``custom_id``, each row's first sample."""
    further: list[dict[str, Any]]
    """The other samples."""
    peaks: dict[str, int]
    """Process title -> most memory it ever took, bytes."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "in").mkdir()
    corpus = cases(folder / "in")
    assert len({case.name for case in corpus}) == len(corpus) >= 60
    pq.write_table(_table(corpus), folder / "in" / "a.parquet")
    (folder / "job.yaml").write_text(yaml.safe_dump(_config(folder)))
    ray_folder = Path(tempfile.mkdtemp(prefix="mb"))  # sockets want a short path
    try:
        yield _run(folder, ray_folder, corpus)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def test_every_case_ends_as_it_must(run: Run) -> None:
    assert (run.exit_code, run.result["status"]) == (0, "complete"), run.printed[-5000:]
    ends = {case.name: run.records[case.name]["error_code"] for case in run.cases}
    wrong = {
        case.name: (ends[case.name], run.records[case.name]["error_message"])
        for case in run.cases
        if ends[case.name] != case.code and ends[case.name] not in case.also
    }
    assert wrong == {}


def test_the_rows_between_them_are_as_if_alone(run: Run) -> None:
    neighbours = [record for name, record in run.records.items() if name.startswith("good-")]
    assert len(neighbours) == len(run.cases)
    assert {record["text"] for record in neighbours} == {ANSWER}


def test_each_row_has_one_record_and_the_counts_agree(run: Run) -> None:
    assert len(run.records) == run.result["rows"]["total"] == 2 * len(run.cases)
    assert run.result["rows"]["total"] == sum(run.result["rows"][s] for s in STATUSES)
    errored = [record for record in run.records.values() if record["status"] == "errored"]
    assert len(errored) == run.result["rows"]["errored"]
    assert all(record["error_message"] for record in errored)


def test_odd_rows_get_what_they_ask_for(run: Run) -> None:
    first, (second,) = run.records["two-samples"], run.further
    assert [first["seed"], second["seed"]] == [5, 6]
    assert second["custom_id"] == "two-samples"
    stopped = run.records["a-stop-string"]
    assert (stopped["text"], stopped["finish_reason"]) == ("1 2 3 ", "stop")
    assert run.records["eight-images"]["image_tokens"] == 8 * 7
    assert "allows 8" in run.records["nine-images"]["error_message"]


def test_memory_stays_bounded(run: Run) -> None:
    assert run.peaks
    too_much = {title: peak for title, peak in run.peaks.items() if peak > MOST_MEMORY}
    assert too_much == {}


def test_no_secret_is_in_anything_the_run_left_behind(run: Run) -> None:
    assert PLANTED not in run.printed
    assert PLANTED not in run.ray_logs
    assert PLANTED not in json.dumps(list(run.records.values()), default=str)
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {"run.json", "report.json", "report.html", "_SUCCESS"} <= {path.name for path in files}
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []


def _table(corpus: list[Case]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for case in corpus:
        rows.append(
            {
                "custom_id": case.name,
                "prompt": None if case.messages and case.prompt == "What is it?" else case.prompt,
                "messages": case.messages,
                "images": case.images,
                "sampling": case.sampling,
            }
        )
        rows.append({"custom_id": f"good-{case.name}", "prompt": NEIGHBOUR})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _config(folder: Path) -> dict[str, Any]:
    return {
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "sampling": {"temperature": 0, "max_completion_tokens": 30},
        "engine": {"profile": "mini-maverick-tp1", "overrides": {"hf_token": PLANTED}},
        "limits": {
            "max_error_rate": 1.0,
            "max_image_bytes": MAX_IMAGE_BYTES,
            "max_image_pixels": MAX_IMAGE_PIXELS,
            "shard_rows": 32,
        },
    }


def _run(folder: Path, ray_folder: Path, corpus: list[Case]) -> Run:
    secrets = {"AWS_SECRET_ACCESS_KEY": PLANTED, "HF_TOKEN": PLANTED, "AWS_ACCESS_KEY_ID": "id"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.nightly", "--config", str(folder / "job.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**without_ray(), **secrets, "RAY_TMPDIR": str(ray_folder)},
    )
    peaks: dict[str, int] = {}
    ended = threading.Event()
    watch = threading.Thread(target=_watch_memory, args=(process.pid, peaks, ended))
    watch.start()
    try:
        stdout, stderr = process.communicate(timeout=900)
    finally:
        process.kill()
        ended.set()
        watch.join()
    records = ds.dataset(folder / "out" / "data").to_table().to_pylist()
    logs = [path.read_text(errors="replace") for path in ray_folder.rglob("*.*") if path.is_file()]
    return Run(
        cases=corpus,
        exit_code=process.returncode,
        result=json.loads(stdout.splitlines()[-1]),
        printed=stdout + stderr,
        folder=folder / "out",
        ray_logs="\n".join(logs),
        records={r["custom_id"]: r for r in records if r["sample_index"] == 0},
        further=[record for record in records if record["sample_index"]],
        peaks=peaks,
    )


def _watch_memory(pid: int, peaks: dict[str, int], ended: threading.Event) -> None:
    """The kernel keeps the peak of each living process; a look now and then sees it."""
    while not ended.wait(0.2):
        for process in psutil.Process(pid).children(recursive=True):
            try:
                title = f"{process.pid} {' '.join(process.cmdline())[:40]}"
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (psutil.Error, OSError):
                continue
            if "VLLM::" in title or "ReplicaActor" in title or "VmHWM" not in status:
                continue
            kibibytes = int(status.split("VmHWM:")[1].split()[0])
            peaks[title] = max(peaks.get(title, 0), kibibytes * 1024)
