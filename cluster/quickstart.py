"""``make quickstart``: a mini-cluster, the sample input, the nightly job, and what came of it.

Starts an S3 server and three Ray nodes, uploads the sample, submits the job with
``ray job submit``, copies the run folder to ``out/quickstart/``, shows a summary, and stops all
that it started. Exit code 0 only if every row is accounted for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import ClusterError
from cluster.lifecycle import LocalCluster
from cluster.sample import Verdict, judge, read_records, upload
from cluster.signals import unwind_on_termination
from pipeline import storage
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.profile import REPO_ROOT

_CONFIG = "jobs/configs/quickstart.yaml"
_OUT = REPO_ROOT / "out" / "quickstart"
_STATE = REPO_ROOT / "out" / ".quickstart-cluster"
_SHOWN_PER_TASK = 2

console = Console(stderr=True, highlight=False)


def main() -> int:
    """0: every row accounted for; 1: not, or something did not start; 130: interrupted."""
    unwind_on_termination()
    shutil.rmtree(_OUT, ignore_errors=True)
    _OUT.mkdir(parents=True)
    try:
        with LocalCluster(_STATE, report=lambda line: console.print(line, markup=False)) as cluster:
            code = _run(cluster.state.environment())
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started is stopped", style="yellow")
        return 130
    except (ClusterError, PipelineError, OSError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return code


def _run(environment: dict[str, str]) -> int:
    os.environ.update(environment)  # credentials for the upload and the download below
    console.rule("the sample input")
    console.print(f"{upload()} objects uploaded to the bucket")
    console.rule("ray job submit -- python -m jobs.nightly")
    submitted = _submit()
    console.rule("the result")
    download_run(load_config(REPO_ROOT / _CONFIG).output.uri, _OUT)
    records = read_records(_OUT)
    verdict = judge(records)
    _show(records, verdict)
    if submitted != 0:
        console.print("the job failed; its log: out/quickstart/job.log", style="red")
    return 0 if submitted == 0 and verdict.accounted else 1


def _submit() -> int:
    """Submit the job and follow its log, which is kept in out/quickstart/job.log."""
    command = [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", "."),
        *("--", sys.executable, "-m", "jobs.nightly", "--config", _CONFIG),
    ]
    with (
        (_OUT / "job.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            console.print(line, end="", markup=False, soft_wrap=True)
    return process.returncode


def download_run(run_uri: str, folder: Path) -> None:
    """Copy a run folder out of its bucket, ``_`` objects included."""
    prefix = storage.absolute(run_uri).rstrip("/")
    for place in (prefix, storage.join(prefix, "data")):
        for uri in storage.list_folder(place):
            target = folder / uri.removeprefix(prefix).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(uri))


def _show(records: list[dict[str, Any]], verdict: Verdict) -> None:
    table = Table("custom_id", "status", "completion or error", "label", "tokens", "seed")
    shown: dict[str, int] = {}
    for record in records:
        shown[record["task"]] = shown.get(record["task"], 0) + 1
        if shown[record["task"]] > _SHOWN_PER_TASK:
            continue
        table.add_row(
            record["custom_id"],
            record["status"],
            record["text"] or f"{record['error_code']}: {record['error_message']}",
            record["label"],
            f"{record['prompt_tokens']}+{record['completion_tokens']}",
            str(record["seed"]),
        )
    console.print(table)
    failed = [*verdict.wrongly_failed, *verdict.wrongly_passed]
    console.print(
        f"{verdict.records} of {verdict.rows} rows have a record; "
        f"digits right {verdict.digits_right}/{verdict.digits}, "
        f"counting right {verdict.other_right}/{verdict.other}; "
        + (f"NOT as expected: {', '.join(failed)}" if failed else "every row ended as it should")
    )
    console.print("records: out/quickstart/data/*.parquet   report: out/quickstart/report.html")


if __name__ == "__main__":
    sys.exit(main())
