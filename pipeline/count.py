"""count: a prepared block -> what it holds, as one small row. For ``jobs.plan``.

In: one shard's prepared block, or some rows of it. Out: ``ShardCounts``: rows, tokens, errors with
an example each, and samples by kind and cap. Token ids and images stay where they are: of ten
million rows the driver sees about a kilobyte a shard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.lengths import Kind, rounded_cap
from pipeline.records import block_shard
from pipeline.sampling import Sampling

_EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Example:
    """One row that fails, to look at."""

    custom_id: str
    input_file: str
    input_row: int
    message: str


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What those rows of one shard hold that were looked at."""

    shard: int
    rows: int
    samples: int = 0
    """Completions that the good rows ask for."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Of good rows. ``prompt``: images expanded, counted for each sample, as a run's totals do;
    ``image``: those of them that images take; ``prompt_once`` and ``image_once``: the same for each
    row; ``most``: of completions, if each is as long as it may be."""
    images: int = 0
    """Of good rows."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """Rows that fail, by code."""
    examples: Mapping[str, Example] = field(default_factory=dict)
    """The first of them, by code."""
    cells: Mapping[tuple[Kind, int], int] = field(default_factory=dict)
    """Samples by kind and rounded cap."""

    @property
    def bad(self) -> int:
        """Rows that fail."""
        return sum(self.errors.values())

    def to_json(self) -> str:
        """As it travels to the driver."""
        document = {
            name: getattr(self, name)
            for name in ("shard", "rows", "samples", "tokens", "images", "errors")
        }
        document["examples"] = {code: asdict(each) for code, each in self.examples.items()}
        document["cells"] = [
            [kind.with_images, kind.cap_bits, kind.prompt_bits, cap, samples]
            for (kind, cap), samples in self.cells.items()
        ]
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> ShardCounts:
        """The inverse of ``to_json``."""
        document = json.loads(text)
        examples = {code: Example(**each) for code, each in document.pop("examples").items()}
        cells = {
            (Kind(with_images, cap_bits, prompt_bits), cap): samples
            for with_images, cap_bits, prompt_bits, cap, samples in document.pop("cells")
        }
        return cls(**document, examples=examples, cells=cells)


def spread_rows(block: pa.Table, rows: int) -> pa.Table:
    """``rows`` rows of a block, evenly spread over it; all if it has no more."""
    if rows >= block.num_rows:
        return block
    return block.take(pa.array((np.arange(rows) + 0.5) * block.num_rows // rows, pa.int64()))


def count_block(prepared: pa.Table, *, max_model_len: int) -> ShardCounts:
    """What a prepared block holds.

    Args:
        prepared: rows of one shard, at least one.
        max_model_len: most tokens of prompt and completion together.
    """
    is_good = pc.is_null(prepared.column("error_code"))
    bad = prepared.filter(pc.invert(is_good))
    good = prepared.filter(is_good)
    return ShardCounts(
        shard=block_shard(prepared).index,
        rows=prepared.num_rows,
        errors=Counter(bad.column("error_code").to_pylist()),
        examples=_examples(bad),
        **_count_good(good, max_model_len),
    )


def _examples(bad: pa.Table) -> dict[str, Example]:
    uri = block_shard(bad).uri if bad.num_rows else ""
    rows = bad.select(["custom_id", "input_row", "error_code", "error_message"]).to_pylist()
    return {
        row["error_code"]: Example(
            row["custom_id"], uri, row["input_row"], row["error_message"][:_EXAMPLE_CHARACTERS]
        )
        for row in reversed(rows)  # the first of a code stays
    }


def _count_good(good: pa.Table, max_model_len: int) -> dict[str, Any]:
    asked = {
        text: Sampling.model_validate_json(text)
        for text in pc.unique(good.column("sampling")).to_pylist()
    }
    prompts = good.column("prompt_tokens").to_pylist()
    image_tokens = good.column("image_tokens").to_pylist()
    images = pc.list_value_length(good.column("images")).to_pylist()
    tokens: Counter[str] = Counter()
    cells: Counter[tuple[Kind, int]] = Counter()
    for prompt, of_images, count, text in zip(
        prompts, image_tokens, images, good.column("sampling").to_pylist(), strict=True
    ):
        limit, samples = asked[text].max_completion_tokens, asked[text].n
        cap = min(limit, max_model_len - prompt)
        kind = Kind(count > 0, limit.bit_length(), prompt.bit_length())
        cells[kind, rounded_cap(cap)] += samples
        tokens["prompt"] += prompt * samples
        tokens["image"] += of_images * samples
        tokens["prompt_once"] += prompt
        tokens["image_once"] += of_images
        tokens["most"] += cap * samples
    return {
        "samples": sum(cells.values()),
        "tokens": tokens,
        "images": sum(images),
        "cells": cells,
    }
