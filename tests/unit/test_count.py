"""Counting: what a prepared block holds, exactly, in a row whose size does not follow the rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.count import ShardCounts, count_block, spread_rows
from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.read import open_input, read_shard
from pipeline.records import Failure, Prepared, input_block, read_prepared
from pipeline.sampling import SamplingDefaults
from tests.unit.test_prepare import png

LIMIT = 512


def block_of(folder: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[pa.Table, PrepareSpec]:
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    found = open_input(str(path), renamed={}, carry=None)
    spec = PrepareSpec(
        model=ModelSpec("cluster/models/mini-maverick", None, max_model_len=LIMIT),
        columns=found.columns,
        sampling=SamplingDefaults(max_completion_tokens=64),
        run_seed=0,
        max_image_pixels=10**6,
        fetcher=ImageFetcher(f"file://{folder}", 10**6, 4),
    )
    shard = Shard(3, found.files[0].uri, 0, len(rows))
    return input_block(shard, read_shard(shard, found.columns)), spec


def test_counts_are_those_of_the_prepared_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"custom_id": "text", "prompt": "Hello", "images": [], "sampling": None},
        {"custom_id": "three", "prompt": "Hi", "images": [], "sampling": '{"n": 3}'},
        {"custom_id": "image", "prompt": "What?", "images": [png(56, 56)] * 2, "sampling": None},
        {"custom_id": "bad", "prompt": None, "images": [], "sampling": None},
        {"custom_id": "hot", "prompt": "x", "images": [], "sampling": '{"temperature": 9}'},
        {"custom_id": "worse", "prompt": None, "images": [], "sampling": None},
        {"custom_id": "long", "prompt": "y" * 460, "images": [], "sampling": None},
    ]
    block, spec = block_of(tmp_path, rows)
    prepared = prepare_block(block, spec=spec)
    items = read_prepared(prepared)
    good = [item for item in items if isinstance(item, Prepared)]
    found = count_block(prepared, max_model_len=LIMIT)

    assert (found.shard, found.rows, found.samples, found.images) == (3, 7, 6, 2)
    assert found.errors == Counter(str(item.code) for item in items if isinstance(item, Failure))
    assert found.errors == {"invalid_messages": 2, "invalid_parameter": 1}
    assert found.examples["invalid_messages"].custom_id == "bad"
    assert found.examples["invalid_messages"].input_row == 3
    assert found.tokens["prompt"] == sum(item.prompt_tokens * item.sampling.n for item in good)
    assert found.tokens["prompt_once"] == sum(item.prompt_tokens for item in good)
    assert found.tokens["image"] == sum(item.image_tokens for item in good) > 0
    room = LIMIT - good[-1].prompt_tokens
    assert room < 64, "the last prompt leaves less than the cap"
    assert found.tokens["most"] == 5 * 64 + room
    assert sum(found.cells.values()) == 6
    assert {kind.with_images for kind, _ in found.cells} == {True, False}


def test_counts_survive_the_way_to_the_driver(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "Hello"}, {"prompt": None}]
    block, spec = block_of(tmp_path, rows)
    found = count_block(prepare_block(block, spec=spec), max_model_len=LIMIT)
    assert ShardCounts.from_json(found.to_json()) == found


def test_a_thousand_rows_travel_as_a_kilobyte(tmp_path: Path) -> None:
    block, spec = block_of(tmp_path, [{"prompt": f"Say {i} words"} for i in range(1000)])
    found = count_block(prepare_block(block, spec=spec), max_model_len=LIMIT)
    assert found.samples == 1000
    assert len(found.to_json()) < 1000


def test_rows_of_a_sample_are_spread_over_the_block_and_keep_their_numbers(tmp_path: Path) -> None:
    block, spec = block_of(tmp_path, [{"prompt": f"{i}"} for i in range(100)])
    assert spread_rows(block, 4).column("input_row").to_pylist() == [12, 37, 62, 87]
    assert spread_rows(block, 100) is block
    assert (
        count_block(prepare_block(spread_rows(block, 4), spec=spec), max_model_len=LIMIT).rows == 4
    )


def test_a_block_of_bad_rows_alone_is_counted(tmp_path: Path) -> None:
    block, spec = block_of(tmp_path, [{"prompt": ""}, {"prompt": ""}])
    found = count_block(prepare_block(block, spec=spec), max_model_len=LIMIT)
    assert (found.bad, found.samples, found.images, dict(found.cells)) == (2, 0, 0, {})
