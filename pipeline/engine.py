"""The engine: one copy of the model, answering one request at a time, many at once.

In: ``EngineRequest`` (token ids, encoded images, parameters, seed). Out: ``EngineOutput``. Replicas
know the ``Engine`` protocol only; ``VLLMEngine`` is the one place that imports vLLM. Written for
and run with vLLM 0.32; its API is used through ``AsyncLLM`` and ``SamplingParams`` alone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, cast

import pyarrow as pa

from pipeline import logprobs
from pipeline.admission import EngineLoad
from pipeline.children import descendants, reap
from pipeline.cpu import Meter, Step
from pipeline.digests import digest_image, digest_tokens
from pipeline.engine_spec import EngineSpec
from pipeline.engine_stats import note_step
from pipeline.errors import (
    EngineError,
    EngineRefusalError,
    ErrorCode,
    RowError,
    TransientRowError,
)
from pipeline.experts import ExpertLayout, ExpertLoad, layout_of, load_of
from pipeline.images import decode
from pipeline.logprobs import Places
from pipeline.profile import locate_model
from pipeline.sampling import Sampling
from pipeline.structured import Structure, StructureKind
from pipeline.vllm_child import end_with_parent

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

_RENDERED_AT_ONCE = 8
"""Requests with images per hand-over to the rendering thread: the first wait for the last."""
_COUNT_S = 1.0
"""What a finished request waits, at most, for the step's count that it is in."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sample of one row."""

    request_id: str
    token_ids: list[int]
    """Prompt tokens with one image token per image."""
    images: tuple[bytes, ...]
    """Encoded, in the order of the prompt's image tokens."""
    sampling: Sampling
    seed: int
    on_entry: Callable[[], None] | None = None
    """To be called once it is on its way to the model: until then it waits for its images."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What the engine says of one finished sample."""

    text: str
    finish_reason: str
    prompt_tokens: int
    """As the engine counts them, images expanded."""
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    logprobs: pa.StructArray | None = None
    """One ``logprobs.TOKEN`` per token of the completion, if asked for."""
    completion_digest: str | None = None
    """Of the completion's tokens (see ``digests``); None: not known."""
    prompt_logprobs: pa.StructArray | None = None
    """One ``logprobs.PROMPT_TOKEN`` per token of the prompt, if asked for."""
    stop_reason: str | None = None
    """The stop string or the id of the stop token that ended it; None: the model's own end, or the
    limit."""
    experts: ExpertLoad | None = None
    """Which experts its tokens were sent to; None: the engine does not tell."""


_OnStep = Callable[[EngineLoad, Sequence[str]], None]
"""Hears each step's load, and the ids of the requests that ended in it."""
_CUT_OFF = ("abort", "error")
"""Finish reasons of requests that give no completion."""


class Engine(Protocol):
    """What a replica needs of an engine. Methods run on one asyncio loop."""

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """Complete one request.

        Raises:
            RowError: the engine refuses this request, or cannot read an image of it; others are
                not affected.
            TransientRowError: the engine failed at this request alone, and might not the next time.
            EngineError: the engine is dead, or about to end.
        """

    def listen(self, on_step: Callable[[EngineLoad], None], cpu: Meter) -> None:
        """Take in who wants to know; called once, before the first request.

        Args:
            on_step: to be called on the loop after each step, that is: while the engine works.
            cpu: to be told what images cost in this process.
        """

    def shutdown(self) -> None:
        """Stop the engine and every process it started."""


def follow_vllm(spec: EngineSpec) -> None:
    """Run this node's part of an engine that another node leads, until it ends.

    In a process of its own: vLLM wants the main thread there, and its end is the end of all below.
    """
    process = multiprocessing.get_context("spawn").Process(target=_follow, args=(spec,))
    process.start()
    try:
        process.join()
    finally:
        process.kill()


def _enter(spec: EngineSpec) -> None:
    """The environment, which vLLM reads when it is imported, and its processes inherit."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # a batch job calls nobody
    os.environ.update(spec.env)


def _follow(spec: EngineSpec) -> None:
    end_with_parent()
    _enter(spec)
    from vllm.entrypoints.cli.serve import run_headless

    engine_args = _engine_args(spec)
    values = {name.name: getattr(engine_args, name.name) for name in fields(engine_args)}
    run_headless(Namespace(**values, api_server_count=1))


class VLLMEngine:
    """vLLM's ``AsyncLLM`` behind the ``Engine`` protocol. Construct it on the loop it runs on."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model: 20-50 s for small ones on a CPU, minutes for large ones.

        Raises:
            EngineRefusalError: vLLM refuses the arguments; the next try would end the same way.
            EngineError: vLLM cannot load the model, or its processes died meanwhile.
        """
        _enter(spec)
        before = descendants()
        self._listeners: list[Callable[[EngineLoad], None]] = []
        self._uncounted: dict[str, asyncio.Future[None]] = {}
        try:
            self._llm = _start(spec, self._tell)
        except BaseException:
            reap(descendants() - before)
            raise
        self._processes = descendants() - before
        self._experts = _expert_layout(self._llm, spec.engine_args)
        self._renderer = Renderer(self._llm.renderer.render_cmpl)
        gc.unfreeze()  # an engine that died may be among what was frozen
        gc.collect()
        gc.freeze()  # some 800,000 objects of imports, which no collection need look at again

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """See ``Engine.generate``."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            final = await self._final(request)
        except EngineDeadError as error:
            raise EngineError(f"the engine died: {error.__cause__ or error}") from error
        except EngineGenerateError as error:  # this request's own: the engine goes on
            cause = error.__cause__ or error
            message = f"{type(cause).__name__}: {cause}"
            if isinstance(cause, ValueError | TypeError):
                raise RowError(ErrorCode.ENGINE_REJECTED, message) from error
            raise TransientRowError(ErrorCode.ENGINE_ERROR, message) from error
        except (VLLMClientError, ValueError, TypeError) as error:
            raise RowError(ErrorCode.ENGINE_REJECTED, str(error)) from error
        check_ending(final.outputs[0].finish_reason)
        return _output(final, request.sampling.logprobs, self._experts)

    def listen(self, on_step: Callable[[EngineLoad], None], cpu: Meter) -> None:
        """See ``Engine.listen``. A step is one of the scheduler's, of any data-parallel rank."""
        self._listeners.append(on_step)
        self._renderer.cpu = cpu

    def shutdown(self) -> None:
        """See ``Engine.shutdown``. What vLLM leaves of a dead engine (it holds memory) ends too."""
        try:
            self._renderer.shutdown()
            self._llm.shutdown()
        finally:
            reap(self._processes)

    def _tell(self, load: EngineLoad, ended: Sequence[str]) -> None:
        for listener in self._listeners:
            listener(load)
        for request_id in ended:
            counted = self._uncounted.get(request_id)
            if counted is not None and not counted.done():
                counted.set_result(None)

    async def _final(self, request: EngineRequest) -> RequestOutput:
        params = _sampling_params(request.sampling, request.seed)
        rendered = await self._renderer.render(request)
        final: RequestOutput | None = None
        counted = asyncio.get_running_loop().create_future()
        self._uncounted[request.request_id] = counted
        if request.on_entry is not None:
            request.on_entry()
        try:
            async for output in self._llm.generate(rendered, params, request.request_id):
                final = output
            if final is None or not final.finished:
                raise EngineError(f"the engine gave no final output for {request.request_id}")
            # vLLM hands outputs over before it tells of the step, now and then with a pause between
            if not counted.done():
                with suppress(asyncio.CancelledError):  # the answer is paid for all the same
                    await asyncio.wait([counted], timeout=_COUNT_S)
        finally:
            self._uncounted.pop(request.request_id, None)
        return final


class Renderer:
    """Turns requests into vLLM's input: images decoded and cut into tiles, off the loop.

    A thread of its own takes all requests that wait, so that a row costs a fraction of a hand-over
    between threads. One thread: vLLM's processors and their caches are made for one.
    """

    def __init__(self, render: Callable[[list[dict[str, Any]]], list[Any]]) -> None:
        """``render`` turns vLLM's prompts, with decoded images, into its input."""
        self.cpu = Meter()
        """Where it counts what it spends."""
        self._render = render
        self._thread = ThreadPoolExecutor(1, "render")
        self._waiting: deque[tuple[EngineRequest, asyncio.Future[Any]]] = deque()
        self._work: asyncio.Task[None] | None = None

    async def render(self, request: EngineRequest) -> Any:
        """The request as ``AsyncLLM.generate`` takes it.

        Raises:
            RowError: an image cannot be decoded.
        """
        if not request.images:
            return self._rendered(request)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._work is None:
            self._work = asyncio.create_task(self._work_off())
        return await future

    def shutdown(self) -> None:
        """Render no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work_off(self) -> None:
        loop = asyncio.get_running_loop()
        images = _Images()
        while self._waiting:
            count = min(_RENDERED_AT_ONCE, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            wanted = [(request, future) for request, future in batch if not future.done()]
            results = await loop.run_in_executor(
                self._thread, self._rendered_all, images, [request for request, _ in wanted]
            )
            for (_, future), result in zip(wanted, results, strict=True):
                if future.done():  # cancelled
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._work = None

    def _rendered_all(self, images: _Images, requests: Sequence[EngineRequest]) -> list[Any]:
        """Per request its input, or what is wrong with it."""
        results: list[Any] = []
        with self.cpu.counts(Step.RENDER):
            for request in requests:
                try:
                    results.append(self._rendered(request, images))
                except BaseException as error:  # noqa: BLE001 - raised where the request waits
                    results.append(error)
        return results

    def _rendered(self, request: EngineRequest, images: _Images | None = None) -> Any:
        prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
        if request.images:
            decoded, digests = (images or _Images()).of(request)
            prompt["multi_modal_data"] = {"image": decoded}
            # what caches know an image by; without it vLLM hashes the pixels, many times the bytes
            prompt["multi_modal_uuids"] = {"image": digests}
        (rendered,) = self._render([prompt])
        return rendered


class _Images:
    """Decoded images of one row at a time: its samples wait beside each other."""

    def __init__(self) -> None:
        self._source: tuple[bytes, ...] = ()
        self._decoded: tuple[list[Any], list[str]] = ([], [])

    def of(self, request: EngineRequest) -> tuple[list[Any], list[str]]:
        """The request's images and their digests.

        Raises:
            RowError: an image cannot be decoded.
        """
        if request.images is not self._source:
            images = [decode(data) for data in request.images]
            self._decoded = images, [digest_image(data) for data in request.images]
            self._source = request.images
        images, digests = self._decoded
        return list(images), list(digests)


def check_ending(finish_reason: str | None) -> None:
    """Tell a completion from a request that vLLM finished without one.

    A request that is cancelled here is aborted too, but nobody reads its last output.

    Raises:
        TransientRowError: vLLM failed at this request: when it unpacked it, for want of an image
            that it should have kept, or by its grammar.
        EngineError: vLLM gave it up as its process was ordered to end, as it does with all others.
    """
    if finish_reason == "error":
        raise TransientRowError(ErrorCode.ENGINE_ERROR, "the engine failed at this request")
    if finish_reason == "abort":
        raise EngineError("the engine was ordered to end, and gave up its requests")


def _start(spec: EngineSpec, on_step: _OnStep) -> AsyncLLM:
    from vllm.v1.engine.async_llm import AsyncLLM

    engine_args = _engine_args(spec)
    try:
        return AsyncLLM.from_engine_args(
            engine_args, stat_loggers=[_load_teller(on_step, spec.model)]
        )
    except (ValueError, TypeError, OSError) as error:
        raise EngineRefusalError(f"vLLM refuses to start {spec.model}: {error}") from error
    except RuntimeError as error:
        raise EngineError(f"vLLM could not start {spec.model}: {error}") from error


def _engine_args(spec: EngineSpec) -> AsyncEngineArgs:
    from vllm import AsyncEngineArgs

    arguments = {"disable_log_stats": True, **spec.engine_args}
    try:
        return AsyncEngineArgs(model=locate_model(spec.model), revision=spec.revision, **arguments)
    except (ValueError, TypeError, OSError) as error:
        raise EngineRefusalError(f"vLLM refuses to start {spec.model}: {error}") from error


def _load_teller(on_step: _OnStep, model_name: str) -> Callable[..., StatLoggerBase]:
    """A vLLM stat logger that passes on each step's load, summed over data-parallel ranks.

    It stands in for vLLM's Prometheus logger, which takes longer than all else on this loop; what
    it notes for Prometheus itself is in ``engine_stats``.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

    class LoadTeller(PrometheusStatLogger):
        def __init__(self, *_: Any, **__: Any) -> None:
            self._places: dict[int, tuple[int, int]] = {}

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: IterationStats | None,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            del mm_cache_stats
            note_step(scheduler_stats, iteration_stats, model_name, str(engine_idx))
            if scheduler_stats is not None:
                self._places[engine_idx] = (
                    scheduler_stats.num_running_reqs,
                    scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                )
            places = self._places.values()
            ended = iteration_stats.finished_requests if iteration_stats else []
            completed = [request for request in ended if str(request.finish_reason) not in _CUT_OFF]
            on_step(
                EngineLoad(
                    running=sum(running for running, _ in places),
                    waiting=sum(waiting for _, waiting in places),
                    finished=len(ended),
                    preempted=iteration_stats.num_preempted_reqs if iteration_stats else 0,
                    prompt_tokens=sum(request.num_prompt_tokens for request in completed),
                    completion_tokens=sum(request.num_generation_tokens for request in completed),
                    rank=engine_idx,
                ),
                [request.request_id or "" for request in ended],
            )

        def log_engine_initialized(self) -> None:
            """Nothing to tell."""

        def record_admission_rejection(self, reason: str) -> None:
            """The request's own error tells."""

    return LoadTeller


def _sampling_params(sampling: Sampling, seed: int) -> SamplingParams:
    # Not ``from vllm import``: what vLLM's package loads lazily, Python looks for anew each time.
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        **sampling.for_engine,
        max_tokens=sampling.max_completion_tokens,
        stop=list(sampling.stop),
        seed=seed,
        logit_bias=dict(sampling.logit_bias) or None,
        prompt_logprobs=0 if sampling.prompt_logprobs else None,  # 0: of the token itself
        structured_outputs=_structured_outputs(sampling.structure),
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _structured_outputs(structure: Structure | None) -> StructuredOutputsParams | None:
    from vllm.sampling_params import StructuredOutputsParams

    if structure is None:
        return None
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return StructuredOutputsParams(json=structure.spec)
        case StructureKind.JSON_OBJECT:
            return StructuredOutputsParams(json_object=True)
        case StructureKind.REGEX:
            return StructuredOutputsParams(regex=structure.spec)
        case StructureKind.CHOICE:
            return StructuredOutputsParams(choice=json.loads(structure.spec))
        case StructureKind.GRAMMAR:
            return StructuredOutputsParams(grammar=structure.spec)


def _expert_layout(llm: AsyncLLM, engine_args: Mapping[str, Any]) -> ExpertLayout | None:
    """Where the experts are whose tokens the engine was told to return; None: it was not."""
    if not engine_args.get("enable_return_routed_experts", False):
        return None
    model = llm.vllm_config.model_config
    return layout_of(model.hf_text_config, model.get_num_experts())


def _output(
    result: RequestOutput, top_logprobs: int | None, experts: ExpertLayout | None
) -> EngineOutput:
    sample = result.outputs[0]
    cached = result.num_cached_tokens or 0
    return EngineOutput(
        text=sample.text,
        finish_reason=str(sample.finish_reason),
        stop_reason=None if sample.stop_reason is None else str(sample.stop_reason),
        prompt_tokens=len(result.prompt_token_ids or ()),
        completion_tokens=len(sample.token_ids),
        cached_tokens=cached,
        logprobs=None
        if top_logprobs is None
        else logprobs.of_completion(cast("Places", sample.logprobs), top_logprobs),
        completion_digest=digest_tokens(sample.token_ids),
        prompt_logprobs=None
        if result.prompt_logprobs is None
        else logprobs.of_prompt(cast("Places", result.prompt_logprobs)),
        experts=load_of(sample.routed_experts, cached, experts),
    )
