"""A row's answer from its samples: the one that most valid samples give.

In: a row's records of one attempt. Out: a ``Decision``. Votes are for whole answers: what is
chosen was said by the model as it stands, not put together from fields that no sample had side by
side. Of answers with as many votes, the one said first (by sample index) wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.annotate.answer import Answer, InvalidAnswerError
from pipeline.errors import ErrorCode
from pipeline.records import Status

INVALID = frozenset({ErrorCode.SCHEMA_VIOLATION, ErrorCode.LENGTH})
"""What another attempt, with other seeds, may mend."""
Record = Mapping[str, Any]
"""Of a part: ``sample_index``, ``status``, ``text``, ``error_code``, ``error_message``, ..."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How one row ended in one attempt."""

    answer: Mapping[str, Any] | None
    votes: int
    """Valid samples."""
    agreement: float | None
    """Share of the valid samples that gave the answer."""
    code: ErrorCode | None = None
    message: str | None = None
    status: Status = Status.SUCCEEDED

    @property
    def is_invalid(self) -> bool:
        """Whether another attempt may mend it."""
        return self.code in INVALID


def decide(samples: Sequence[Record], answer: Answer) -> Decision:
    """The decision of one row's samples, in order of their index."""
    valid: list[dict[str, Any]] = []
    faults: list[tuple[ErrorCode, str, Status]] = []
    for sample in samples:
        if sample["error_code"] is not None:
            code = ErrorCode(sample["error_code"])
            faults.append((code, sample["error_message"], Status(sample["status"])))
            continue
        try:
            valid.append(answer.parse(sample["text"]))
        except InvalidAnswerError as error:
            faults.append((ErrorCode.SCHEMA_VIOLATION, str(error), Status.ERRORED))
    if not valid:
        return _failed(faults)
    keys = [json.dumps(each, sort_keys=True) for each in valid]
    best = max(keys, key=keys.count)  # the first of those with as many
    return Decision(valid[keys.index(best)], len(valid), keys.count(best) / len(valid))


def _failed(faults: Sequence[tuple[ErrorCode, str, Status]]) -> Decision:
    """The fault that another attempt may mend, if there is one; an error before what expired."""

    def rank(fault: tuple[ErrorCode, str, Status]) -> tuple[bool, bool]:
        return fault[0] not in INVALID, fault[2] is not Status.ERRORED

    code, message, status = min(faults, key=rank)
    return Decision(None, 0, None, code, message, status)
