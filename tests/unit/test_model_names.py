"""What a request may call the model: as records call it, shorter, or as vLLM would serve it."""

import pytest

from pipeline.model import accepted_names


@pytest.mark.parametrize(
    ("model", "served", "names"),
    [
        ("meta/maverick", None, ("meta/maverick", "maverick")),
        ("/models/maverick", None, ("maverick",)),
        ("/models/maverick", "gpt-4o", ("maverick", "gpt-4o")),
        ("meta/maverick", ["a", "maverick"], ("meta/maverick", "maverick", "a")),
    ],
)
def test_a_model_goes_by_these_names(
    model: str, served: str | list[str] | None, names: tuple[str, ...]
) -> None:
    assert accepted_names(model, {"served_model_name": served}) == names
