"""A replica: each row one outcome, never more in the engine than the window, faults contained."""

import io
import threading

import pytest
from PIL import Image

from pipeline.errors import EngineError, ErrorCode
from pipeline.records import Completion, Failure, Outcome, Prepared
from pipeline.replica import Replica
from pipeline.sampling import Sampling
from tests.fakes import EchoEngine


def row(number: int, *, n: int = 1, token: int = 1, images: tuple[bytes, ...] = ()) -> Prepared:
    return Prepared(
        input_row=number,
        custom_id=f"row-{number}",
        token_ids=[token],
        images=images,
        image_tokens=0,
        prompt_tokens=1,
        sampling=Sampling(n=n),
        seeds=tuple(range(n)),
    )


def png() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "PNG")
    return sink.getvalue()


def nothing(_: Outcome) -> None:
    return None


def test_every_row_and_sample_has_one_outcome_and_each_is_announced_once() -> None:
    announced: list[Outcome] = []
    replica = Replica(EchoEngine, window=4)
    failure = Failure(99, "bad", ErrorCode.INVALID_MESSAGES, "m", seed=1)
    outcomes = replica.generate(0, [row(1), row(2, n=3), failure], announced.append)
    replica.shutdown()
    keys = sorted((outcome.input_row, outcome.sample_index) for outcome in outcomes)
    assert keys == [(1, 0), (2, 0), (2, 1), (2, 2), (99, 0)]
    assert sorted(map(repr, announced)) == sorted(map(repr, outcomes))


def test_the_window_bounds_what_is_in_the_engine_over_all_shards() -> None:
    engine = EchoEngine(delay_s=0.005)
    replica = Replica(lambda: engine, window=5)
    rows = [row(number) for number in range(40)]
    threads = [
        threading.Thread(target=replica.generate, args=(shard, rows, nothing)) for shard in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    replica.shutdown()
    assert engine.peak == 5
    assert len(engine.requests) == 120


def test_a_refused_row_and_a_corrupt_image_cost_only_themselves() -> None:
    replica = Replica(lambda: EchoEngine(refuse_token=66), window=4)
    rows = [row(1), row(2, token=66), row(3, images=(png()[:40],)), row(4, images=(png(),))]
    outcomes = {outcome.input_row: outcome for outcome in replica.generate(0, rows, nothing)}
    replica.shutdown()
    assert isinstance(outcomes[1], Completion)
    assert isinstance(outcomes[4], Completion)
    refused, corrupt = outcomes[2], outcomes[3]
    assert isinstance(refused, Failure)
    assert isinstance(corrupt, Failure)
    assert (refused.code, corrupt.code) == (ErrorCode.ENGINE_REJECTED, ErrorCode.IMAGE_INVALID)


def test_a_dead_engine_is_the_shards_error_not_a_rows() -> None:
    replica = Replica(lambda: EchoEngine(die_token=13), window=4)
    with pytest.raises(EngineError, match="died"):
        replica.generate(0, [row(1), row(2, token=13)], nothing)
    replica.shutdown()


def test_shutdown_stops_the_engine_once() -> None:
    engine = EchoEngine()
    replica = Replica(lambda: engine, window=1)
    replica.shutdown()
    replica.shutdown()
    assert engine.stopped == 1
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_an_engine_that_cannot_start_raises_where_the_replica_is_made() -> None:
    def fail() -> EchoEngine:
        raise EngineError("no such model")

    with pytest.raises(EngineError, match="no such model"):
        Replica(fail, window=1)
    assert not any(thread.name == "engine" for thread in threading.enumerate())
