"""near_misses: columns that look as if they were meant for the request, and are only carried.

In: names and types of the carried columns. Out: a sentence for each such column, with the remedy.
A row without its images or tools is a good request, so nothing else would ever tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pipeline.sampling import SamplingDefaults

_ALIASES = {
    "custom_id": ("customid", "requestid"),
    "prompt": ("prompts",),
    "messages": ("message", "conversation", "conversations", "chat"),
    "images": (
        *("image", "img", "imgs", "picture", "pictures", "photo", "photos"),
        *("imageurl", "imageurls", "imageuri", "imageuris", "imagepath", "imagepaths"),
    ),
    "sampling": (
        *("samplingparams", "samplingparameters", "params", "parameters"),
        *("generationconfig", "generationparams", "generationkwargs"),
    ),
}
"""Other names of our columns, in lower case and without signs; so are our own."""
_TURNS = ("system", "systemprompt")
_PARAMETERS = frozenset(SamplingDefaults.model_fields) - {"n", "stop"}
"""Names of request parameters that hardly mean anything else."""


def near_misses(carried: Collection[str], present: Collection[str]) -> Iterator[str]:
    """What to tell of the ``carried`` columns.

    Args:
        carried: columns that nobody asked to carry.
        present: our names of the request columns that the input has.
    """
    for column in carried:
        plain = "".join(each for each in column.casefold() if each.isalnum())
        for ours, aliases in _ALIASES.items():
            if ours not in present and plain in (ours.replace("_", ""), *aliases):
                yield (
                    f"column {column!r} is only carried, and there is no {ours!r}; if it is meant "
                    f"for the requests, set input.columns: {{{ours}: {column}}}"
                )
        if column in _PARAMETERS:
            yield (
                f"column {column!r} is only carried; request parameters are read from 'sampling', "
                f"a struct or JSON such as {{{column!r}: ...}}"
            )
        if plain in _TURNS:
            yield (
                f"column {column!r} is only carried; put it into messages, or make the requests by "
                "input.template"
            )
