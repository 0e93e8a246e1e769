"""The engine's side of a request that needs no vLLM: how it ended, and images on their way.

What vLLM itself does is in tests/integration/test_engine_death.py and test_requests.py.
"""

import asyncio
from typing import Any, NoReturn

import pytest

from pipeline.engine import EngineRequest, Renderer, check_ending
from pipeline.errors import EngineError, TransientRowError
from pipeline.sampling import Sampling
from tests.unit.test_replica import Panic, png


def test_only_a_request_that_failed_or_was_given_up_is_no_completion() -> None:
    for reason in ("stop", "length", "repetition", "a new one"):
        check_ending(reason)
    with pytest.raises(TransientRowError):
        check_ending("error")
    with pytest.raises(EngineError, match="ordered to end"):
        check_ending("abort")


@pytest.mark.parametrize("fault", [MemoryError(), Panic()])
def test_what_an_image_does_to_its_decoder_is_raised_where_its_request_waits(
    fault: BaseException,
) -> None:
    def fail(_prompts: list[dict[str, Any]]) -> NoReturn:
        raise fault

    async def render_all() -> list[Any]:
        renderer = Renderer(fail)
        waiting = [renderer.render(request(number)) for number in range(20)]
        try:
            return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
        finally:
            renderer.shutdown()

    assert asyncio.run(render_all()) == [fault] * 20


def request(number: int) -> EngineRequest:
    return EngineRequest(f"0-{number}-0", [1], (png(),), Sampling(), seed=number)
