"""A replica: each row one outcome, never more in the engine than the window, faults contained.

The engine is the echo engine; tests/integration/test_engine_death.py kills the real one.
"""

import asyncio
import gc
import io
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
from PIL import Image

from jobs.bench.null_engine import start_null_engine
from pipeline.admission import AdmissionWindow, EngineLoad
from pipeline.cpu import Meter
from pipeline.digests import digest_tokens
from pipeline.engine import EngineOutput, EngineRequest
from pipeline.engine_spec import EngineSpec
from pipeline.errors import EngineError, EngineRefusalError, ErrorCode, TransientRowError
from pipeline.records import Completion, Failure, Outcome, Prepared, Status
from pipeline.replica import Replica, ReplicaLimits, within
from pipeline.sampling import Sampling
from pipeline.structured import StructuredOutputs, json_structure
from pipeline.tools import Choice, ToolUse
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


def structured(asked: dict[str, Any], number: int = 0) -> Prepared:
    """A row whose answer, ``0:1``, is to have a structure."""
    shape = StructuredOutputs.model_validate(asked).structure
    return replace(row(number), sampling=Sampling(structure=shape))


KILLER = 13
DEFAULTS = ReplicaLimits()


class Engines:
    """Starts echo engines, and keeps them."""

    def __init__(self, make: Callable[[], EchoEngine] = EchoEngine) -> None:
        self.make = make
        self.started: list[EchoEngine] = []

    def __call__(self) -> EchoEngine:
        self.started.append(self.make())
        return self.started[-1]

    def asked(self, row: int) -> int:
        """How often this row of shard 0 was put to any engine."""
        ids = [request.request_id for engine in self.started for request in engine.requests]
        return ids.count(f"0-{row}-0")


class PromptedEngine(EchoEngine):
    """Does something as its n-th request comes in."""

    def __init__(
        self, nth: int, act: Callable[[], object], *, delay_s: float = 0.0, slow_token: int = -1
    ) -> None:
        super().__init__(delay_s=delay_s, slow_token=slow_token)
        self._nth = nth
        self._act = act

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """The echo's."""
        if len(self.requests) + 1 == self._nth:
            self._act()
        return await super().generate(request)


def generate(
    rows: Sequence[Prepared | Failure],
    engines: Callable[[], EchoEngine],
    limits: ReplicaLimits = DEFAULTS,
    *,
    window: int,
) -> list[Outcome]:
    replica = Replica(engines, limits, AdmissionWindow(window, window))
    try:
        return [outcome for batch in replica.generate(0, rows) for outcome in batch]
    finally:
        replica.shutdown()


def by_row(outcomes: Sequence[Outcome]) -> dict[int, Outcome]:
    assert len({outcome.key for outcome in outcomes}) == len(outcomes)
    return {outcome.input_row: outcome for outcome in outcomes}


def failures(outcomes: Sequence[Outcome]) -> dict[int, ErrorCode]:
    return {o.input_row: o.code for o in outcomes if isinstance(o, Failure)}


@pytest.mark.parametrize(
    ("asked", "finish_reason", "code"),
    [
        ({"regex": "0:[0-9]+"}, "stop", None),
        ({"choice": ["a"]}, "stop", ErrorCode.SCHEMA_VIOLATION),
        ({"json": {"type": "object"}}, "stop", ErrorCode.SCHEMA_VIOLATION),
        ({"json": {"type": "object"}}, "length", ErrorCode.LENGTH),
        ({"regex": "0:[0-9]+"}, "length", ErrorCode.LENGTH),
        ({"grammar": "root ::= x"}, "length", ErrorCode.LENGTH),
    ],
)
def test_an_answer_without_its_structure_is_errored_and_kept(
    asked: dict[str, Any], finish_reason: str, code: ErrorCode | None
) -> None:
    engines = Engines(lambda: EchoEngine(finish_reason=finish_reason))
    (outcome,) = generate([structured(asked)], engines, window=4)
    assert isinstance(outcome, Completion)
    assert (outcome.code, outcome.text, outcome.attempts) == (code, "0:1", 1)
    assert json.loads(outcome.sampling or "")["structure"]["kind"]


@pytest.mark.parametrize("reason", ["repetition", "abort", "error", "None", "a new one"])
def test_an_answer_that_ends_in_any_other_way_is_errored_and_kept(reason: str) -> None:
    engines = Engines(lambda: EchoEngine(finish_reason=reason))
    (outcome,) = generate([row(0)], engines, window=4)
    assert isinstance(outcome, Completion)
    assert (outcome.status, outcome.code) == (Status.ERRORED, ErrorCode.ENGINE_ERROR)
    assert (outcome.text, outcome.finish_reason) == ("0:1", reason)
    assert repr(reason) in str(outcome.message)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_row_at_which_the_engine_fails_is_tried_again(failures: int) -> None:
    faults = [TransientRowError(ErrorCode.ENGINE_ERROR, "no image")] * failures
    engines = Engines(lambda: EchoEngine(faults=faults))
    (outcome,) = generate([row(0)], engines, window=4)
    assert (outcome.status, outcome.attempts) == (Status.SUCCEEDED, failures + 1)
    assert len(engines.started) == 1


def test_a_row_at_which_the_engine_fails_time_after_time_is_errored() -> None:
    faults = [TransientRowError(ErrorCode.ENGINE_ERROR, "no image")] * 9
    engines = Engines(lambda: EchoEngine(faults=faults))
    (outcome,) = generate([row(0)], engines, window=4)
    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.message, outcome.attempts) == ("engine_error", "no image", 3)


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("fault", [MemoryError("32 GB"), KeyError(5), AssertionError(), Panic("p")])
def test_any_other_fault_is_that_rows_record_and_the_others_complete(fault: BaseException) -> None:
    engines = Engines(lambda: EchoEngine(faults=[fault]))
    outcomes = generate([row(number) for number in range(9)], engines, window=1)
    assert len(outcomes) == 9
    (failed,) = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert failed.code is ErrorCode.INTERNAL_ERROR
    assert failed.message.startswith(type(fault).__name__)


@pytest.mark.parametrize("asked", [{"json": {"properties": {"a": {"type": "integer"}}}}, None])
def test_a_text_with_half_a_surrogate_pair_costs_its_own_row_only(
    asked: dict[str, Any] | None,
) -> None:
    rows = [structured(asked) if asked else row(0)]
    (done,) = said('{"a": "\\ud83d"}', *rows)
    assert (done.text, done.code) == (
        '{"a": "\\ud83d"}',
        ErrorCode.SCHEMA_VIOLATION if asked else None,
    )
    (raw,) = said("a\ud83db", *rows)
    assert raw.text == "a\ufffdb"
    assert raw.code is done.code


def test_a_cut_answer_without_a_structure_succeeds() -> None:
    engines = Engines(lambda: EchoEngine(finish_reason="length"))
    (outcome,) = generate([row(0)], engines, window=4)
    assert (outcome.status, outcome.code) == (Status.SUCCEEDED, None)


def test_every_row_and_sample_has_one_outcome() -> None:
    failure = Failure(99, "bad", ErrorCode.INVALID_MESSAGES, "m", seed=1)
    outcomes = generate([row(1), row(2, n=3), failure], EchoEngine, window=4)
    assert sorted(o.key for o in outcomes) == [(1, 0), (2, 0), (2, 1), (2, 2), (99, 0)]


def test_outcomes_come_while_others_are_still_in_the_engine() -> None:
    engines = Engines(lambda: EchoEngine(delay_s=0.01, slow_token=66))
    replica = Replica(engines, ReplicaLimits(flush_s=0.5), AdmissionWindow(8, 8))
    batches = replica.generate(0, [row(1), row(2), row(3, token=66)])
    found: set[int] = set()
    while len(found) < 2:
        found |= {outcome.input_row for outcome in next(batches)}
    assert found == {1, 2}
    assert engines.started[0].running == 1
    replica.drain(0)
    assert list(batches) == []
    replica.shutdown()


def test_a_batch_is_given_before_its_time_once_it_is_full() -> None:
    limits = ReplicaLimits(flush_s=60, flush_rows=5)
    replica = Replica(lambda: EchoEngine(delay_s=0.02), limits, AdmissionWindow(1, 1))
    sizes = [len(batch) for batch in replica.generate(0, [row(i) for i in range(12)])]
    replica.shutdown()
    assert len(sizes) >= 2
    assert sum(sizes) == 12


def test_the_window_bounds_what_is_in_the_engine_over_all_shards() -> None:
    engine = EchoEngine(delay_s=0.005)
    replica = Replica(lambda: engine, ReplicaLimits(), AdmissionWindow(5, 5))
    rows = [row(number) for number in range(40)]
    threads = [
        threading.Thread(target=lambda shard: list(replica.generate(shard, rows)), args=(shard,))
        for shard in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    replica.shutdown()
    assert engine.peak == 5
    assert len(engine.requests) == 120


def test_a_refused_row_and_a_corrupt_image_cost_only_themselves() -> None:
    rows = [row(1), row(2, token=66), row(3, images=(png()[:40],)), row(4, images=(png(),))]
    outcomes = generate(rows, lambda: EchoEngine(refuse_token=66), window=4)
    assert failures(outcomes) == {2: ErrorCode.ENGINE_REJECTED, 3: ErrorCode.IMAGE_INVALID}
    assert isinstance(by_row(outcomes)[1], Completion)
    assert isinstance(by_row(outcomes)[4], Completion)


def test_a_row_over_its_time_is_aborted_in_the_engine_and_costs_only_itself() -> None:
    engines = Engines(lambda: EchoEngine(slow_token=66))
    limits = ReplicaLimits(row_timeout_s=2)
    outcomes = generate([row(1), row(2, token=66), row(3)], engines, limits, window=2)
    assert failures(outcomes) == {2: ErrorCode.TIMEOUT}
    assert engines.started[0].aborted == ["0-2-0"]
    assert len(engines.started) == 1


@pytest.mark.parametrize("position", [0, 31, 63])
def test_the_row_that_kills_the_engine_is_found_and_all_others_complete(position: int) -> None:
    engines = Engines(lambda: EchoEngine(delay_s=0.01, die_token=KILLER))
    rows = [row(i, token=KILLER if i == position else 1) for i in range(200)]
    outcomes = by_row(generate(rows, engines, window=64))
    fatal = outcomes.pop(position)
    assert isinstance(fatal, Failure)
    assert fatal.code == ErrorCode.ENGINE_FATAL
    assert fatal.attempts == engines.asked(position) >= 3
    assert len(outcomes) == 199
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert len(engines.started) - 1 <= 8  # log2(64) + 2
    assert all(engine.stopped == 1 for engine in engines.started)


def test_several_rows_that_kill_the_engine_are_all_found() -> None:
    engines = Engines(lambda: EchoEngine(delay_s=0.01, die_token=KILLER))
    rows = [row(i, token=KILLER if i in (3, 4, 60) else 1) for i in range(100)]
    outcomes = generate(rows, engines, window=16)
    assert failures(outcomes) == dict.fromkeys((3, 4, 60), ErrorCode.ENGINE_FATAL)
    assert len(outcomes) == 100


def test_an_engine_that_is_killed_from_outside_costs_no_row() -> None:
    def killed_when_full() -> EchoEngine:
        if engines.started:
            return EchoEngine()
        return PromptedEngine(8, lambda: engines.started[0].kill(), delay_s=1)

    engines = Engines(killed_when_full)
    replica = Replica(engines, ReplicaLimits(flush_s=0.05), AdmissionWindow(8, 8))
    outcomes = [o for batch in replica.generate(0, [row(i) for i in range(8)]) for o in batch]
    replica.shutdown()
    assert len(outcomes) == 8
    assert failures(outcomes) == {}
    assert replica.engine_restarts == 1
    assert {o.attempts for o in outcomes} == {2}


def test_an_engine_that_stands_still_is_started_again() -> None:
    engines = Engines(lambda: EchoEngine(delay_s=0.01, hang_token=KILLER))
    rows = [row(i, token=KILLER if i == 5 else 1) for i in range(20)]
    outcomes = generate(rows, engines, ReplicaLimits(stall_s=0.3), window=8)
    assert failures(outcomes) == {5: ErrorCode.ENGINE_FATAL}
    assert "no progress for 0.3 s" in str(by_row(outcomes)[5])
    assert len(outcomes) == 20


def test_a_request_that_is_lost_while_others_go_on_is_found_and_costs_only_itself() -> None:
    engines = Engines(lambda: EchoEngine(delay_s=0.01, slow_token=KILLER))
    asked = Sampling(max_completion_tokens=1)
    rows = [replace(row(i, token=KILLER if i == 5 else 1), sampling=asked) for i in range(1500)]
    limits = ReplicaLimits(stall_s=0.3, lost_steps=30)
    outcomes = generate(rows, engines, limits, window=4)
    assert failures(outcomes) == {5: ErrorCode.ENGINE_FATAL}
    assert "row 5 of shard 0 waits" in str(by_row(outcomes)[5])
    assert len(outcomes) == 1500
    assert 3 <= len(engines.started) - 1 <= 5


def test_a_request_that_takes_as_long_as_it_may_is_not_lost() -> None:
    engines = Engines(lambda: EchoEngine(delay_s=2.0))
    asked = Sampling(max_completion_tokens=1000)  # 16,000 steps, of which the engine makes 400
    limits = ReplicaLimits(stall_s=0.3, lost_steps=30)
    (outcome,) = generate([replace(row(0), sampling=asked)], engines, limits, window=4)
    assert (outcome.status, outcome.attempts) == (Status.SUCCEEDED, 1)


def test_a_start_that_takes_too_long_is_given_up_from_outside() -> None:
    reasons: list[str] = []
    given_up = threading.Event()

    def give_up(reason: str) -> None:
        reasons.append(reason)
        given_up.set()

    def hang() -> EchoEngine:
        assert given_up.wait(60)
        return EchoEngine()

    within(0.1, give_up, hang)
    within(60, give_up, EchoEngine)
    assert reasons == ["the engine was not up within limits.start_s = 0.1 s"]


def test_an_engine_that_dies_on_every_row_is_the_replicas_error() -> None:
    engines = Engines(lambda: EchoEngine(die_token=1))
    with pytest.raises(EngineError, match="again and again: died"):
        generate([row(i) for i in range(50)], engines, window=8)
    assert len(engines.started) < 40


def test_an_engine_that_does_not_come_back_is_the_replicas_error() -> None:
    engines = Engines(lambda: EchoEngine(die_token=KILLER))

    def start_once() -> EchoEngine:
        if engines.started:
            raise EngineRefusalError("no such device")
        return engines()

    with pytest.raises(EngineError, match="no such device"):
        generate([row(1), row(2, token=KILLER)], start_once, window=4)


def test_a_drain_keeps_what_finishes_in_time_and_leaves_the_rest() -> None:
    engines = Engines(
        lambda: PromptedEngine(4, lambda: replica.drain(8), delay_s=0.1, slow_token=66)
    )
    replica = Replica(engines, ReplicaLimits(flush_s=30), AdmissionWindow(4, 4))
    rows = [row(0), row(1), row(2), row(3, token=66), *(row(i) for i in range(4, 40))]
    started = time.monotonic()
    outcomes = [o for batch in replica.generate(0, rows) for o in batch]
    assert time.monotonic() - started < 25
    assert {o.input_row for o in outcomes} == {0, 1, 2}
    assert engines.started[0].aborted == ["0-3-0"]
    assert list(replica.generate(1, [row(7)])) == []
    replica.shutdown()


def test_a_later_drain_counts_if_its_time_is_up_sooner() -> None:
    def drain() -> None:
        for grace_s in (60.0, 3.0, 60.0):
            replica.drain(grace_s)

    engines = Engines(lambda: PromptedEngine(2, drain, delay_s=0.1, slow_token=66))
    replica = Replica(engines, ReplicaLimits(flush_s=5), AdmissionWindow(2, 2))
    started = time.monotonic()
    outcomes = [o for batch in replica.generate(0, [row(0), row(1, token=66)]) for o in batch]
    assert time.monotonic() - started < 30
    assert [o.input_row for o in outcomes] == [0]
    replica.shutdown()


def test_a_drain_does_not_wait_for_an_engine_that_is_being_started() -> None:
    engines = Engines(lambda: EchoEngine(delay_s=0.02, die_token=KILLER))

    def start_slowly_again() -> EchoEngine:
        if engines.started:
            threading.Timer(0.2, replica.drain, args=(0.2,)).start()
            time.sleep(20)
        return engines()

    replica = Replica(start_slowly_again, ReplicaLimits(flush_s=0.1), AdmissionWindow(2, 2))
    rows = [row(0), row(1), row(2), row(3, token=KILLER), row(4)]
    started = time.monotonic()
    outcomes = [o for batch in replica.generate(0, rows) for o in batch]
    assert time.monotonic() - started < 18
    assert {o.input_row for o in outcomes} >= {0, 1}
    replica.shutdown()


def test_a_drain_keeps_answers_whose_structure_is_still_to_be_checked() -> None:
    class Drained(EchoEngine):
        async def generate(self, request: EngineRequest) -> EngineOutput:
            answer = await super().generate(request)
            replica.drain(0)
            return replace(answer, text=json.dumps([*range(300_000)]))

    replica = Replica(Drained, ReplicaLimits(), AdmissionWindow(4, 4))
    asked = structured({"json": {"type": "array", "items": {"type": "integer"}}})
    outcomes = [outcome for batch in replica.generate(0, [asked]) for outcome in batch]
    replica.shutdown()
    assert [(outcome.input_row, outcome.status) for outcome in outcomes] == [(0, "succeeded")]


def test_an_engine_that_dies_during_a_drain_is_not_started_again() -> None:
    def die() -> None:
        replica.drain(60)
        engines.started[0].kill()

    engines = Engines(lambda: PromptedEngine(2, die, delay_s=0.1))
    replica = Replica(engines, ReplicaLimits(flush_s=0.1), AdmissionWindow(4, 4))
    started = time.monotonic()
    assert list(replica.generate(0, [row(0), row(1)])) == []
    assert time.monotonic() - started < 30
    replica.shutdown()
    assert [engine.stopped for engine in engines.started] == [1]


def test_an_engine_that_died_is_let_go_before_the_next_one_starts() -> None:
    class Busy(EchoEngine):
        """With a task that holds on to it until it is cancelled, as vLLM has several."""

        def listen(self, on_step: Callable[[EngineLoad], None], cpu: Meter) -> None:
            super().listen(on_step, cpu)
            self.task = asyncio.get_running_loop().create_task(self.wait())

        async def wait(self) -> None:
            await asyncio.Event().wait()

        def shutdown(self) -> None:
            super().shutdown()
            self.task.cancel()

    started: list[ref[Busy]] = []
    left: list[int] = []

    def start() -> Busy:
        gc.collect()
        left.append(sum(one() is not None for one in started))
        engine = Busy(delay_s=0.01, die_token=KILLER)
        started.append(ref(engine))
        return engine

    rows = [row(number, token=KILLER if number == 5 else 1) for number in range(20)]
    outcomes = generate(rows, start, window=8)
    assert len(outcomes) == 20
    assert len(left) > 2
    assert set(left) == {0}


def test_shutdown_stops_the_engine_once() -> None:
    engine = EchoEngine()
    replica = Replica(lambda: engine, ReplicaLimits(), AdmissionWindow(1, 1))
    replica.shutdown()
    replica.shutdown()
    assert engine.stopped == 1
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_an_engine_that_cannot_start_raises_where_the_replica_is_made() -> None:
    def fail() -> EchoEngine:
        raise EngineRefusalError("no such model")

    with pytest.raises(EngineError, match="no such model"):
        Replica(fail, ReplicaLimits(), AdmissionWindow(1, 1))
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_a_start_that_fails_once_is_tried_again() -> None:
    tries: list[None] = []

    def fail_once() -> EchoEngine:
        tries.append(None)
        if len(tries) == 1:
            raise EngineError("killed while loading")
        return EchoEngine()

    assert len(generate([row(1)], fail_once, window=1)) == 1


class Talker(EchoEngine):
    """Says the same to everyone."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """Its text."""
        return replace(await super().generate(request), text=self.text)


def said(text: str, *rows: Prepared) -> list[Completion]:
    outcomes = generate(rows, lambda: Talker(text), window=2)
    return [outcome for outcome in by_row(outcomes).values() if isinstance(outcome, Completion)]


def offered(number: int, use: ToolUse, *, token: int = 1) -> Prepared:
    return replace(row(number, token=token), sampling=Sampling(tool_use=use))


AUTO = ToolUse(choice=Choice.AUTO)


def test_calls_of_offered_tools_are_read_and_the_text_stays() -> None:
    text = '[weather(city="Oslo", days=2), clock()]'
    (done,) = said(text, offered(0, AUTO))
    assert (done.text, done.finish_reason, done.code) == (text, "stop", None)
    assert [(call.name, call.arguments) for call in done.tool_calls] == [
        ("weather", '{"city": "Oslo", "days": 2}'),
        ("clock", "{}"),
    ]


def test_ids_of_calls_are_equal_in_a_replay_and_differ_otherwise() -> None:
    rows = [
        offered(0, AUTO),
        offered(1, AUTO),
        replace(offered(2, AUTO, token=7), custom_id="row-0"),
    ]
    first, again = said("[f(), f()]", *rows), said("[f(), f()]", *rows)
    ids = [call.id for done in first for call in done.tool_calls]
    assert ids == [call.id for done in again for call in done.tool_calls]
    assert len(set(ids)) == len(ids) == 6
    assert all(re.fullmatch("call_[0-9a-f]{24}", one) for one in ids)


def test_without_tools_no_text_is_a_call() -> None:
    (done,) = said("[f()]", row(0))
    assert done.tool_calls == ()


def test_a_named_tools_arguments_are_a_call_only_if_they_fit() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    named = ToolUse(choice=Choice.NAMED, name="f")
    asked = replace(row(0), sampling=Sampling(structure=json_structure(schema), tool_use=named))
    (done,) = said('{"a": 1}', asked)
    assert [(call.name, call.arguments) for call in done.tool_calls] == [("f", '{"a": 1}')]
    (wrong,) = said('{"a": "x"}', asked)
    assert (wrong.code, wrong.text, wrong.tool_calls) == ("schema_violation", '{"a": "x"}', ())


def test_the_engines_own_counts_are_those_of_the_outcomes_and_are_taken_once() -> None:
    replica = Replica(lambda: start_null_engine(EngineSpec("m", None, {}, {})), DEFAULTS)
    try:
        batches = list(replica.generate(0, [row(number) for number in range(40)]))
    finally:
        replica.shutdown()
    outcomes = [outcome for batch in batches for outcome in batch]
    assert replica.engine_tokens.take() == {
        "prompt": sum(outcome.prompt_tokens for outcome in outcomes),
        "completion": sum(o.completion_tokens for o in outcomes if isinstance(o, Completion)),
    }
    assert replica.engine_tokens.take() == {}


def test_a_completion_carries_the_digests_of_what_went_in_and_came_out() -> None:
    (outcome,) = generate([replace(row(1), digest="d")], EchoEngine, window=4)
    assert isinstance(outcome, Completion)
    assert outcome.prompt_digest == "d"
    assert outcome.completion_digest == digest_tokens(list(outcome.text.encode()))
