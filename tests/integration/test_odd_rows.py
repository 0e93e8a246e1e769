"""Odd but legal rows, and rows that only the engine can refuse, through the real engine."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, (width, height)).save(sink, "PNG")
    return sink.getvalue()


ROWS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "Count to 3."},
    "samples": {"prompt": "Count to 3.", "sampling": {"n": 2, "seed": 5}},
    "stop": {"prompt": "Count to 9.", "sampling": {"stop": ["4"], "temperature": 0.0}},
    "huge-cap": {"prompt": "Count to 3.", "sampling": {"max_completion_tokens": 2**31 - 1}},
    "nine-images": {"prompt": "?", "images": [png(56, 56)] * 9},
    "one-pixel": {"prompt": "?", "images": [png(1, 1)]},
    "palette": {"prompt": "?", "images": [png(60, 200, "P")]},
    "transparent": {"prompt": "?", "images": [png(300, 20, "RGBA")]},
}


def test_each_row_ends_as_its_own_record(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [
        {
            "custom_id": name,
            "prompt": row["prompt"],
            "images": row.get("images"),
            "sampling": json.dumps(row.get("sampling", {})),
        }
        for name, row in ROWS.items()
    ]
    table = pa.Table.from_pylist(
        rows,
        schema=pa.schema(
            [
                ("custom_id", pa.string()),
                ("prompt", pa.string()),
                ("images", pa.list_(pa.binary())),
                ("sampling", pa.string()),
            ]
        ),
    )
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    config = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "sampling": {"max_completion_tokens": 30},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"max_error_rate": 0.5},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.nightly", "--config", str(tmp_path / "job.yaml")],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    records = ds.dataset(tmp_path / "out" / "data").to_table().to_pylist()
    found = {(record["custom_id"], record["sample_index"]): record for record in records}
    assert len(found) == len(records) == len(ROWS) + 1
    failed = {key for key, record in found.items() if record["status"] != "succeeded"}
    assert failed == {("nine-images", 0)}
    assert found["nine-images", 0]["error_code"] == "engine_rejected"
    assert "8 image" in found["nine-images", 0]["error_message"]
    assert found["nine-images", 0]["image_tokens"] == 9 * 7
    assert [found["samples", index]["seed"] for index in (0, 1)] == [5, 6]
    assert found["stop", 0]["text"] == "1 2 3 "
    assert found["stop", 0]["finish_reason"] == "stop"
