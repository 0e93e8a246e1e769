"""Replayed records beside those recorded: what is equal, and what a difference is put down to."""

from typing import Any

import pyarrow as pa
import pytest

from jobs.verify.asked import TODAY_SAMPLING, TODAY_SEEDS, Asked, as_recorded
from jobs.verify.checks import State
from jobs.verify.choose import Chosen
from jobs.verify.compare import Replay, compare
from jobs.verify.outcome import replay_check
from pipeline.commit import PartStats, StoredPart
from pipeline.errors import ErrorCode
from pipeline.plan import Shard
from pipeline.records import (
    Completion,
    Failure,
    Outcome,
    Prepared,
    carried_columns,
    part_table,
    prepared_block,
    read_prepared,
)
from pipeline.sampling import Sampling

SHARD = Shard(0, "s3://b/a.parquet", 10, 1)
SAMPLING = Sampling(temperature=0.7, n=3)
CPU, GPU = "2 x CPU", "8 x NVIDIA H100 80GB HBM3, 81559 MiB"


def completion(**changes: Any) -> Completion:
    values = {
        "input_row": 10,
        "custom_id": "a",
        "sample_index": 0,
        "text": "one two three",
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "cached_tokens": 0,
        "image_tokens": 0,
        "seed": 7,
        "latency_s": 0.1,
        "sampling": SAMPLING.as_json,
        "prompt_digest": "p",
        "completion_digest": "c",
    }
    return Completion(**{**values, **changes})


def table(outcomes: list[Outcome], today: dict[str, Any] | None = None) -> pa.Table:
    seen = {TODAY_SAMPLING: [SAMPLING.as_json], TODAY_SEEDS: [[7, 8, 9]]} | (today or {})
    return part_table(SHARD, outcomes, pa.table(seen), model="m")


def chosen(hardware: str = CPU, engine: str = "e", **changes: Any) -> Chosen:
    (record,) = table([completion(**changes)]).drop_columns([TODAY_SAMPLING]).to_pylist()
    return Chosen(record, 0, hardware, engine)


def replayed(
    now: list[Outcome],
    before: list[Chosen] | None = None,
    *,
    today: dict[str, Any] | None = None,
    hardware: str = CPU,
    environment: tuple[str, ...] = (),
    dtype: str = "float32",
) -> Replay:
    stats = PartStats(0, {}, 1, {}, replica={"hardware": hardware})
    part = StoredPart(table(now, today), stats, "x", "x")
    samples = {(SHARD.uri, 10): before or [chosen()]}
    return compare(samples, [part], environment=environment, engine="e", dtype=dtype, seconds=1.0)


def test_the_same_text_and_tokens_are_equal_whatever_the_latency() -> None:
    found = replayed([completion(latency_s=9.0)])
    assert (found.sampled, found.text_equal, found.token_equal) == (1, 1, 1)
    assert (found.mismatches, found.mismatch_rate) == ((), 0.0)


def test_a_text_of_other_tokens_is_text_equal_and_yet_a_mismatch() -> None:
    found = replayed([completion(completion_digest="other")])
    assert (found.text_equal, found.token_equal, len(found.mismatches)) == (1, 0, 1)
    assert found.mismatches[0].difference == "completion_digest: c -> other"


def test_records_without_digests_are_compared_by_the_number_of_tokens() -> None:
    old = [chosen(completion_digest=None)]
    assert replayed([completion()], old).token_equal == 1
    assert replayed([completion(completion_tokens=4)], old).token_equal == 0


def test_the_first_difference_of_two_texts_is_shown_side_by_side() -> None:
    (mismatch,) = replayed([completion(text="one too three")]).mismatches
    assert mismatch.difference == "at character 5: 'one two three' was, 'one too three' is"
    assert mismatch.recorded["text"] == "one two three"
    assert mismatch.replayed["text"] == "one too three"
    assert mismatch.reasons == ("unknown: request, engine, versions and hardware are the same",)


def test_reasons_name_what_differs() -> None:
    now = completion(text="x", prompt_digest="q", cached_tokens=16)
    other = Sampling(temperature=0.5, n=3).as_json
    found = replayed(
        [now],
        [chosen(engine="f")],
        today={TODAY_SAMPLING: [other], TODAY_SEEDS: [[1, 2, 3]]},
        hardware=GPU,
        environment=("torch 2.13.0 -> 2.14.0",),
    )
    assert found.mismatches[0].reasons == (
        "the prompt: its tokens or images differ from those recorded",
        "sampling.temperature: 0.7 -> 0.5",
        "the seed that config and row give",
        "torch 2.13.0 -> 2.14.0",
        "engine arguments: the row was made with others than run.json has",
        f"hardware: {CPU} -> {GPU}",
        "prefix cache: 0 -> 16 tokens found in it",
    )
    assert "the seed that config and row give (1 records)" in found.requests


def test_on_the_same_gpus_the_batch_may_be_the_reason() -> None:
    found = replayed([completion(text="x")], [chosen(hardware=GPU)], hardware=GPU)
    assert found.mismatches[0].reasons == (
        "batch: on GPUs the numbers depend on what else is in the batch",
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_in_half_precision_the_batch_may_be_the_reason_on_cpus_too(dtype: str) -> None:
    found = replayed([completion(text="x")], dtype=dtype)
    assert found.mismatches[0].reasons == (
        f"batch: with dtype {dtype} the numbers depend on what else is in the batch",
    )


def test_a_row_that_fails_today_is_a_mismatch_of_each_of_its_samples() -> None:
    failure = Failure(10, "a", ErrorCode.IMAGE_NOT_FOUND, "gone", seed=7)
    before = [chosen(), chosen(sample_index=2, seed=9)]
    found = replayed([failure], before, today={TODAY_SAMPLING: [None], TODAY_SEEDS: [[7]]})
    assert (found.sampled, len(found.mismatches)) == (2, 2)
    assert found.mismatches[0].difference == "image_not_found: gone"
    assert found.mismatches[1].sample_index == 2


def test_samples_are_told_apart_however_few_of_a_row_were_chosen() -> None:
    before = [chosen(sample_index=1, seed=8, text="b"), chosen(sample_index=2, seed=9, text="c")]
    now: list[Outcome] = [
        completion(sample_index=0, seed=8, text="b"),
        completion(sample_index=1, seed=9, text="c"),
    ]
    found = replayed(now, before)
    assert (found.text_equal, found.mismatches, found.requests) == (2, (), ())


def test_a_share_of_mismatches_may_be_allowed() -> None:
    found = replayed([completion(text="x")])
    assert replay_check(found, 0.5).state is State.FAULT
    assert replay_check(found, 1.0).state is State.OK


def test_a_replayed_block_asks_for_what_was_recorded_and_tells_what_today_gives() -> None:
    item = Prepared(10, "a", [1, 2], (), 0, 2, Sampling(n=3), (1, 2, 3), "d")
    failed = Failure(11, "b", ErrorCode.IMAGE_INVALID, "m", 5)
    shard = Shard(0, "u", 10, 2)
    block = prepared_block(shard, [item, failed], pa.table({"label": [1, 2]}))
    asked = Asked(SAMPLING.as_json, (8, 9))
    changed = as_recorded(block, asked={("u", 10): asked, ("u", 11): asked})
    first, second = read_prepared(changed)
    assert isinstance(first, Prepared)
    assert (first.seeds, first.sampling.n, first.sampling.temperature) == ((8, 9), 2, 0.7)
    assert (list(first.token_ids), first.digest) == ([1, 2], "d")
    assert second == failed
    assert carried_columns(changed).to_pydict() == {
        TODAY_SAMPLING: [Sampling(n=3).as_json, None],
        TODAY_SEEDS: [[1, 2, 3], [5]],
    }
