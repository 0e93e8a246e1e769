"""The columns of a part as arrays, and what they add up to.

In: a part's table. Out: ``Records``, and the totals that its footer should have.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import PartStats
from pipeline.records import Status

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Records:
    """The columns of a part that checks look at, as arrays of one length."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.rows = self._ints("input_row")
        self.samples = self._ints("sample_index")
        self.prompt_tokens = self._ints("prompt_tokens")
        self.completion_tokens = self._ints("completion_tokens")
        self.attempts = self._ints("attempts")
        self.seeds = self._ints("seed")
        self.status = self.texts("status")
        self.code = self.texts("error_code")
        self.finish_reason = self.texts("finish_reason")
        self.completed: Flags = ~self.is_null("finish_reason")
        changes = np.diff(self.rows) != 0
        self.starts: Ints = np.flatnonzero(np.concatenate([[True], changes])).astype(np.int64)
        """Where the records of each row begin."""
        if not len(self.rows):
            self.starts = np.empty(0, np.int64)

    def _ints(self, name: str) -> Ints:
        column: Ints = self.table.column(name).to_numpy().astype(np.int64)
        return column

    def texts(self, name: str) -> npt.NDArray[Any]:
        """A column of few different strings; None where null."""
        found: npt.NDArray[Any] = np.array(self.table.column(name).to_pylist(), dtype=object)
        return found

    def is_null(self, name: str) -> Flags:
        """Where a column is null."""
        flags: Flags = self.table.column(name).is_null().to_numpy()
        return flags

    def row_at(self, position: int) -> str:
        """A record for people."""
        return f"row {self.rows[position]} sample {self.samples[position]}"


def asked_samples(table: pa.Table) -> Ints:
    """``n`` of each record's sampling; 0 where there is none."""
    coded = table.column("sampling").combine_chunks().dictionary_encode()
    numbers = [int(json.loads(text)["n"]) for text in coded.dictionary.to_pylist()]
    indices = coded.indices.fill_null(len(numbers)).to_numpy()
    asked: Ints = np.array([*numbers, 0], np.int64)[indices]
    return asked


def recount(records: Records, footer: PartStats) -> PartStats:
    """What the records say where the footer may say otherwise; the rest is the footer's."""
    completed = records.completed
    lengths, counts = np.unique(records.completion_tokens[completed], return_counts=True)
    by_bits: dict[str, int] = {}
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        bits = str(length.bit_length())
        by_bits[bits] = by_bits.get(bits, 0) + count
    cached, image = (
        records.table.column(name).to_numpy() for name in ("cached_tokens", "image_tokens")
    )
    return replace(
        footer,
        rows=_count_rows(records),
        records=len(records.rows),
        tokens={
            "prompt": int(records.prompt_tokens.sum()),
            "completion": int(records.completion_tokens.sum()),
            "cached": int(cached.sum()),
            "image": int(image.sum()),
        },
        errors=_value_counts(records.table.column("error_code")),
        finish_reasons=_value_counts(records.table.column("finish_reason")),
        lengths=by_bits,
    )


def _count_rows(records: Records) -> dict[str, int]:
    """Rows by how they ended: errored if a sample is, else expired if one is."""
    worst = np.zeros(len(records.rows), np.int64)
    worst[records.status == Status.EXPIRED] = 1
    worst[records.status == Status.ERRORED] = 2
    of_rows = np.maximum.reduceat(worst, records.starts) if len(worst) else worst
    counts = np.bincount(of_rows, minlength=3)
    return {
        str(Status.SUCCEEDED): int(counts[0]),
        str(Status.ERRORED): int(counts[2]),
        str(Status.EXPIRED): int(counts[1]),
    }


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {
        each["values"]: each["counts"]
        for each in pc.value_counts(column).to_pylist()
        if each["values"] is not None
    }
