"""A real engine that sleeps: behind the ``Engine`` protocol, as fast as a model's curve says.

``python -m cluster.simulation.paced --config FILE ...`` is ``jobs.nightly`` with it in place of
vLLM. It needs no CPU to speak of, so that several replicas on one machine do not slow each other.
A request takes as many tokens as it allows at most. What happens when is written, a line each, to a
file of its own in the folder that ``PACED_ENGINE_FOLDER`` names.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cluster.simulation.engine import EngineModel, SimulatedEngine
from jobs.cli import run_job
from jobs.nightly import nightly, nightly_parser
from pipeline.admission import EngineLoad
from pipeline.cpu import Meter
from pipeline.engine import EngineOutput, EngineRequest
from pipeline.engine_spec import EngineSpec

PACED = EngineModel(
    name="paced",
    max_num_seqs=32,
    max_num_batched_tokens=2048,
    kv_tokens=100_000,
    curve=((1, 0.02), (8, 0.025), (32, 0.04)),
    prefill_s=1 / 20_000,
)
"""A slow engine: 800 completion tokens a second with all of its sequences."""
INSTANT = EngineModel(
    name="instant",
    max_num_seqs=256,
    max_num_batched_tokens=2**20,
    kv_tokens=2**20,
    curve=((1, 0.0), (256, 0.0)),
    prefill_s=0.0,
)
"""It answers at once: what is left is the pipeline's own time."""
MODELS = {model.name: model for model in (PACED, INSTANT)}


class PacedEngine:
    """``SimulatedEngine`` on the clock on the wall. Construct it on the loop it runs on."""

    def __init__(self, model: EngineModel, log: Path) -> None:
        self._engine = SimulatedEngine(model)
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._count = 0
        self._listeners: list[Callable[[EngineLoad], None]] = []
        self._work: asyncio.Task[None] | None = None
        self._log = log
        self._write("ready")

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """As many tokens as allowed, once it is their time."""
        prompt, completion = len(request.token_ids), request.sampling.max_completion_tokens
        assert completion is not None, "the paced engine must know how long a row takes"
        number = self._count
        self._count += 1
        if not number:
            self._write("first")
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._engine.submit(number, prompt, completion)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        await answer
        return EngineOutput("", "length", prompt, completion, 0)

    def listen(self, on_step: Callable[[EngineLoad], None], _cpu: Meter) -> None:
        """See ``Engine.listen``."""
        self._listeners.append(on_step)

    def shutdown(self) -> None:
        """Stop."""
        if self._work is not None:
            self._work.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while (end := self._engine.begin(now, most_steps=1)) is not None:
            await asyncio.sleep(end - loop.time())
            now = end  # a late wake-up is not the engine's
            preempted = self._engine.preempted_now
            done = self._engine.end()
            for number in done:
                self._answers.pop(number).set_result(None)
            if done:
                self._write("done")
            load = EngineLoad(self._engine.running, self._engine.waiting, len(done), preempted)
            for listener in self._listeners:
                listener(load)
            await asyncio.sleep(0)  # what was answered may send its successors

    def _write(self, what: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{what} {time.time()}\n")


def start(_spec: EngineSpec, *, model: EngineModel, folder: str) -> PacedEngine:
    """Called on the replica's node."""
    return PacedEngine(model, Path(folder) / f"{uuid.uuid4().hex}.log")


def main() -> int:
    """The job's command line, unchanged. Also notes the CPU seconds of the driver's process."""
    folder = os.environ["PACED_ENGINE_FOLDER"]
    model = MODELS[os.environ["PACED_ENGINE"]]
    start_engine = partial(start, model=model, folder=folder)
    code = run_job(
        partial(nightly, start_engine=start_engine), nightly_parser("cluster.simulation.paced")
    )
    (Path(folder) / "driver_cpu_s").write_text(str(time.process_time()))
    return code


if __name__ == "__main__":
    sys.exit(main())
