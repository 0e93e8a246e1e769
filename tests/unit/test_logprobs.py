"""Log probabilities: the places of vLLM's flat form, as Arrow, small, and through columns."""

from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa

from pipeline.logprobs import (
    PROMPT_TOKEN,
    TOKEN,
    Places,
    from_column,
    of_completion,
    of_prompt,
    to_column,
)

Place = tuple[int, float, int, str | None]
"""Of a token: id, logarithm, rank, text."""
A, B, C = (65, -0.1, 1, "A"), (66, -2.5, 2, "B"), (67, -9.0, 3, None)


def places(*of_tokens: list[Place]) -> Places:
    """Per token itself, then the likeliest."""
    flat = [one for token in of_tokens for one in token]
    ends = [sum(map(len, of_tokens[: number + 1])) for number in range(len(of_tokens))]
    found = SimpleNamespace(
        start_indices=[0, *ends][: len(ends)],
        end_indices=ends,
        token_ids=[one[0] for one in flat],
        logprobs=[one[1] for one in flat],
        ranks=[one[2] for one in flat],
        decoded_tokens=[one[3] for one in flat],
    )
    return cast("Places", found)


def top(of: Place) -> dict[str, Any]:
    return {"token": of[3] or "", "token_id": of[0], "logprob": of[1]}


def test_each_token_has_the_likeliest_in_its_place_beside_it() -> None:
    found = of_completion(places([A, A, B], [C, A, B]), 2)
    assert found.to_pylist() == [
        {**top(A), "top_logprobs": [top(A), top(B)]},
        {**top(C), "top_logprobs": [top(A), top(B)]},
    ]
    assert found.type == TOKEN


def test_fewer_are_given_if_fewer_are_asked_for_or_there() -> None:
    assert [
        [one["token_id"] for one in token["top_logprobs"]]
        for token in of_completion(places([A, A, B], [C, A], [B]), 1).to_pylist()
    ] == [[65], [65], []]
    assert of_completion(places([A], [B]), 0).field("top_logprobs").to_pylist() == [[], []]
    assert len(of_completion(places(), 5)) == 0


def test_the_first_token_of_a_prompt_follows_none() -> None:
    assert of_prompt(places([], [B], [C])).to_pylist() == [
        None,
        {"token_id": 66, "logprob": -2.5, "rank": 2},
        {"token_id": 67, "logprob": -9.0, "rank": 3},
    ]


def test_a_column_gives_back_what_it_was_made_of() -> None:
    arrays = [of_completion(places([A, B], [B, A]), 1), None, pa.array([], TOKEN)]
    for given in (arrays, [None, None], []):
        column = pa.chunked_array([to_column(given, TOKEN)])
        assert from_column(column) == given
        assert column.type == pa.list_(TOKEN)
    assert from_column(pa.chunked_array([to_column([None], PROMPT_TOKEN)])) == [None]


def test_twenty_alternatives_take_less_than_a_kilobyte_a_token() -> None:
    token: list[Place] = [(number, -0.5 * number, number, " word") for number in range(21)]
    assert of_completion(places(*[token] * 1000), 20).nbytes < 1000 * 600
