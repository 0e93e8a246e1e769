"""Records: lossless through Arrow, in order, with the contract's columns and the user's own."""

from array import array
from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline.errors import ErrorCode
from pipeline.logprobs import PROMPT_TOKEN, TOKEN
from pipeline.plan import Shard
from pipeline.records import (
    OUTPUT_SCHEMA,
    Completion,
    Failure,
    Outcome,
    Prepared,
    SampleKey,
    Status,
    ToolCall,
    block_shard,
    carried_columns,
    carried_names,
    count_images,
    input_block,
    part_table,
    prepared_block,
    read_prepared,
    read_records,
    record_table,
    samples_asked,
    with_known,
)
from pipeline.sampling import Sampling

SHARD = Shard(3, "s3://b/a.parquet", 10, 2)
PREPARED = Prepared(
    input_row=10,
    custom_id="ü",
    token_ids=array("i", [1, 2, 3]),
    images=(b"png", b"jpg"),
    image_tokens=14,
    prompt_tokens=15,
    sampling=Sampling(temperature=0.5, stop=("x",), n=2),
    seeds=(1, 2**63 - 1),
)
FAILURE = Failure(11, "b", ErrorCode.IMAGE_INVALID, "broken", seed=7)


def completion(row: int, sample: int = 0) -> Completion:
    return Completion(row, f"id-{row}", sample, "text", "stop", 5, 2, 1, 0, 9, 0.25)


def test_prepared_rows_survive_the_trip_through_arrow() -> None:
    block = prepared_block(SHARD, [PREPARED, FAILURE], pa.table({"label": ["x", None]}))
    assert read_prepared(block) == [PREPARED, FAILURE]
    assert read_prepared(block.slice(1)) == [FAILURE]
    assert block_shard(block) == SHARD
    assert carried_columns(block).to_pydict() == {"label": ["x", None]}


def test_a_row_that_fails_although_some_of_its_samples_are_known_fails_for_the_others() -> None:
    asked = Sampling(n=3).as_json
    known: dict[SampleKey, Outcome] = {
        (11, index): replace(completion(11, index), sampling=asked) for index in (0, 2)
    }
    items = with_known([PREPARED, FAILURE], known)
    assert items == [PREPARED, replace(FAILURE, sample_index=1)]
    assert samples_asked([PREPARED, FAILURE], known.values()) == {10: 2, 11: 3}
    assert with_known([PREPARED, FAILURE], {}) == [PREPARED, FAILURE]
    known[11, 1] = replace(completion(11, 1), sampling=asked)
    left = with_known([PREPARED, FAILURE], known)
    assert left == [PREPARED]
    assert samples_asked(left, known.values()) == {10: 2, 11: 3}


def test_a_row_that_is_ready_asks_for_what_it_says_now_whatever_the_journal_says() -> None:
    known = [replace(completion(10), sampling=Sampling(n=5).as_json)]
    assert samples_asked([PREPARED], known) == {10: 2}


def test_no_column_of_the_users_can_clash_with_ours_in_a_block() -> None:
    columns = pa.table({"shard": [1, 2], "input_row": [3, 4], "row": [5, 6]})
    block = input_block(SHARD, columns)
    assert block_shard(block) == SHARD
    assert block.column("input_row").to_pylist() == [10, 11]


def test_a_shard_without_carried_columns_keeps_its_rows() -> None:
    block = prepared_block(SHARD, [PREPARED, FAILURE], pa.table({"x": [1, 2]}).select([]))
    assert block.num_rows == 2
    assert carried_columns(block).num_columns == 0
    table = part_table(SHARD, [completion(10), FAILURE], carried_columns(block), model="m")
    assert table.schema == OUTPUT_SCHEMA


def test_a_part_is_in_order_of_row_and_sample_with_carried_values_beside() -> None:
    outcomes: list[Outcome] = [FAILURE, completion(10, 1), completion(10, 0)]
    table = part_table(SHARD, outcomes, pa.table({"label": ["x", "y"]}), model="m")
    assert table.select(["input_row", "sample_index", "label"]).to_pylist() == [
        {"input_row": 10, "sample_index": 0, "label": "x"},
        {"input_row": 10, "sample_index": 1, "label": "x"},
        {"input_row": 11, "sample_index": 0, "label": "y"},
    ]
    assert table.schema.names[: len(OUTPUT_SCHEMA)] == OUTPUT_SCHEMA.names


def test_a_failure_has_code_message_seed_and_no_text() -> None:
    shard = Shard(0, "s3://b/a.parquet", 11, 1)
    (record,) = part_table(shard, [FAILURE], pa.table({"l": [1]}), model="m").to_pylist()
    assert record["status"] == "errored"
    assert (record["error_code"], record["error_message"]) == ("image_invalid", "broken")
    assert (record["text"], record["finish_reason"], record["seed"]) == (None, None, 7)
    assert record["completion_tokens"] == 0


def test_records_survive_the_trip_through_arrow_with_all_they_can_hold() -> None:
    tops = [
        {"token": "a", "token_id": 1, "logprob": -0.1},
        {"token": "\ufffd", "token_id": 2, "logprob": -2.5},
    ]
    tokens = [
        {"token": "a", "token_id": 1, "logprob": -0.1, "top_logprobs": tops},
        {"token": "", "token_id": 3, "logprob": -9.0, "top_logprobs": []},
    ]
    places = [
        None,
        {"token_id": 5, "logprob": -0.25, "rank": 1},
        {"token_id": 6, "logprob": -7.5, "rank": 340},
    ]
    outcomes: list[Outcome] = [
        replace(
            completion(10),
            stop_reason="\n\n",
            logprobs=pa.array(tokens, TOKEN),
            tool_calls=(ToolCall("call-1", "f", '{"x": 1}'),),
            prompt_logprobs=pa.array(places, PROMPT_TOKEN),
            sampling='{"n": 1}',
        ),
        replace(completion(10, 2), finished_at=1_795_608_000.123),
        replace(
            completion(10, 1),
            logprobs=pa.array([], TOKEN),
            code=ErrorCode.SCHEMA_VIOLATION,
            message="m",
        ),
        replace(FAILURE, sampling="{}", finished_at=1_795_608_000.0),
        Failure(12, "c", ErrorCode.BATCH_EXPIRED, "m", seed=1, status=Status.EXPIRED),
    ]
    table = record_table(SHARD, outcomes, model="m")
    assert read_records(table) == outcomes
    assert table.column("logprobs").to_pylist() == [tokens, None, [], None, None]
    assert table.column("prompt_logprobs")[0].as_py() == places
    assert read_records(table.slice(2)) == outcomes[2:]


def test_records_of_an_earlier_version_are_read_without_their_time() -> None:
    table = record_table(SHARD, [replace(completion(10), finished_at=7.0)], model="m")
    assert read_records(table.drop_columns(["finished_at"])) == [completion(10)]


def test_a_completion_that_is_not_what_was_asked_for_is_errored_and_keeps_its_text() -> None:
    cut = replace(completion(10), code=ErrorCode.LENGTH, message="cut")
    (record,) = record_table(SHARD, [cut], model="m").to_pylist()
    assert (record["status"], record["error_code"], record["text"]) == ("errored", "length", "text")
    assert (record["completion_tokens"], record["finish_reason"]) == (2, "stop")


def test_no_error_message_is_longer_than_people_read() -> None:
    failure = replace(FAILURE, message="x" * 1_000_000)
    (record,) = record_table(SHARD, [failure], model="m").to_pylist()
    assert len(record["error_message"]) == 4_000


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["label"], {"label": "label"}),
        (["text", "model"], {"text": "input_text", "model": "input_model"}),
        (["text", "input_text"], {"text": "input_text", "input_text": "input_input_text"}),
    ],
)
def test_a_clash_with_an_output_column_gets_a_prefix(
    names: list[str], expected: dict[str, str]
) -> None:
    assert carried_names(names) == expected


def test_records_of_a_run_that_began_before_the_digests_are_read_without_them() -> None:
    table = record_table(SHARD, [completion(10)], model="m")
    earlier = table.drop_columns(["prompt_digest", "completion_digest"])
    assert read_records(earlier) == [completion(10)]


def test_an_image_that_many_rows_share_lies_in_the_block_once() -> None:
    shared, own = bytes(10**6), b"own"
    items = [
        replace(PREPARED, input_row=row, images=(shared, own, shared) if row % 2 else (shared,))
        for row in range(128)
    ]
    block = prepared_block(SHARD, items, pa.table({"label": ["x"] * 128}))
    assert block.nbytes < 1.2 * 10**6
    found = [item for item in read_prepared(block) if isinstance(item, Prepared)]
    assert [item.images for item in found] == [item.images for item in items]
    assert len({id(item.images[0]) for item in found}) == 1
    assert count_images(block) == 64 * 4
