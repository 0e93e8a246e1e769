"""The nightly job on a real Ray, with a fake engine: accounting and resume.

The engine is the one thing replaced; tests/integration/test_nightly_job.py has the real one.
"""

import json
import platform
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from tests.integration import fake_job
from tests.integration.fake_job import records

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("one_ray")]

ROWS = 230


def odd_columns(rows: int) -> dict[str, pa.Array]:
    """Columns of types that Ray Data has no word for."""
    keys = pa.array([bytes([row]) * 16 for row in range(rows)], pa.binary(16))
    tensors = pa.array([[row, 1] for row in range(rows)], pa.list_(pa.int32(), 2))
    return {
        "key": pa.ExtensionArray.from_storage(pa.uuid(), keys),
        "tensor": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.int32(), [2]), tensors),
        "kind": pa.array(["a", None, "b"] * rows).slice(0, rows).dictionary_encode(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of several row groups, a few bad rows, and a config."""
    folder = tmp_path_factory.mktemp("nightly")
    (folder / "in").mkdir()
    for number, rows in enumerate((150, 80)):
        table = pa.table(
            {
                "custom_id": [f"f{number}-{i}" for i in range(rows)],
                "prompt": [None if i % 50 == 7 else f"Say {i}." for i in range(rows)],
                "label": pa.array(range(rows), pa.int16()),
                **odd_columns(rows),
            }
        )
        pq.write_table(table, folder / "in" / f"{number}.parquet", row_group_size=33)
    config = {
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "seed": 1,
        "engine": {
            "profile": "mini-maverick-tp1",
            "replicas": 2,
            "overrides": {"enable_return_routed_experts": True},
        },
        "limits": {"max_error_rate": 0.5, "shard_rows": 25},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    return folder


def nightly(folder: Path, *arguments: str, fault: str = "") -> tuple[int, dict[str, Any], str]:
    return fake_job.nightly(folder / "job.yaml", *arguments, FAKE_ENGINE_FAULT=fault)


def test_a_run_its_repetition_and_the_loss_of_a_part(folder: Path) -> None:
    out = folder / "out"
    code, result, stderr = nightly(folder)
    assert code == 0, stderr
    assert result["rows"]["total"] == ROWS == len(records(out))
    assert result["rows"]["errored"] == 5
    keys = {(row["input_file"], row["input_row"]) for row in records(out)}
    assert len(keys) == ROWS
    for row in records(out):
        assert row["custom_id"] == f"f{Path(row['input_file']).stem}-{row['input_row']}"
        assert row["label"] == row["input_row"]
    parts = (
        ds.dataset(out / "data")
        .to_table()
        .sort_by([("input_file", "ascending"), ("input_row", "ascending")])
    )
    for name, column in odd_columns(150).items():
        stored = parts.column(name).slice(0, 150)
        assert (stored.type, stored.to_pylist()) == (column.type, column.to_pylist())
    assert (out / "_SUCCESS").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["rows"] == result["rows"]
    # a commit is counted with the replica's next part, and there may be none
    steps = ("start", "read", "prepare", "queue", "engine", "journal")
    assert all(report["cpu_s"][step] > 0 for step in steps)  # from tasks and replicas alike
    assert report["throughput"]["rows"] == ROWS  # rows that failed before the engine, too
    assert sum(replica["rows"] for replica in report["replicas"]) == ROWS
    assert {node for replica in report["replicas"] for node in replica["nodes"]} == {
        platform.node()
    }
    assert all(row["finished_at"] is not None for row in records(out))
    (start,) = report["time"]["starts"]
    assert report["time"]["first_start"] <= start["first_shard"] <= start["last_commit"]
    (detail,) = report["error_details"]
    assert {example["input_row"] % 50 for example in detail["examples"]} == {7}

    routed = sum(row["total_tokens"] - 1 for row in records(out) if row["status"] == "succeeded")
    assert [layer["tokens"] for layer in report["experts"]["layers"]] == [
        [0, 0, routed, 0, 0, 0, 0, 0]
    ] * 2

    before = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    code, again, stderr = nightly(folder)
    assert (code, again["generated_rows"]) == (0, 0)
    assert again["rows"] == result["rows"]
    assert again["tokens"] == result["tokens"]
    assert "nothing to generate" in stderr
    assert {path.name: path.read_bytes() for path in (out / "data").iterdir()} == before

    lost = sorted(before)[3]
    shape = pq.read_table(out / "data" / lost)
    (out / "data" / lost).unlink()
    code, third, stderr = nightly(folder)
    assert (code, third["generated_rows"]) == (0, shape.num_rows), stderr
    assert third["rows"] == result["rows"]
    report = json.loads((out / "report.json").read_text())
    assert [each["rows"] for each in report["time"]["starts"]] == [
        ROWS - shape.num_rows,
        shape.num_rows,
    ]
    times = ["latency_s", "finished_at"]
    assert pq.read_table(out / "data" / lost).drop(times) == shape.drop(times)
    untouched = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    assert {name for name in before if before[name] != untouched[name]} <= {lost}


@pytest.mark.parametrize(
    ("fault", "words"), [("start", "the weights are not there"), ("die", "died")]
)
def test_an_engine_that_fails_ends_the_run_with_1_and_its_reason(
    folder: Path, fault: str, words: str
) -> None:
    out = folder / f"fault-{fault}"
    code, result, stderr = nightly(folder, "--set", f"output.uri={out}", fault=fault)
    assert (code, result["status"], result["run"]) == (1, "failed", f"file://{out}"), stderr
    assert words in result["error"]
    assert result["rows"]["total"] == ROWS
    assert not (out / "_SUCCESS").exists()
    assert json.loads((out / "report.json").read_text())["error"] == result["error"]


def test_an_error_rate_above_the_limit_exits_with_3(folder: Path) -> None:
    code, result, _ = nightly(
        folder,
        *("--set", f"output.uri={folder}/over", "--set", "limits.max_error_rate=0.01"),
    )
    assert (code, result["status"]) == (3, "over_error_rate")
    assert (folder / "over" / "_SUCCESS").exists()


def test_an_input_without_rows_gives_an_empty_readable_output(folder: Path) -> None:
    (folder / "empty").mkdir()
    pq.write_table(
        pq.read_table(folder / "in" / "0.parquet").slice(0, 0), folder / "empty" / "a.parquet"
    )
    overrides = ("--set", f"input.uri={folder}/empty", "--set", f"output.uri={folder}/empty-out")
    code, result, stderr = nightly(folder, *overrides)
    assert (code, result["rows"]["total"]) == (0, 0), stderr
    table = ds.dataset(folder / "empty-out" / "data").to_table()
    assert table.num_rows == 0
    assert {"custom_id", "text", "label"} <= set(table.schema.names)
    assert nightly(folder, *overrides)[0] == 0


def test_a_dry_run_says_what_would_run_and_writes_nothing(folder: Path) -> None:
    code, result, stderr = nightly(folder, "--dry-run", "--set", f"output.uri={folder}/dry")
    assert (code, result["status"], result["pending_rows"]) == (0, "dry_run", ROWS), stderr
    assert not (folder / "dry").exists()


def test_a_dry_run_refuses_a_cluster_that_cannot_hold_the_replicas(folder: Path) -> None:
    code, result, _ = nightly(
        folder,
        *("--dry-run", "--set", "engine.profile=maverick-fp8-8xh100"),
        *("--set", f"output.uri={folder}/dry"),
    )
    assert (code, result["status"]) == (2, "invalid")
    assert "8 H100 GPUs" in result["error"]
    assert "has 0 GPUs" in result["error"]
