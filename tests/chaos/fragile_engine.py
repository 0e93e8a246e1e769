"""Engines that poison kills, and that enter every finished generation into the ledger.

``FragileVLLM`` is the real engine: when it is given the marker's tokens, it lets the request into
the engine and then ends its own engine core by SIGKILL, so that all that follows is a real death.
``FragileEcho`` does the same to an engine that answers without a model, for short runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipeline.engine import EngineOutput, EngineRequest, VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import EngineError
from tests.chaos.corpus import MARKER_TOKENS
from tests.chaos.ledger import Generation, Ledger, now
from tests.chaos.victims import ENGINE_CORE
from tests.fakes import EchoEngine

_ENTER_S = 0.1
"""From ``generate`` to the request's first step in the engine core: a few milliseconds."""


def _is_core(process: psutil.Process) -> bool:
    try:
        return process.is_running() and ENGINE_CORE in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


class FragileVLLM(VLLMEngine):
    """vLLM, with a book and a weakness."""

    def __init__(self, spec: EngineSpec, ledger: Path) -> None:
        super().__init__(spec)
        self._cores = [*filter(_is_core, psutil.Process().children(recursive=True))]
        self._book = _Book(ledger, engine=max((core.pid for core in self._cores), default=0))

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """See ``Engine.generate``."""
        if holds_marker(request.token_ids):
            return await self._die_of(request)
        output = await super().generate(request)
        self._book.enter(request, output)
        return output

    async def _die_of(self, request: EngineRequest) -> EngineOutput:
        task = asyncio.ensure_future(super().generate(request))
        await asyncio.sleep(_ENTER_S)
        for core in self._cores:
            core.kill()
        await task
        raise EngineError("the poison was answered before it killed the engine")


class FragileEcho(EchoEngine):
    """The echo engine, with a book and a weakness: dead, it fails everything it was given."""

    def __init__(self, ledger: Path, *, delay_s: float, seats: int) -> None:
        super().__init__(delay_s=delay_s, seats=seats)
        self._book = _Book(ledger, engine=os.getpid())

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """See ``Engine.generate``."""
        if holds_marker(request.token_ids):
            self.kill()
        output = await super().generate(request)
        self._book.enter(request, output)
        return output


class _Book:
    """Entries of one engine."""

    def __init__(self, path: Path, *, engine: int) -> None:
        self._ledger = Ledger(path)
        self._pid = os.getpid()
        self._started = float(psutil.Process().create_time())
        self._engine = engine

    def enter(self, request: EngineRequest, output: EngineOutput) -> None:
        self._ledger.write(
            Generation(
                at=now(),
                request_id=request.request_id,
                seed=request.seed,
                prompt_tokens=output.prompt_tokens,
                completion_tokens=output.completion_tokens,
                pid=self._pid,
                started=self._started,
                engine=self._engine,
            )
        )


def holds_marker(token_ids: Sequence[int]) -> bool:
    """Whether the marker's tokens stand in a prompt, one after the other."""
    length = len(MARKER_TOKENS)
    first = MARKER_TOKENS[0]
    return any(
        token == first and tuple(token_ids[place : place + length]) == MARKER_TOKENS
        for place, token in enumerate(token_ids)
    )


def start_fragile_vllm(spec: EngineSpec, *, ledger: Path) -> FragileVLLM:
    """A ``start_engine`` for the real model."""
    return FragileVLLM(spec, ledger)


def start_fragile_echo(spec: EngineSpec, *, ledger: Path, delay_s: float) -> FragileEcho:
    """A ``start_engine`` without a model: it works on ``max_num_seqs`` requests at a time."""
    return FragileEcho(ledger, delay_s=delay_s, seats=spec.engine_args["max_num_seqs"])
