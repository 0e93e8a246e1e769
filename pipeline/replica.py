"""generate: prepared rows -> outcomes, on one engine, several shards at a time.

In: shards' prepared rows, from several threads. Out: one outcome per sample. Rows of all shards
share one admission window, so that a shard's end is never a barrier: while its last rows finish,
the next shard's rows are already in the engine. The engine lives on an asyncio loop of its own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from PIL.Image import Image

from pipeline.engine import Engine, EngineRequest
from pipeline.errors import RowError
from pipeline.images import decode
from pipeline.records import Completion, Failure, Outcome, Prepared

_SHUTDOWN_S = 30.0  # vLLM's processes end within seconds; longer means they hang

T = TypeVar("T")
OnOutcome = Callable[[Outcome], None]


class Replica:
    """An engine and the window of requests in flight on it."""

    def __init__(self, start_engine: Callable[[], Engine], *, window: int) -> None:
        """Start the engine on a new loop and wait until it is ready.

        Args:
            start_engine: builds the engine; called on the loop's thread.
            window: most requests inside the engine at a time.

        Raises:
            EngineError: the engine could not be started.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._window = asyncio.Semaphore(window)
        try:
            self._engine = self._wait(_call(start_engine))
        except BaseException:
            self._stop_loop()
            raise

    def generate(
        self, shard: int, items: Sequence[Prepared | Failure], on_outcome: OnOutcome
    ) -> list[Outcome]:
        """Every outcome of one shard; blocks the calling thread, several may call at once.

        ``on_outcome`` is called once per outcome, on the engine's thread, as each is known.

        Raises:
            EngineError: the engine died; the shard's rows have no outcome.
        """
        return self._wait(self._shard(shard, items, on_outcome))

    def shutdown(self) -> None:
        """Stop the engine and its processes, then the loop. Safe to call twice."""
        if self._loop.is_closed():
            return
        try:
            self._wait(_call(self._engine.shutdown), timeout=_SHUTDOWN_S)
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SHUTDOWN_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _wait(self, work: Coroutine[None, None, T], timeout: float | None = None) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    async def _shard(
        self, shard: int, items: Sequence[Prepared | Failure], on_outcome: OnOutcome
    ) -> list[Outcome]:
        failed = [item for item in items if isinstance(item, Failure)]
        for failure in failed:
            on_outcome(failure)
        tasks = [
            asyncio.create_task(self._sample(shard, item, index, on_outcome))
            for item in items
            if isinstance(item, Prepared)
            for index in range(item.sampling.n)
        ]
        try:
            return [*failed, *await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()

    async def _sample(
        self, shard: int, item: Prepared, index: int, on_outcome: OnOutcome
    ) -> Outcome:
        async with self._window:
            outcome = await self._attempt(shard, item, index)
        on_outcome(outcome)
        return outcome

    async def _attempt(self, shard: int, item: Prepared, index: int) -> Outcome:
        started = time.monotonic()
        try:
            # Decoding takes milliseconds of CPU: off the loop, and only for rows in the window.
            images = await asyncio.to_thread(_decode_all, item.images)
            request = EngineRequest(
                request_id=f"{shard}-{item.input_row}-{index}",
                token_ids=list(item.token_ids),
                images=images,
                sampling=item.sampling,
                seed=item.seeds[index],
            )
            output = await self._engine.generate(request)
        except RowError as error:
            return Failure(
                input_row=item.input_row,
                custom_id=item.custom_id,
                code=error.code,
                message=error.message,
                seed=item.seeds[index],
                sample_index=index,
                attempts=1,
                prompt_tokens=item.prompt_tokens,
                image_tokens=item.image_tokens,
            )
        return Completion(
            input_row=item.input_row,
            custom_id=item.custom_id,
            sample_index=index,
            text=output.text,
            finish_reason=output.finish_reason,
            prompt_tokens=output.prompt_tokens,
            completion_tokens=output.completion_tokens,
            cached_tokens=output.cached_tokens,
            image_tokens=item.image_tokens,
            seed=item.seeds[index],
            latency_s=time.monotonic() - started,
        )


async def _call(function: Callable[[], T]) -> T:
    return function()


def _decode_all(images: tuple[bytes, ...]) -> tuple[Image, ...]:
    return tuple(decode(data) for data in images)
