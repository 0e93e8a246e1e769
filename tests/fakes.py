"""Hand-written stand-ins behind the project's own protocols."""

from __future__ import annotations

import asyncio

from pipeline.engine import EngineOutput, EngineRequest, EngineSpec
from pipeline.errors import EngineError, ErrorCode, RowError


class EchoEngine:
    """Answers each request with a text that depends on the request alone, after ``delay_s``.

    Prompts that hold ``refuse_token`` are refused; ``die_token`` kills the engine.
    """

    def __init__(
        self, *, delay_s: float = 0.0, refuse_token: int = -1, die_token: int = -1
    ) -> None:
        self.delay_s = delay_s
        self.refuse_token = refuse_token
        self.die_token = die_token
        self.running = 0
        self.peak = 0
        self.stopped = 0
        self.requests: list[EngineRequest] = []

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """Text: the seed and the number of prompt tokens."""
        self.requests.append(request)
        if self.refuse_token in request.token_ids:
            raise RowError(ErrorCode.ENGINE_REJECTED, "refused")
        if self.die_token in request.token_ids:
            raise EngineError("died")
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(self.delay_s)
        self.running -= 1
        text = f"{request.seed}:{len(request.token_ids)}"
        return EngineOutput(text, "stop", len(request.token_ids), len(text), 0)

    def shutdown(self) -> None:
        """Count the stops."""
        self.stopped += 1


def start_echo(_spec: EngineSpec) -> EchoEngine:
    """A picklable ``start_engine`` for flows on a real Ray."""
    return EchoEngine(delay_s=0.01)
