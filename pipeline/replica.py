"""generate: prepared rows -> outcomes, on one engine, several shards at a time.

In: shards' prepared rows, from several threads. Out: one outcome per sample, in batches as they
finish. Samples of all open shards wait in one backlog (see ``backlog``), and share one admission
window that follows the engine (see ``admission``), so that a shard's end is never a barrier.

An engine that dies, or stands still, is started again here. The requests that were inside are
tried again under quarantine (see ``quarantine``); the one that kills engines becomes a record, the
others complete. What lives on the asyncio loop stays there: threads only wait for batches.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from pipeline.admission import AdmissionWindow, EngineLoad
from pipeline.backlog import Backlog, Waiting, expected_steps, prefix_key
from pipeline.cpu import Meter, Step, thread_laps
from pipeline.engine import Engine, EngineOutput, EngineRequest
from pipeline.engine_tokens import EngineTokens
from pipeline.errors import (
    EngineError,
    EngineRefusalError,
    ErrorCode,
    RowError,
    TransientRowError,
)
from pipeline.experts import ExpertTokens
from pipeline.plan import OPEN_SHARDS
from pipeline.quarantine import Quarantine
from pipeline.records import (
    Completion,
    Failure,
    Outcome,
    Prepared,
    SampleKey,
    ToolCall,
    engine_failure,
    well_formed,
)
from pipeline.structured import Structure, is_closed, violation
from pipeline.tool_calls import read_calls

log = logging.getLogger(__name__)

_SHUTDOWN_S = 30.0  # vLLM's processes end within seconds; longer means they hang
_START_TRIES = 2
_START_PAUSE_S = 2.0
_DEATHS_BEYOND_HALVING = 5
"""Deaths in a row, beyond what halving a window takes, that put the engine itself at fault."""
_CONVICTIONS_IN_A_ROW = 3
"""Rows in a row that kill the engine: then the engine itself is at fault."""
_FAILURES_PER_SAMPLE = 3
"""Times an engine may fail at a sample, and go on, before that is the sample's record."""
_COMPLETE = ("stop", "length")
"""The finish reasons of a completion; whatever else an engine says is no success."""
_CHECKS_PER_STALL = 20
_STEPS_PER_EXPECTED = 16
"""Steps of the fastest rank for each that a request is expected to take: ranks differ in speed,
pipeline stages take turns, and preempted requests begin anew."""
_LET_GO_S = 0.1
"""What an engine's cancelled tasks get to end before the next start: that blocks the loop, and what
they hold would outlive it."""
_DRAIN_SLACK_S = 1.0
_LAST_CHECKS_S = 3.0
"""What answers get beyond that whose structure is still being checked: they are paid for."""
_POLL_S = 0.5

T = TypeVar("T")
Key = tuple[int, int, int]
"""(shard, input_row, sample_index)"""
_Waiting = Waiting[tuple["_Work", Key, Prepared]]


@dataclass(frozen=True, slots=True)
class ReplicaLimits:
    """Bounds of one replica."""

    row_timeout_s: float | None = None
    """Seconds one request may take in the engine; None = any."""
    stall_s: float = 300.0
    """Seconds without any progress of a busy engine after which it is started again."""
    lost_steps: int = 20_000
    """Steps of an engine that a request may wait, beyond 16 times the most that it takes itself,
    before it counts as lost; not sooner than after ``stall_s``."""
    start_s: float = 3600.0
    """Seconds an engine's start may take."""
    flush_s: float = 5.0
    """Longest time a finished outcome waits in a batch."""
    flush_rows: int = 256
    """Outcomes that make a batch before its time."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Where a replica's requests are."""

    limit: int
    """How many it may have inside."""
    inside: int
    """In its engine, or on their way."""
    waiting: int
    """Of open shards, not let in yet."""


class Replica:
    """An engine, the requests in flight on it, and its restarts."""

    def __init__(
        self,
        start_engine: Callable[[], Engine],
        limits: ReplicaLimits,
        window: AdmissionWindow | None = None,
    ) -> None:
        """Start the engine on a new loop and wait until it is ready.

        Args:
            start_engine: builds the engine; called on the loop's thread, again after each death.
            limits: bounds of this replica.
            window: how many requests the engine gets; one that knows nothing yet by default.

        Raises:
            EngineError: the engine could not be started.
        """
        self._start_engine = start_engine
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._window = window or AdmissionWindow()
        self._backlog: Backlog[tuple[_Work, Key, Prepared]] = Backlog(OPEN_SHARDS)
        self._inside = 0
        self._most_inside = 0
        self._gate = asyncio.Condition()
        self._quarantine: Quarantine[Key] = Quarantine()
        self._life: _Life | None = None
        self._broken: EngineError | None = None
        self._drain_until: float | None = None
        self._works: set[_Work] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._deaths_in_a_row = 0
        self._convictions_in_a_row = 0
        self.cpu = Meter()
        """What this process spends, by step."""
        self._loop_cpu = thread_laps(self._thread)
        self.engine_tokens = EngineTokens()
        """What its engines say they have processed."""
        self.expert_tokens = ExpertTokens()
        """Which experts those were sent to, if its engines tell."""
        self.engine_restarts = 0
        """Times the engine was started again."""
        try:
            self._wait(self._begin())
        except BaseException:
            self._stop_loop()
            raise

    @property
    def draining(self) -> bool:
        """Whether no more requests are admitted."""
        return self._drain_until is not None

    @property
    def requests(self) -> Requests:
        """Where its requests are just now; any thread may ask."""
        return Requests(self._window.limit, self._inside, len(self._backlog))

    def generate(
        self,
        shard: int,
        items: Sequence[Prepared | Failure],
        *,
        known: Collection[SampleKey] = frozenset(),
    ) -> Iterator[list[Outcome]]:
        """The outcomes of one shard in batches, at least every ``flush_s`` seconds.

        Blocks the calling thread between batches; several threads may be inside at once. Under
        ``drain`` it ends early: rows that were not finished have no outcome. Samples in ``known``
        are left out.

        Raises:
            EngineError: the engine died and cannot be brought back.
        """
        work = _Work(self._limits.flush_rows)
        now = _now()
        work.add(
            [
                replace(item, finished_at=now)
                for item in items
                if isinstance(item, Failure) and item.key not in known
            ]
        )
        waiting = [
            Waiting((work, (shard, item.input_row, index), item), prefix, _expected(item))
            for item in items
            if isinstance(item, Prepared)
            for prefix in (prefix_key(item.token_ids),)
            for index in range(item.sampling.n)
            if (item.input_row, index) not in known
        ]
        future = asyncio.run_coroutine_threadsafe(self._shard(work, waiting), self._loop)
        future.add_done_callback(lambda _: work.finish())
        try:
            # After a drain's grace the loop may be busy starting an engine: do not wait for it.
            is_drained = partial(self._is_drained, work)
            while not (work.finished or is_drained()):
                if batch := work.take(self._limits.flush_s, unless=is_drained):
                    yield batch
            if batch := work.take(0):
                yield batch
            if future.done() and not future.cancelled():
                future.result()
        finally:
            future.cancel()

    def take_cpu(self) -> dict[str, float]:
        """CPU seconds of this process by step since the last call."""
        return self.cpu.take({Step.ENGINE: self._loop_cpu})

    def drain(self, grace_s: float) -> None:
        """Admit no more requests; those inside may finish for ``grace_s`` seconds.

        Not undone; a later call counts if its time is up sooner.
        """
        until = time.monotonic() + grace_s
        if self._drain_until is not None and until > self._drain_until - _DRAIN_SLACK_S:
            return
        self._drain_until = until
        self._loop.call_soon_threadsafe(self._spawn, self._drained(grace_s))

    def shutdown(self) -> None:
        """Stop the engine and its processes, then the loop. Safe to call twice."""
        if self._loop.is_closed():
            return
        try:
            self._wait(self._end(), timeout=_SHUTDOWN_S)
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SHUTDOWN_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _wait(self, work: Coroutine[None, None, T], timeout: float | None = None) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run ``work`` as a task that nobody awaits, and hold on to it; call it on the loop."""
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _is_drained(self, work: _Work) -> bool:
        """Whether the grace of a drain is over, by a clock that needs no loop."""
        if self._drain_until is None:
            return False
        slack_s = _DRAIN_SLACK_S + (_LAST_CHECKS_S if work.answered else 0.0)
        return time.monotonic() > self._drain_until + slack_s

    # From here on everything runs on the loop.

    async def _begin(self) -> None:
        self._take_up(await self._started())
        self._spawn(self._watch())

    async def _end(self) -> None:
        for task in [*self._background]:
            task.cancel()
        if self._life is not None:
            self._life.shutdown()

    async def _started(self) -> Engine:
        for attempt in range(1, _START_TRIES + 1):
            try:
                return self._start_engine()
            except EngineRefusalError:
                raise
            except EngineError as error:
                if attempt == _START_TRIES:
                    raise
                log.warning("the engine did not start, once more: %s", error)
                await asyncio.sleep(_START_PAUSE_S)
        raise AssertionError("unreachable")

    async def _drained(self, grace_s: float) -> None:
        self._pump()
        async with self._gate:
            self._gate.notify_all()
        await asyncio.sleep(grace_s)
        for work in self._works:
            for task in work.tasks:
                task.cancel()

    def _take_up(self, engine: Engine) -> None:
        life = self._life = _Life(engine)

        def on_step(load: EngineLoad) -> None:
            life.steps[load.rank] += 1
            self.engine_tokens.add(load)
            self._window.observe(load, self._inside)
            self._pump()

        engine.listen(on_step, self.cpu)

    def _pump(self) -> None:
        """Let waiting samples in, as far as the window allows; under a drain, to be sent back."""
        while self.draining or self._inside < self._window.limit:
            chosen = self._backlog.pop()
            if chosen is None:
                return
            work, key, item = chosen
            if work.closed:
                continue
            if self.draining:
                work.ended(None)
                continue
            self._inside += 1
            self._most_inside = max(self._most_inside, self._inside)
            task = self._spawn(self._sample(key, item, work))
            work.tasks.add(task)
            task.add_done_callback(work.tasks.discard)

    async def _shard(self, work: _Work, waiting: Sequence[_Waiting]) -> None:
        self._works.add(work)
        ended = work.expect(len(waiting))
        self._backlog.add(waiting)
        self._pump()
        try:
            await ended
        finally:
            self._works.discard(work)
            work.closed = True
            for task in work.tasks:
                task.cancel()

    async def _sample(self, key: Key, item: Prepared, work: _Work) -> None:
        error: Exception | None = None
        try:
            outcome = await self._outcome(key, item, work)
            if outcome is not None:
                work.add([outcome])
        except Exception as failure:  # noqa: BLE001 - the shard's thread raises it
            error = failure
        finally:
            try:
                await self._leave(key)
            finally:
                self._inside -= 1
                work.ended(error)
                self._pump()

    async def _outcome(self, key: Key, item: Prepared, work: _Work) -> Outcome | None:
        """The sample's outcome, after as many engines as it takes; None if it was not admitted."""
        attempts = failures = 0
        try:
            patience = self._limits.lost_steps + _STEPS_PER_EXPECTED * _expected(item)
            while (life := await self._admitted(key)) is not None:
                attempts += 1
                started = time.monotonic()
                try:
                    request = _request(key, item)
                    output = await life.ask(key, request, self._limits.row_timeout_s, patience)
                except EngineError:
                    if self._is_fatal(life, key):
                        raise _fatal(attempts, life) from None
                except TransientRowError as error:
                    failures += 1
                    if failures == _FAILURES_PER_SAMPLE:
                        raise
                    log.info("row %d of shard %d is tried again: %s", key[1], key[0], error)
                else:
                    work.answer(asyncio.current_task())
                    self._deaths_in_a_row = self._convictions_in_a_row = 0
                    latency_s = time.monotonic() - started
                    self.expert_tokens.add(output.experts)
                    return await _checked(key, item, output, latency_s, attempts)
        except (EngineError, asyncio.CancelledError):
            raise
        except BaseException as error:  # noqa: BLE001 - told apart in _row_error
            return engine_failure(item, key[2], _row_error(error, item), attempts)
        return None

    async def _admitted(self, key: Key) -> _Life | None:
        """The engine, once ``key`` may enter it; None when no more are admitted.

        Raises:
            EngineError: there is no engine any more.
        """
        async with self._gate:
            while not self.draining:
                if self._broken is not None:
                    raise self._broken
                if self._life is not None and self._quarantine.admits(key):
                    return self._life
                await self._gate.wait()
        return None

    async def _leave(self, key: Key) -> None:
        """``key`` is through, one way or another: others may be waiting for that."""
        if self._quarantine.ended(key):
            async with self._gate:
                self._gate.notify_all()

    def _is_fatal(self, life: _Life, key: Key) -> bool:
        """The engine died with ``key`` inside: is it the one that kills engines?

        The first to notice takes the engine away, and has the next one started.
        """
        if life is self._life:
            self._life = None
            self._judge(life)
            self._spawn(self._restart(life))
        return key == life.convicted

    def _judge(self, life: _Life) -> None:
        life.convicted = self._quarantine.died(life.suspects)
        log.warning("the engine died with %d requests inside: %s", len(life.suspects), life.cause)
        if life.convicted is None:
            self._deaths_in_a_row += 1
            return
        self._deaths_in_a_row = 0
        self._convictions_in_a_row += 1
        shard, row, sample = life.convicted
        log.warning("row %d (sample %d) of shard %d kills the engine", row, sample, shard)

    async def _restart(self, life: _Life) -> None:
        try:
            life.shutdown()
            await asyncio.sleep(_LET_GO_S)
            if self.draining:  # nobody would enter the next one
                return
            self._give_up_on_a_broken_engine(life)
            self._take_up(await self._started())
            self.engine_restarts += 1
            log.info("the engine is back (restart %d)", self.engine_restarts)
        except EngineError as error:
            self._broken = error
        except Exception as error:  # noqa: BLE001 - a dead engine may fail in any way when stopped
            self._broken = EngineError(f"the engine cannot be started again: {error}")
        async with self._gate:
            self._gate.notify_all()

    def _give_up_on_a_broken_engine(self, life: _Life) -> None:
        halvings = math.ceil(math.log2(max(2, self._most_inside)))
        if (
            self._deaths_in_a_row > halvings + _DEATHS_BEYOND_HALVING
            or self._convictions_in_a_row >= _CONVICTIONS_IN_A_ROW
        ):
            raise EngineError(f"the engine dies again and again: {life.cause}")

    async def _watch(self) -> None:
        """End an engine that has requests inside and stands still, or has lost one of them."""
        last: tuple[_Life | None, int] = (None, 0)
        since = looked = time.monotonic()
        while True:
            await asyncio.sleep(self._limits.stall_s / _CHECKS_PER_STALL)
            life = self._life
            seen = (life, life.steps.total() if life else 0)
            now = time.monotonic()
            late, looked = now - looked > self._limits.stall_s / 2, now
            if life is None or not life.busy or seen != last or late:  # late: all stood still
                last, since = seen, now
                if life is not None and (key := life.lost(self._limits.stall_s)) is not None:
                    lost = f"row {key[1]} of shard {key[0]} waits, and others come and go"
                    life.end(EngineError(f"a rank stands still, or a request is lost: {lost}"))
            elif now - since > self._limits.stall_s:
                life.end(EngineError(f"no progress for {self._limits.stall_s:g} s"))


@dataclass(eq=False)
class _Work:
    """One shard's hand-over from the loop to the thread that waits for it."""

    flush_rows: int
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Of its samples that were let in and have no answer yet; on the loop."""
    answered: set[asyncio.Task[None]] = field(default_factory=set)
    """Of those whose answer is being checked; on the loop."""
    closed: bool = False
    """Whether its samples are no longer wanted; on the loop."""
    _left: int = 0
    _ended: asyncio.Future[None] | None = None
    _batch: list[Outcome] = field(default_factory=list)
    _finished: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def finished(self) -> bool:
        """Whether nothing more will be added."""
        return self._finished

    def expect(self, samples: int) -> asyncio.Future[None]:
        """Done once so many samples have ``ended``; on the loop."""
        self._left = samples
        self._ended = asyncio.get_running_loop().create_future()
        self._check_ended(None)
        return self._ended

    def answer(self, task: asyncio.Task[None] | None) -> None:
        """A task has its sample's answer, which no drain gives up any more."""
        assert task is not None
        self.tasks.discard(task)
        self.answered.add(task)
        task.add_done_callback(self.answered.discard)

    def ended(self, error: Exception | None) -> None:
        """One more sample has its outcome, or will have none; on the loop."""
        self._left -= 1
        self._check_ended(error)

    def _check_ended(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is not None:
            self._ended.set_exception(error)
        elif not self._left:
            self._ended.set_result(None)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self._batch.extend(outcomes)
            if len(self._batch) >= self.flush_rows:
                self._changed.notify()

    def finish(self) -> None:
        with self._changed:
            self._finished = True
            self._changed.notify()

    def take(
        self, timeout_s: float, *, unless: Callable[[], bool] = lambda: False
    ) -> list[Outcome]:
        """What came in within ``timeout_s``, or sooner if that is a batch full, or the end."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while (left := until - time.monotonic()) > 0 and not unless():
                if self._changed.wait_for(self._is_ready, min(left, _POLL_S)):
                    break
            batch, self._batch = self._batch, []
        return batch

    def _is_ready(self) -> bool:
        return self._finished or len(self._batch) >= self.flush_rows


@dataclass(slots=True)
class _Inside:
    """A request that an engine was given."""

    task: asyncio.Task[Any]
    entered: float = math.inf
    """When it was on its way to the model, by the monotonic clock; until then it is not lost."""
    last_step: float = math.inf
    """Of the engine, by which it should have been answered."""


class _Life:
    """One engine from its start to its end."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self.steps: Counter[int] = Counter()
        """What it has done so far, by rank: it stands still only if nothing is done."""
        self.suspects: dict[Key, None] = {}
        """Who was inside when it ended, and had no answer."""
        self.convicted: Key | None = None
        self.cause: str | None = None
        """Why it ended; the exception itself would hold on to the engine by its traceback."""
        self._inside: dict[Key, _Inside] = {}

    @property
    def busy(self) -> bool:
        """Whether requests are inside."""
        return bool(self._inside)

    def shutdown(self) -> None:
        """Stop the engine, and let go of it: a dead one holds gigabytes."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def end(self, cause: EngineError) -> None:
        """The engine is dead; everyone inside hears of it."""
        if self.cause is None:
            self.cause = str(cause)
            self.suspects = dict.fromkeys(self._inside)
            for inside in self._inside.values():
                if inside.task is not asyncio.current_task():  # whoever noticed raises it itself
                    inside.task.cancel()

    def lost(self, patience_s: float) -> Key | None:
        """A request that waits although others of its size would be through several times."""
        until, steps = time.monotonic() - patience_s, self._steps_of_fastest()
        for key, inside in self._inside.items():
            if inside.entered < until and steps > inside.last_step:
                return key
        return None

    def _steps_of_fastest(self) -> int:
        return max(self.steps.values(), default=0)

    async def ask(
        self, key: Key, request: EngineRequest, timeout_s: float | None, patience: float = math.inf
    ) -> EngineOutput:
        """The engine's answer.

        Args:
            key: names the sample.
            request: what is asked.
            timeout_s: seconds it may take; None: any.
            patience: steps the engine may make after it entered before it counts as lost.

        Raises:
            RowError: it refuses the request, or took more than ``timeout_s``: then it is aborted.
            EngineError: it died meanwhile.
        """
        if self.cause is not None:
            raise EngineError(self.cause)
        engine = self._engine
        assert engine is not None
        task = asyncio.current_task()
        assert task is not None
        inside = self._inside[key] = _Inside(task)

        def enter() -> None:
            inside.entered = time.monotonic()
            inside.last_step = self._steps_of_fastest() + patience

        try:
            async with asyncio.timeout(timeout_s) as limit:
                output = await engine.generate(replace(request, on_entry=enter))
        except TimeoutError:
            if not limit.expired():
                raise
            raise RowError(ErrorCode.TIMEOUT, f"not finished after {timeout_s:g} s") from None
        except EngineError as error:
            self.end(error)
            raise
        except asyncio.CancelledError:
            if self.cause is None:
                raise
            task.uncancel()
            raise EngineError(self.cause) from None
        finally:
            self._inside.pop(key, None)
        self.suspects.pop(key, None)
        return output


def within(
    seconds: float, give_up: Callable[[str], None], start_engine: Callable[[], Engine]
) -> Engine:
    """Start an engine; ``give_up``, which gets the reason, is called from another thread if that
    takes too long: what hangs in a library cannot be interrupted."""
    late = f"the engine was not up within limits.start_s = {seconds:g} s"
    timer = threading.Timer(seconds, give_up, (late,))
    timer.daemon = True
    timer.start()
    try:
        return start_engine()
    finally:
        timer.cancel()


def _expected(item: Prepared) -> float:
    return expected_steps(item.prompt_tokens, item.sampling.max_completion_tokens)


def _request(key: Key, item: Prepared) -> EngineRequest:
    shard, row, index = key
    return EngineRequest(
        request_id=f"{shard}-{row}-{index}",
        token_ids=list(item.token_ids),
        images=item.images,
        sampling=item.sampling,
        seed=item.seeds[index],
    )


def _row_error(error: BaseException, item: Prepared) -> RowError:
    """Turn any fault of one row into that row's record, here alone; a panic of a library in Rust
    is no ``Exception``."""
    if isinstance(error, RowError):
        return error
    log.error("row %r could not be completed", item.custom_id, exc_info=error)
    return RowError(ErrorCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")


async def _checked(
    key: Key, item: Prepared, output: EngineOutput, latency_s: float, attempts: int
) -> Completion:
    """The completion that the engine's answer makes, with what is wrong with it."""
    answer = replace(output, text=well_formed(output.text))
    fault = await _fault(item.sampling.structure, answer)
    calls = () if fault else await _tool_calls(key, item, answer)
    return _completion(key, item, answer, latency_s, attempts, fault, calls)


async def _fault(structure: Structure | None, output: EngineOutput) -> RowError | None:
    """Find what is wrong with a completion: its end, or the structure it was to have."""
    if output.finish_reason not in _COMPLETE:
        return RowError(
            ErrorCode.ENGINE_ERROR,
            f"the engine ended the completion by {output.finish_reason!r}, not by stop or length",
        )
    if structure is None:
        return None
    wrong = await asyncio.to_thread(violation, structure, output.text)
    if output.finish_reason == "length" and (wrong or not is_closed(structure, output.text)):
        limit = f"cut at {output.completion_tokens} tokens; raise max_completion_tokens"
        return RowError(ErrorCode.LENGTH, f"{limit} ({wrong})" if wrong else limit)
    return RowError(ErrorCode.SCHEMA_VIOLATION, wrong) if wrong else None


async def _tool_calls(key: Key, item: Prepared, output: EngineOutput) -> tuple[ToolCall, ...]:
    if item.sampling.tool_use is None:
        return ()
    calls = await asyncio.to_thread(read_calls, item.sampling.tool_use, output.text)
    return tuple(
        ToolCall(_call_id(key, item, position), call.name, call.arguments)
        for position, call in enumerate(calls)
    )


def _call_id(key: Key, item: Prepared, position: int) -> str:
    """The same each time the row is generated, and another for each turn of a conversation."""
    asked = (item.custom_id, key[-1], position, *item.token_ids)
    return f"call_{hashlib.sha256(repr(asked).encode()).hexdigest()[:24]}"


def _completion(
    key: Key,
    item: Prepared,
    output: EngineOutput,
    latency_s: float,
    attempts: int,
    fault: RowError | None,
    calls: tuple[ToolCall, ...],
) -> Completion:
    _, row, index = key
    return Completion(
        input_row=row,
        custom_id=item.custom_id,
        sample_index=index,
        text=output.text,
        finish_reason=output.finish_reason,
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
        cached_tokens=output.cached_tokens,
        image_tokens=item.image_tokens,
        seed=item.seeds[index],
        latency_s=latency_s,
        attempts=attempts,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        tool_calls=calls,
        sampling=item.sampling.as_json,
        code=fault.code if fault else None,
        message=fault.message if fault else None,
        finished_at=_now(),
        prompt_digest=item.digest,
        completion_digest=output.completion_digest,
        stop_reason=output.stop_reason,
    )


def _now() -> float:
    """By the wall clock, as records keep it."""
    return round(time.time(), 3)


def _fatal(attempts: int, life: _Life) -> RowError:
    return RowError(
        ErrorCode.ENGINE_FATAL,
        f"{attempts} engines died with this request inside, the last with no other: {life.cause}",
    )
