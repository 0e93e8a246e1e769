"""Committed parts -> ``output.jsonl`` and ``errors.jsonl``, as OpenAI's Batch API shapes them.

In: the parts of a finished run whose input is batch JSONL, in plan order. Out: one line per row, in
input order: a ``chat.completion`` or ``text_completion`` with a choice per sample in the one file,
an error in the other: as the body of a response with its HTTP status, or beside no response if
there never was one. Parts are read a few at a time and lines written as they come, so that memory
does not grow with the run. Ids follow from run and row: written again, they are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.commit import Destination, part_uri
from pipeline.errors import ErrorCode, StorageError
from pipeline.openai_input import URL_COLUMN, Endpoint
from pipeline.parallel import mapped
from pipeline.records import Status
from pipeline.sampling import Sampling
from pipeline.tools import Choice

OPENAI_FILES = ("output.jsonl", "errors.jsonl")
"""Of a run folder: rows that succeeded, and the others."""
_THREADS = 8
_NO_RESPONSE = {
    ErrorCode.BATCH_EXPIRED: "batch_expired",
    ErrorCode.TIMEOUT: "request_timeout",
}
"""Errors of requests that got no answer, by OpenAI's own codes."""
_SERVER_FAULTS = frozenset(
    {
        *(ErrorCode.ENGINE_ERROR, ErrorCode.ENGINE_FATAL, ErrorCode.INTERNAL_ERROR),
        *(ErrorCode.LENGTH, ErrorCode.SCHEMA_VIOLATION),
    }
)
"""Errors that no change of the request is sure to mend."""
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's own floor

Record = Mapping[str, Any]
"""One row of a part."""


@dataclass(frozen=True, slots=True)
class _Lines:
    """What one part adds to each file."""

    output: bytes
    errors: bytes


def write_openai_output(to: Destination, parts: int, confirm: Callable[[], None]) -> None:
    """Write both files over those of an earlier start; each appears whole or not at all.

    Args:
        to: the run's folder, id and model.
        parts: how many there are, all of them committed.
        confirm: called with each part and before the files appear; raises if the run is another
            driver's by then.

    Raises:
        StorageError: a part cannot be read, or a file not be written.
    """
    output, errors = (storage.join(to.output_uri, name) for name in OPENAI_FILES)
    created = int(time.time())
    with storage.open_output(output) as add_output, storage.open_output(errors) as add_errors:
        for lines in _all_lines(to, parts, created, confirm):
            add_output(lines.output)
            add_errors(lines.errors)
        confirm()


def _all_lines(
    to: Destination, parts: int, created: int, confirm: Callable[[], None]
) -> Iterator[_Lines]:
    shards = range(parts)
    for lines in mapped(lambda shard: _part_lines(to, shard, created), shards, _THREADS):
        confirm()
        yield lines


def _part_lines(to: Destination, shard: int, created: int) -> _Lines:
    uri = part_uri(to.output_uri, shard)
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    except (FileNotFoundError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {uri}: {error}") from error
    output: list[str] = []
    errors: list[str] = []
    for _, samples in groupby(table.to_pylist(), key=lambda record: record["input_row"]):
        row = list(samples)
        bad = _worst(row)
        lines, line = (
            (output, _output_line(row, to.run_id, created))
            if bad is None
            else (errors, _error_line(bad, to.run_id))
        )
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    return _Lines("".join(output).encode(), "".join(errors).encode())


def _worst(row: Sequence[Record]) -> Record | None:
    """The record that makes a row fail: an errored sample, else an expired one."""
    failed = [record for record in row if record["status"] != Status.SUCCEEDED]
    errored = [record for record in failed if record["status"] == Status.ERRORED]
    return next(iter([*errored, *failed]), None)


def _error_line(record: Record, run_id: str) -> dict[str, Any]:
    code, message = record["error_code"], record["error_message"]
    if code in _NO_RESPONSE:
        return _line(record, run_id, None, {"code": _NO_RESPONSE[code], "message": message})
    status, kind = 400, "invalid_request_error"
    if code == ErrorCode.MODEL_NOT_FOUND:
        status = 404
    elif code in _SERVER_FAULTS:
        status, kind = 500, "server_error"
    fault = {"message": message, "type": kind, "param": None, "code": code}
    return _line(record, run_id, _response(record, run_id, status, {"error": fault}), None)


def _output_line(row: Sequence[Record], run_id: str, created: int) -> dict[str, Any]:
    body = _body(row, _digest(run_id, row[0]), created)
    return _line(row[0], run_id, _response(row[0], run_id, 200, body), None)


def _line(
    record: Record,
    run_id: str,
    response: Mapping[str, Any] | None,
    error: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{_digest(run_id, record)}",
        "custom_id": record["custom_id"],
        "response": response,
        "error": error,
    }


def _response(record: Record, run_id: str, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": _digest(run_id, record), "body": body}


def _digest(run_id: str, record: Record) -> str:
    key = json.dumps([run_id, record["input_file"], record["input_row"]])
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _body(row: Sequence[Record], digest: str, created: int) -> dict[str, Any]:
    chat = row[0][URL_COLUMN] == Endpoint.CHAT
    choice = _chat_choice if chat else _completion_choice
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": row[0]["model"],
        "choices": [choice(record) for record in row],
        "usage": _usage(row),
        **(_prompt_logprobs(row[0]) if chat else {}),
    }


def _usage(row: Sequence[Record]) -> dict[str, Any]:
    """The prompt counts once, whatever the number of samples."""
    prompt = row[0]["prompt_tokens"]
    completion = sum(record["completion_tokens"] for record in row)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": row[0]["cached_tokens"]},
    }


def _chat_choice(record: Record) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": record["text"], "refusal": None}
    calls = record.get("tool_calls")
    if calls:
        message["content"] = None  # the calls say it all; ``text`` has it as it was
        message["tool_calls"] = [_tool_call(call) for call in calls]
    logprobs = record.get("logprobs")
    return {
        "index": record["sample_index"],
        "message": message,
        "logprobs": None if logprobs is None else {"content": _chat_logprobs(logprobs)},
        "finish_reason": _finish_reason(record) if calls else record["finish_reason"],
        "stop_reason": _stop_reason(record),
    }


def _finish_reason(record: Record) -> str:
    """Of a choice with calls. One that had to call a named tool just stops, as OpenAI's do."""
    use = _asked(record["sampling"]).tool_use
    named = use is not None and use.choice is Choice.NAMED
    return str(record["finish_reason"]) if named else "tool_calls"


def _stop_reason(record: Record) -> str | int | None:
    """As vLLM has it beside OpenAI's keys: the stop string, or the id of the stop token."""
    found: str | None = record.get("stop_reason")
    if found is None or found in _asked(record["sampling"]).stop or not found.isdecimal():
        return found
    return int(found)


@lru_cache(maxsize=64)
def _asked(sampling: str | None) -> Sampling:
    return Sampling.model_validate_json(sampling or "{}")


def _tool_call(call: Record) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def _chat_logprobs(tokens: Iterable[Record]) -> list[dict[str, Any]]:
    return [
        {**_token(token), "top_logprobs": [_token(other) for other in token["top_logprobs"] or ()]}
        for token in tokens
    ]


def _token(token: Record) -> dict[str, Any]:
    return {
        "token": token["token"],
        "bytes": list(token["token"].encode()),
        "logprob": _finite(token["logprob"]),
    }


def _completion_choice(record: Record) -> dict[str, Any]:
    logprobs = record.get("logprobs")
    return {
        "index": record["sample_index"],
        "text": record["text"],
        "logprobs": None if logprobs is None else _completion_logprobs(logprobs),
        "finish_reason": record["finish_reason"],
        "stop_reason": _stop_reason(record),
        **_prompt_logprobs(record),
    }


def _completion_logprobs(tokens: Sequence[Record]) -> dict[str, Any]:
    """The older shape: a list per property, and each token's place in the text."""
    texts = [token["token"] for token in tokens]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token["logprob"]) for token in tokens],
        "top_logprobs": [
            {
                other["token"]: _finite(other["logprob"])
                for other in (*(token["top_logprobs"] or ()), token)  # the sampled one, always
            }
            for token in tokens
        ],
        "text_offset": offsets[: len(texts)],
    }


def _prompt_logprobs(record: Record) -> dict[str, Any]:
    """In vLLM's shape, beside OpenAI's keys of a chat or of a text's choice: an object per token,
    by its id; null for the first."""
    tokens = record.get("prompt_logprobs")
    if tokens is None:
        return {}
    places = [
        token
        and {str(token["token_id"]): {"logprob": _finite(token["logprob"]), "rank": token["rank"]}}
        for token in tokens
    ]
    return {"prompt_logprobs": places}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB) if not math.isnan(logprob) else _LEAST_LOGPROB
