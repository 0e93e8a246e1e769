"""After a deadline: journaled records stay, every other sample is one expired record."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import Destination, read_stats
from pipeline.expire import expire_shard
from pipeline.fetch import ImageFetcher
from pipeline.journal import Journal
from pipeline.model import ModelSpec
from pipeline.plan import Shard
from pipeline.prepare import PrepareSpec
from pipeline.read import InputColumns, open_input, read_shard
from pipeline.records import Completion, input_block
from pipeline.sampling import SamplingDefaults
from pipeline.seeds import derive_seed

NAMES = ("custom_id", "prompt", "messages", "images", "sampling")
ROWS: list[dict[str, Any]] = [
    {"custom_id": "a", "prompt": "x", "sampling": '{"n": 2}', "label": 0},
    {"custom_id": "b", "prompt": "x", "sampling": None, "label": 1},
    {"custom_id": "c", "prompt": None, "sampling": '{"temperature": "hot"}', "label": 2},
]
SHARD = Shard(0, "s3://b/rows.parquet", 100, len(ROWS))


@pytest.fixture
def to(tmp_path: Path) -> Destination:
    return Destination(f"file://{tmp_path}", "run-1", "m")


def expire(to: Destination) -> list[dict[str, Any]]:
    columns = InputColumns({name: name for name in NAMES}, _carried())
    return expire_rows(to, SHARD, pa.Table.from_pylist(ROWS), columns)


def expire_rows(
    to: Destination, shard: Shard, rows: pa.Table, columns: InputColumns
) -> list[dict[str, Any]]:
    spec = PrepareSpec(
        model=ModelSpec("/no/model/is/needed", None, max_model_len=512),
        columns=columns,
        sampling=SamplingDefaults(),
        run_seed=7,
        max_image_pixels=1,
        fetcher=ImageFetcher(to.output_uri, 1, 1),
    )
    expire_shard(input_block(shard, rows), to=to, prepare=spec)
    path = Path(to.output_uri.removeprefix("file://")) / "data" / "part-000000.parquet"
    records: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return records


def _carried() -> pa.Schema:
    return pa.schema([("label", pa.int64())])


def test_every_sample_without_a_completion_is_one_expired_record(to: Destination) -> None:
    records = expire(to)
    assert [(r["custom_id"], r["sample_index"], r["label"]) for r in records] == [
        ("a", 0, 0),
        ("a", 1, 0),
        ("b", 0, 1),
        ("c", 0, 2),
    ]
    assert {r["status"] for r in records} == {"expired"}
    assert {r["error_code"] for r in records} == {"batch_expired"}
    assert records[1]["seed"] == derive_seed(7, "a", 1)
    assert {r["attempts"] for r in records} == {0}


@pytest.mark.parametrize("journaled", [[], [(101, "b")], [(101, "b"), (102, "c")]])
def test_no_row_counts_as_made_by_the_attempt(
    to: Destination, journaled: list[tuple[int, str]]
) -> None:
    Journal(to, SHARD).append(
        [Completion(row, key, 0, "text", "stop", 1, 1, 0, 0, 1, 0.1) for row, key in journaled]
    )
    expire(to)
    (stats,) = read_stats(to.output_uri, [0])
    assert (stats.rows["succeeded"], stats.taken_over) == (len(journaled), len(ROWS))


def test_batch_lines_expire_too_with_their_ids_samples_and_endpoints(
    to: Destination, tmp_path: Path
) -> None:
    body = {"prompt": "x", "n": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(line) + "\n{")
    found = open_input(str(path), renamed={}, carry=None)
    shard = Shard(0, found.files[0].uri, 0, 2, 0, path.stat().st_size)
    records = expire_rows(to, shard, read_shard(shard, found.columns), found.columns)
    assert [(r["custom_id"], r["sample_index"], r["url"]) for r in records] == [
        ("a", 0, "/v1/completions"),
        ("a", 1, "/v1/completions"),
        ("rows.jsonl:1", 0, None),
    ]
    assert {r["status"] for r in records} == {"expired"}


def test_what_was_journaled_stays_and_the_journal_is_gone(to: Destination) -> None:
    done = Completion(100, "a", 1, "text", "stop", 10, 3, 2, 0, 99, 0.25)
    Journal(to, SHARD).append([done])
    records = expire(to)
    assert [r["status"] for r in records] == ["expired", "succeeded", "expired", "expired"]
    assert (records[1]["text"], records[1]["latency_s"]) == ("text", 0.25)
    assert Journal(to, SHARD).read() == []


def test_a_journaled_sample_stays_though_its_row_no_longer_tells_its_samples(
    to: Destination,
) -> None:
    done = Completion(102, "c", 1, "text", "stop", 10, 3, 2, 0, 99, 0.25, sampling='{"n": 3}')
    Journal(to, SHARD).append([done])
    records = [record for record in expire(to) if record["custom_id"] == "c"]
    assert [(r["sample_index"], r["status"]) for r in records] == [
        (0, "expired"),
        (1, "succeeded"),
        (2, "expired"),
    ]


def test_a_part_that_was_committed_in_time_is_left_as_it_is(to: Destination) -> None:
    first = expire(to)
    Journal(to, SHARD).append([Completion(101, "b", 0, "late", "stop", 1, 1, 0, 0, 1, 0.1)])
    assert expire(to) == first
