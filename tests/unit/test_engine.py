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


def test_the_samples_of_a_row_share_its_decoded_images() -> None:
    seen: list[int] = []

    def render(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        seen.append(id(prompts[0]["multi_modal_data"]["image"][0]))
        kept.append(prompts[0])
        return prompts

    async def render_all() -> None:
        renderer = Renderer(render)
        rows = [(png(),), (png(),)]
        samples = [
            EngineRequest(f"0-{row}-{sample}", [1], images, Sampling(), seed=sample)
            for row, images in enumerate(rows)
            for sample in range(20)
        ]
        await asyncio.gather(*(renderer.render(sample) for sample in samples))
        renderer.shutdown()

    kept: list[dict[str, Any]] = []  # or an id could be used twice
    asyncio.run(render_all())
    assert len(seen) == 40
    assert len(set(seen[:20])) == len(set(seen[20:])) == 1
    assert seen[0] != seen[20]
    assert len({prompt["multi_modal_uuids"]["image"][0] for prompt in kept}) == 1
