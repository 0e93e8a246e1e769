"""An annotated dataset from the real engine: partitions, votes, broken rows, a second attempt.

One job, so one engine per attempt. mini-Maverick reads digits well; an answer that begins with 7 is
made too long for the token limit, so these rows are invalid in every attempt. Not covered: a job
that is killed between its attempts (each attempt's own resume is the nightly job's).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.sample import SAMPLE_FOLDER
from pipeline.records import OUTPUT_SCHEMA
from tests.integration.fake_job import environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

DAYS = ("2026-11-19", "2026-11-20")
SCANS = 20
LONG = "7, which is seven"
VOTES = 3


def started(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.annotate", "--config", str(folder / "task.yaml"), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=900,
    )
    (line,) = done.stdout.splitlines()
    return done.returncode, json.loads(line), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of two days; on the first, one is no image and one has no key."""
    folder = tmp_path_factory.mktemp("annotate")
    for day in DAYS:
        source = SAMPLE_FOLDER.parent / "digits" / f"date={day}" / "scans.parquet"
        rows = pq.read_table(source, partitioning=None).to_pylist()[:SCANS]
        if day == DAYS[0]:
            rows[3]["image"] = b"this is not an image"
            rows[5]["scan_id"] = None
        path = folder / "in" / f"date={day}" / "scans.parquet"
        path.parent.mkdir(parents=True)
        schema = pq.read_schema(source)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=7)
    values = [LONG if digit == 7 else str(digit) for digit in range(10)]
    document = {
        "input": {"uri": str(folder / "in"), "columns": {"custom_id": "scan_id"}},
        "output": {"uri": str(folder / "out")},
        "seed": 5,
        "sampling": {"temperature": 1.0, "max_completion_tokens": 4},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"max_error_rate": 0.5, "shard_rows": 16},
        "task": {
            "prompt": "Which digit {% if date %}do you see{% endif %}?",
            "images": ["image"],
            "votes": VOTES,
            "retries": 1,
            "answer": {
                "form": "value",
                "schema": {"type": "object", "properties": {"label": {"enum": values}}},
            },
        },
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(document))
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    code, result, stderr = started(folder)
    assert code == 0, stderr
    return result


@pytest.fixture(scope="module")
def table(folder: Path, result: dict[str, Any]) -> pa.Table:
    return ds.dataset(folder / "out" / "data", partitioning="hive").to_table()


def test_every_file_has_its_rows_in_order_with_their_own_columns(
    folder: Path, table: pa.Table
) -> None:
    for day in DAYS:
        path = Path(f"date={day}") / "scans.parquet"
        given = pq.read_table(folder / "in" / path, partitioning=None)
        made = pq.read_table(folder / "out" / "data" / path, partitioning=None)
        assert made.select(given.column_names).equals(given)
        assert made.column("input_row").to_pylist() == list(range(SCANS))
    # the input has a label of its own
    assert table.schema.field("annotation_label").type == pa.string()


def test_the_answers_are_the_digits_and_say_how_many_samples_agree(table: pa.Table) -> None:
    answered = [row for row in table.to_pylist() if row["annotation_label"] is not None]
    right = sum(row["annotation_label"][0] == str(row["label"]) for row in answered)
    assert right / len(answered) > 0.9
    for row in answered:
        assert 1 <= row["votes"] <= VOTES
        assert row["agreement"] * row["votes"] == pytest.approx(
            round(row["agreement"] * row["votes"])
        )


def test_a_broken_row_is_an_error_of_that_row_alone(
    table: pa.Table, result: dict[str, Any]
) -> None:
    codes = table.filter(ds.field("date") == DAYS[0]).column("error_code").to_pylist()
    assert codes[3] == "image_invalid"
    assert codes[5] == "template_error"
    attempts = table.filter(ds.field("date") == DAYS[0]).column("attempts").to_pylist()
    assert (attempts[3], attempts[5]) == (0, 0)
    assert result["rows"]["total"] == 2 * SCANS
    assert result["rows"]["errored"] == table.num_rows - pc.count(table["annotation_label"]).as_py()


def test_an_invalid_answer_is_tried_again_with_other_seeds_and_paid_for(
    folder: Path, table: pa.Table, result: dict[str, Any]
) -> None:
    first, second = result["attempts"]
    again = table.filter(ds.field("attempts") == 2).to_pylist()
    assert {row["label"] for row in again} >= {7}
    assert second["rows"] == len(again) == result["retried"]["rows"]
    assert all(row["error_code"] in (None, "length") for row in again)
    records = [
        ds.dataset(attempt["run"] + "/data").to_table(columns=OUTPUT_SCHEMA.names)
        for attempt in (first, second)
    ]
    seeds = [set(each.column("seed").to_pylist()) for each in records]
    assert not seeds[0] & seeds[1]
    assert records[1].num_rows == VOTES * len(again)
    ids = set(records[1].column("custom_id").to_pylist())
    assert ids == {row["scan_id"] for row in again}
    for kind in ("prompt", "completion", "image"):
        paid = sum(pc.sum(each[f"{kind}_tokens"]).as_py() for each in records)
        assert result["tokens"][kind] == paid > 0


def test_the_same_command_generates_nothing_and_a_changed_task_is_refused(
    folder: Path, result: dict[str, Any]
) -> None:
    out = folder / "out"
    assert (out / "_SUCCESS").exists()
    assert json.loads((out / "report.json").read_text())["rows"] == result["rows"]
    before = {path: path.read_bytes() for path in (out / "data").rglob("*.parquet")}
    code, again, stderr = started(folder)
    assert (code, again["generated_rows"]) == (0, 0), stderr
    for key in ("rows", "tokens", "attempts", "agreement"):
        assert again[key] == result[key]
    assert {path: path.read_bytes() for path in (out / "data").rglob("*.parquet")} == before

    code, refused, _ = started(folder, "--set", "task.prompt=What is this?")
    assert (code, refused["status"]) == (2, "invalid")
    assert "input.template.prompt" in refused["error"]
    assert "--new-run" in refused["error"]
    assert (out / "_SUCCESS").exists()
