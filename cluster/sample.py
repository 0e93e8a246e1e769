"""Puts the sample input into a bucket, and says how a run of it went.

``python -m cluster.sample`` uploads ``jobs/sample/input/`` to ``s3://batch/sample/``, and the data
sets of the shipped tasks beside it (``s3://batch/digits/``, ``s3://batch/feedback/``), with the
credentials of the environment (``. .cluster/env``). The quickstart uses the same functions.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.profile import REPO_ROOT

SAMPLE_FOLDER = REPO_ROOT / "jobs" / "sample" / "input"
SAMPLE_URI = "s3://batch/sample/"
_DATA_SETS = ("digits", "feedback")
"""Folders beside the sample input, and beside it in the bucket."""
MEANT_TO_FAIL = "bad"
"""``task`` of the rows that must fail; their ``label`` is the error code they must get."""
_DIGIT_TASKS = ("single", "wide", "larger")


@dataclass(frozen=True)
class Verdict:
    """How the records of the sample compare to what is known about its rows."""

    rows: int
    records: int
    digits: int
    digits_right: int
    other: int
    other_right: int
    doubled: tuple[str, ...]
    """custom_ids with more than one record."""
    wrongly_failed: tuple[str, ...]
    """custom_ids of good rows without a proper completion."""
    wrongly_passed: tuple[str, ...]
    """custom_ids of bad rows that did not get the error code they were meant to get."""

    @property
    def accounted(self) -> bool:
        """One record per row, and each row failed or succeeded as it should."""
        complete = self.rows == self.records and not self.doubled
        return complete and not self.wrongly_failed and not self.wrongly_passed


def upload(uri: str = SAMPLE_URI, folder: Path = SAMPLE_FOLDER) -> int:
    """Copy the sample input, or another folder, to ``uri``; returns the number of objects."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        target = storage.join(uri, path.relative_to(folder).as_posix())
        storage.put_bytes(target, path.read_bytes())
    return len(paths)


def read_records(run_folder: Path) -> list[dict[str, Any]]:
    """All records of a local run folder, in order of input file and row."""
    table = ds.dataset(run_folder / "data", format="parquet").to_table()
    rows: list[dict[str, Any]] = table.to_pylist()
    return sorted(rows, key=lambda row: (row["input_file"], row["input_row"], row["sample_index"]))


def judge(records: list[dict[str, Any]]) -> Verdict:
    """Compare records of the sample input with its labels."""
    good = [record for record in records if record["task"] != MEANT_TO_FAIL]
    bad = [record for record in records if record["task"] == MEANT_TO_FAIL]
    names = Counter(record["custom_id"] for record in records)
    digits = [record for record in good if record["task"] in _DIGIT_TASKS]
    other = [record for record in good if record["task"] not in _DIGIT_TASKS]
    return Verdict(
        rows=sum(pq.read_metadata(path).num_rows for path in SAMPLE_FOLDER.glob("*.parquet")),
        records=len(records),
        digits=len(digits),
        digits_right=sum(record["text"] == record["label"] for record in digits),
        other=len(other),
        other_right=sum(record["text"] == record["label"] for record in other),
        doubled=tuple(name for name, count in names.items() if count > 1),
        wrongly_failed=tuple(r["custom_id"] for r in good if not _is_proper(r)),
        wrongly_passed=tuple(r["custom_id"] for r in bad if r["error_code"] != r["label"]),
    )


def _is_proper(record: dict[str, Any]) -> bool:
    return (
        record["status"] == "succeeded"
        and record["prompt_tokens"] > 0
        and record["completion_tokens"] > 0
        and record["seed"] is not None
        and record["finish_reason"] in ("stop", "length")
    )


def main() -> int:
    """Upload the sample and the data sets."""
    sys.stderr.write(f"{upload()} objects are in {SAMPLE_URI}\n")
    for name in _DATA_SETS:
        uri = f"s3://batch/{name}/"
        sys.stderr.write(f"{upload(uri, SAMPLE_FOLDER.parent / name)} objects are in {uri}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
