"""OpenAI's files: each row one line, in input order, and OpenAI's own types read them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion as TextCompletion
from openai.types.shared import ErrorObject

from pipeline.commit import Destination, commit_outcomes, part_uri
from pipeline.errors import ErrorCode, LeaseLostError, StorageError
from pipeline.logprobs import PROMPT_TOKEN
from pipeline.openai_output import write_openai_output
from pipeline.plan import Shard
from pipeline.records import Completion, Failure, Outcome, Status, ToolCall
from pipeline.sampling import Sampling
from pipeline.tools import Choice, ToolUse

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = [
    {
        "token": "é",
        "bytes": [195, 169],
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "é", "bytes": [195, 169], "logprob": -0.5},
            {"token": "b", "bytes": [98], "logprob": float("-inf")},
        ],
    },
    {"token": "cd", "bytes": [99, 100], "logprob": -0.1, "top_logprobs": []},
]


def done(row: int, text: str = "Hi.", *, sample: int = 0) -> Completion:
    return Completion(
        input_row=row,
        custom_id=f"id-{row}",
        sample_index=sample,
        text=text,
        finish_reason="stop",
        prompt_tokens=10,
        completion_tokens=4,
        cached_tokens=3,
        image_tokens=0,
        seed=1,
        latency_s=0.1,
    )


def failed(row: int, code: ErrorCode, *, sample: int = 0, **changes: Any) -> Failure:
    return Failure(row, f"id-{row}", code, f"{code}!", 1, sample, **changes)


def to(tmp_path: Path) -> Destination:
    return Destination(f"file://{tmp_path}", "run-1", "maverick")


def commit(
    tmp_path: Path, index: int, outcomes: list[Outcome], *, first_row: int = 0, url: str = CHAT
) -> None:
    rows = len({outcome.input_row for outcome in outcomes})
    shard = Shard(index, "file:///in/a.jsonl", first_row, rows)
    commit_outcomes(to(tmp_path), shard, outcomes, pa.table({"url": [url] * rows}))


def add_column(tmp_path: Path, name: str, values: list[Any]) -> None:
    """Give the one part a column that a later version writes."""
    path = part_uri(f"{tmp_path}", 0)
    table = pq.read_table(path)
    if name in table.column_names:
        table = table.drop_columns([name])
    pq.write_table(table.append_column(name, pa.array(values)), path)


def write(tmp_path: Path, parts: int = 1) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What ``output.jsonl`` and ``errors.jsonl`` hold."""
    write_openai_output(to(tmp_path), parts, lambda: None)
    output, errors = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("output.jsonl", "errors.jsonl")
    )
    return output, errors


def test_rows_stand_in_input_order_over_all_parts(tmp_path: Path) -> None:
    for index in range(20):
        rows = range(index * 3, index * 3 + 3)
        outcomes = [failed(row, ErrorCode.TIMEOUT) if row % 3 == 1 else done(row) for row in rows]
        commit(tmp_path, index, list(reversed(outcomes)), first_row=rows[0])
    output, errors = write(tmp_path, parts=20)
    assert [line["custom_id"] for line in output] == [f"id-{r}" for r in range(60) if r % 3 != 1]
    assert [line["custom_id"] for line in errors] == [f"id-{r}" for r in range(60) if r % 3 == 1]
    assert len({line["id"] for line in [*output, *errors]}) == 60


def test_a_chat_row_is_a_chat_completion(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0, "Hé\u2028\x85")])
    ((line,), errors) = write(tmp_path)
    assert errors == []
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"]
    found = ChatCompletion.model_validate(line["response"]["body"])
    assert found.model == "maverick"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == "Hé\u2028\x85"
    assert found.choices[0].message.tool_calls is None
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.total_tokens == 14
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 3


def test_samples_of_a_row_are_choices_and_the_prompt_counts_once(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0, "b", sample=1), done(0, "a"), done(1)])
    output, _ = write(tmp_path)
    found = ChatCompletion.model_validate(output[0]["response"]["body"])
    assert [(each.index, each.message.content) for each in found.choices] == [(0, "a"), (1, "b")]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (10, 8)


def test_a_completions_row_is_a_text_completion(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0, "écd")], url=COMPLETIONS)
    add_column(tmp_path, "logprobs", [TOKENS])
    ((line,), _) = write(tmp_path)
    found = TextCompletion.model_validate(line["response"]["body"])
    assert found.object == "text_completion"
    assert found.choices[0].text == "écd"
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["é", "cd"]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.token_logprobs == [-0.5, -0.1]
    # the sampled token is always there, with logprobs: 0 alone
    assert logprobs.top_logprobs == [{"é": -0.5, "b": -9999.0}, {"cd": -0.1}]


def test_a_chats_logprobs_have_tokens_bytes_and_the_likeliest_others(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0, "écd"), done(1)])
    add_column(tmp_path, "logprobs", [TOKENS, None])
    output, _ = write(tmp_path)
    with_them, without = (ChatCompletion.model_validate(o["response"]["body"]) for o in output)
    assert without.choices[0].logprobs is None
    assert with_them.choices[0].logprobs is not None
    content = with_them.choices[0].logprobs.content
    assert content is not None
    assert [(each.token, each.bytes, each.logprob) for each in content] == [
        ("é", [195, 169], -0.5),
        ("cd", [99, 100], -0.1),
    ]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [
        ("é", -0.5),
        ("b", -9999.0),
    ]


def test_log_probabilities_of_the_prompt_have_vllms_shape(tmp_path: Path) -> None:
    places = [
        None,
        {"token_id": 7, "logprob": -0.5, "rank": 1},
        {"token_id": 8, "logprob": float("-inf"), "rank": 99},
    ]
    asked = replace(done(0), prompt_logprobs=pa.array(places, PROMPT_TOKEN))
    commit(tmp_path, 0, [asked, done(1)], url=COMPLETIONS)
    output, _ = write(tmp_path)
    with_them, without = (line["response"]["body"]["choices"][0] for line in output)
    expected = [
        None,
        {"7": {"logprob": -0.5, "rank": 1}},
        {"8": {"logprob": -9999.0, "rank": 99}},
    ]
    assert with_them["prompt_logprobs"] == expected
    assert "prompt_logprobs" not in without
    TextCompletion.model_validate(output[0]["response"]["body"])
    commit(tmp_path, 1, [replace(done(2), prompt_logprobs=asked.prompt_logprobs)], first_row=2)
    body = write(tmp_path, parts=2)[0][2]["response"]["body"]
    assert body["prompt_logprobs"] == expected  # of a chat they are beside the choices
    assert "prompt_logprobs" not in body["choices"][0]


def test_tool_calls_are_the_message_and_the_reason_to_finish(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0, ""), done(1, "none")])
    calls = [{"id": "call_1", "name": "add", "arguments": '{"a": 1}'}]
    add_column(tmp_path, "tool_calls", [calls, []])
    output, _ = write(tmp_path)
    called, answered = (ChatCompletion.model_validate(o["response"]["body"]) for o in output)
    choice = called.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].model_dump() == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    assert answered.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("choice", "reason"),
    [(Choice.NAMED, "stop"), (Choice.REQUIRED, "tool_calls"), (Choice.AUTO, "tool_calls")],
)
def test_only_a_call_of_a_tool_that_was_named_just_stops(
    tmp_path: Path, choice: Choice, reason: str
) -> None:
    use = ToolUse(choice=choice, name="add" if choice is Choice.NAMED else None)
    called = replace(
        done(0, "{}"),
        tool_calls=(ToolCall("call_1", "add", "{}"),),
        sampling=Sampling(tool_use=use).as_json,
    )
    commit(tmp_path, 0, [called])
    ((line,), _) = write(tmp_path)
    found = ChatCompletion.model_validate(line["response"]["body"]).choices[0]
    assert found.finish_reason == reason
    assert found.message.tool_calls


def test_what_ended_a_completion_stands_beside_its_reason_as_in_vllm(tmp_path: Path) -> None:
    asked = Sampling(stop=("42",), stop_token_ids=(42, 43)).as_json
    ends = [replace(done(row), sampling=asked) for row in range(3)]
    outcomes: list[Outcome] = [
        replace(end, stop_reason=reason)
        for end, reason in zip(ends, ("42", "43", None), strict=True)
    ]
    commit(tmp_path, 0, outcomes)
    output, _ = write(tmp_path)
    choices = [line["response"]["body"]["choices"][0] for line in output]
    assert [choice["stop_reason"] for choice in choices] == ["42", 43, None]


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (ErrorCode.INVALID_PARAMETER, 400, "invalid_request_error"),
        (ErrorCode.INVALID_JSON_LINE, 400, "invalid_request_error"),
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, 400, "invalid_request_error"),
        (ErrorCode.ENGINE_REJECTED, 400, "invalid_request_error"),
        (ErrorCode.MODEL_NOT_FOUND, 404, "invalid_request_error"),
        (ErrorCode.ENGINE_FATAL, 500, "server_error"),
        (ErrorCode.SCHEMA_VIOLATION, 500, "server_error"),
    ],
)
def test_a_refused_request_has_a_response_with_its_error(
    tmp_path: Path, code: ErrorCode, status: int, kind: str
) -> None:
    commit(tmp_path, 0, [failed(0, code)])
    (output, (line,)) = write(tmp_path)
    assert output == []
    assert line["error"] is None
    response = line["response"]
    assert (response["status_code"], bool(response["request_id"])) == (status, True)
    assert list(response["body"]) == ["error"]
    assert ErrorObject.model_validate(response["body"]["error"]).model_dump(
        exclude={"misalignment"}
    ) == {"code": code, "message": f"{code}!", "param": None, "type": kind}


def test_a_row_that_failed_is_an_error_whatever_its_other_samples(tmp_path: Path) -> None:
    expired = failed(0, ErrorCode.BATCH_EXPIRED, status=Status.EXPIRED)
    commit(
        tmp_path,
        0,
        [
            expired,
            failed(0, ErrorCode.TIMEOUT, sample=1),
            done(0, sample=2),
            replace(expired, input_row=1),
        ],
    )
    output, errors = write(tmp_path)
    assert output == []
    assert [line["error"] for line in errors] == [
        {"code": "request_timeout", "message": "timeout!"},
        {"code": "batch_expired", "message": "batch_expired!"},
    ]
    assert [line["response"] for line in errors] == [None, None]


def test_text_that_an_errored_row_keeps_is_no_completion(tmp_path: Path) -> None:
    commit(tmp_path, 0, [failed(0, ErrorCode.TIMEOUT)])
    add_column(tmp_path, "text", ["not what the schema asks for"])
    output, errors = write(tmp_path)
    assert (len(output), len(errors)) == (0, 1)


def test_written_again_the_lines_have_the_same_ids(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0), failed(1, ErrorCode.TIMEOUT)])
    first, second = write(tmp_path), write(tmp_path)
    assert first[1] == second[1]
    assert first[0][0]["id"] == second[0][0]["id"]


def test_a_driver_that_was_relieved_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0)])
    (tmp_path / "output.jsonl").write_text("old\n")
    looks = iter([None])

    def confirm() -> None:
        if next(looks, "lost"):
            raise LeaseLostError("another driver")

    with pytest.raises(LeaseLostError):
        write_openai_output(to(tmp_path), 1, confirm)
    assert (tmp_path / "output.jsonl").read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "output.jsonl"]


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    commit(tmp_path, 0, [done(0)])
    with pytest.raises(StorageError, match=r"part-000001\.parquet"):
        write_openai_output(to(tmp_path), 2, lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
