"""The answers of a run, by request.

In: the parts of a finished run whose input was a feed. Out: an ``Answer`` per request. Records stay
in Arrow until they are asked for: the log probabilities of long prompts are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.evaluate.feed import Request
from pipeline import storage
from pipeline.errors import StorageError
from pipeline.records import Status

_COLUMNS = ["custom_id", "sample_index", "status", "text", "prompt_logprobs"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the run has for one request."""

    texts: Sequence[str | None]
    """One per sample; None: it did not succeed."""
    prompt_logprobs: Sequence[tuple[float, int]] | None = None
    """(log probability, rank) of the prompt's last tokens, as many as were wanted; None: there are
    none."""


class Answers:
    """All answers of a run."""

    def __init__(self, records: pa.Table) -> None:
        self._texts = records.column("text")
        self._logprobs = records.column("prompt_logprobs")
        statuses = records.column("status").to_pylist()
        self._succeeded = [status == Status.SUCCEEDED for status in statuses]
        samples = records.column("sample_index").to_pylist()
        self._rows: dict[str, dict[int, int]] = {}
        for row, custom_id in enumerate(records.column("custom_id").to_pylist()):
            self._rows.setdefault(custom_id, {})[samples[row]] = row

    @classmethod
    def read(cls, run_folder: str) -> Answers:
        """Read all parts of a run.

        Raises:
            StorageError: a part cannot be read.
        """
        uris = storage.list_files(storage.join(run_folder, "data"), suffixes=(".parquet",))
        tables = []
        for entry in uris:
            try:
                data = pa.BufferReader(storage.read_bytes(entry.uri))
                tables.append(pq.read_table(data, columns=_COLUMNS))
            except (FileNotFoundError, pa.ArrowException) as error:
                raise StorageError(f"cannot read {entry.uri}: {error}") from error
        return cls(pa.concat_tables(tables))

    def get(self, request: Request, last_tokens: int) -> Answer:
        """The answer to ``request``, with what is known of its prompt's last tokens."""
        rows = self._rows[request.custom_id]
        texts = [
            self._texts[rows[sample]].as_py() if self._succeeded[rows[sample]] else None
            for sample in sorted(rows)
        ]
        if not last_tokens or texts[0] is None:
            return Answer(texts)
        tokens = self._logprobs[rows[0]].values[-last_tokens:].to_pylist()
        return Answer(texts, [(token["logprob"], token["rank"]) for token in tokens])
