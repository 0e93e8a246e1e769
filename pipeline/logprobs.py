"""Log probabilities of tokens, as Arrow structs from the engine to the part.

In: places of a text as vLLM's flat form has them. Out: one struct array per text, and columns of
such arrays. With the 20 likeliest beside each token, that is some 400 bytes a token; objects of
Python's are ten times that, and take the engine's loop longer than the rest of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

_TOP = pa.struct([("token", pa.string()), ("token_id", pa.int32()), ("logprob", pa.float64())])
TOKEN = pa.struct([*_TOP, pa.field("top_logprobs", pa.list_(_TOP))])
"""A token of a completion, the natural logarithm of its probability, and the likeliest tokens in
its place, likeliest first."""
PROMPT_TOKEN = pa.struct(
    [("token_id", pa.int32()), ("logprob", pa.float64()), ("rank", pa.int32())]
)
"""A token of a prompt, how likely it is after those before it, and its place among all tokens by
probability; null for the first, which follows none."""


class Places(Protocol):
    """The places of a text; the token itself comes first in each, then the likeliest ones."""

    start_indices: list[int]
    """Per place: where it begins in the lists below."""
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int | None]
    decoded_tokens: list[str | None]


def of_completion(places: Places, top: int) -> pa.StructArray:
    """A ``TOKEN`` per place, with at most ``top`` of the likeliest."""
    starts = np.asarray(places.start_indices, np.int64)
    counts = np.minimum(np.asarray(places.end_indices, np.int64) - starts - 1, top)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    alternatives = np.repeat(starts + 1, counts) + within
    columns = (
        pa.array([token or "" for token in places.decoded_tokens], pa.string()),
        pa.array(np.asarray(places.token_ids, np.int32)),
        pa.array(np.asarray(places.logprobs, np.float64)),
    )
    own = [column.take(pa.array(starts)) for column in columns]
    others = [column.take(pa.array(alternatives)) for column in columns]
    likeliest = pa.StructArray.from_arrays(others, fields=list(_TOP))
    tops = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), likeliest)
    return pa.StructArray.from_arrays([*own, tops], fields=list(TOKEN))


def of_prompt(places: Places) -> pa.StructArray:
    """A ``PROMPT_TOKEN`` per place."""
    starts = np.asarray(places.start_indices, np.int64)
    empty = starts == np.asarray(places.end_indices, np.int64)
    own = pa.array(starts, mask=empty)
    columns = (
        pa.array(np.asarray(places.token_ids, np.int32)),
        pa.array(np.asarray(places.logprobs, np.float64)),
        pa.array(places.ranks, pa.int32()),
    )
    taken = [column.take(own) for column in columns]
    return pa.StructArray.from_arrays(taken, fields=list(PROMPT_TOKEN), mask=pa.array(empty))


def to_column(arrays: Sequence[pa.StructArray | None], kind: pa.StructType) -> pa.ListArray:
    """One list per text; null where there is no array."""
    sizes = [0 if array is None else len(array) for array in arrays]
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    present = [array for array in arrays if array is not None]
    values = pa.concat_arrays(present) if present else pa.array([], kind)
    mask = pa.array([array is None for array in arrays], pa.bool_())
    return pa.ListArray.from_arrays(offsets, values, type=pa.list_(kind), mask=mask)


def from_column(column: pa.ChunkedArray) -> list[pa.StructArray | None]:
    """The inverse of ``to_column``."""
    return [text.values for chunk in column.chunks for text in chunk]
