"""The nightly job on OpenAI batch JSONL, on a real Ray with a fake engine: parts, OpenAI's files,
repetition and repair.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion

from tests.integration import fake_job
from tests.integration.fake_job import records

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ROWS = 60
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def batch_line(row: int) -> str:
    """Every fifth line is a raw completion, every seventh asks for two samples."""
    parameters = {"model": "mini-maverick", "max_tokens": 20, "n": 2 if row % 7 == 0 else 1}
    if row % 5 == 0:
        url, body = COMPLETIONS, {**parameters, "prompt": f"{row} "}
    else:
        messages = [{"role": "user", "content": f"Count to {row}."}]
        url, body = CHAT, {**parameters, "messages": messages}
    return json.dumps({"custom_id": f"id-{row}", "method": "POST", "url": url, "body": body})


BAD = {
    "invalid_json_line": "{",
    "missing_required_parameter": '{"method": "POST"}',
    "invalid_method": batch_line(1001).replace("POST", "GET"),
    "invalid_url": batch_line(1002).replace(CHAT, "/v1/embeddings"),
    "model_not_found": batch_line(1003).replace("mini-maverick", "gpt-4o"),
    "invalid_parameter": batch_line(1004).replace('"max_tokens": 20', '"stream": true'),
    "duplicate_custom_id": batch_line(1006).replace("id-1006", "id-1001"),
    "invalid_messages": batch_line(1007).replace("user", "robot"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files: good lines between blank ones, then bad lines; and a config."""
    folder = tmp_path_factory.mktemp("jsonl")
    (folder / "in").mkdir()
    good = "\r\n\n".join(batch_line(row) for row in range(ROWS))
    (folder / "in" / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good.encode())
    (folder / "in" / "b.jsonl").write_text("\n".join(BAD.values()) + "\n")
    config = {
        "input": {"uri": [f"{folder}/in/a.jsonl", f"{folder}/in/*.jsonl"]},
        "output": {"uri": str(folder / "out")},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"max_error_rate": 0.5, "shard_rows": 16},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_batch_its_answers_its_repetition_and_its_repair(folder: Path) -> None:
    out = folder / "out"
    code, result, stderr = fake_job.nightly(folder / "job.yaml")
    assert code == 0, stderr
    assert (result["rows"]["succeeded"], result["rows"]["errored"]) == (ROWS, len(BAD))
    assert (out / "_SUCCESS").exists()
    of_row = {
        (record["custom_id"], record["sample_index"]): record
        for record in records(out)
        if record["status"] == "succeeded"
    }
    check_output(lines(out / "output.jsonl"), of_row)
    errors = lines(out / "errors.jsonl")
    assert [line["response"]["body"]["error"]["code"] for line in errors] == list(BAD)
    assert errors[0]["custom_id"] == "b.jsonl:0"
    assert all(line["error"] is None for line in errors)

    before = stored(out)
    stamps = {name: Path(name).stat().st_mtime_ns for name in before}
    code, again, stderr = fake_job.nightly(folder / "job.yaml")
    assert (code, again["generated_rows"]) == (0, 0), stderr
    assert stored(out) == before
    assert {name: Path(name).stat().st_mtime_ns for name in before} == stamps

    for name in ("_SUCCESS", "output.jsonl"):  # as after a crash between the parts and the end
        (out / name).unlink()
    (out / "errors.jsonl").write_text("half")
    code, again, stderr = fake_job.nightly(folder / "job.yaml")
    assert (code, again["generated_rows"]) == (0, 0), stderr
    assert lines(out / "errors.jsonl") == errors
    check_output(lines(out / "output.jsonl"), of_row)
    assert (out / "_SUCCESS").exists()


def check_output(
    output: list[dict[str, Any]], of_row: dict[tuple[str, int], dict[str, Any]]
) -> None:
    """Each good row in input order, with the text that its records have."""
    from vllm.entrypoints.launchers.run_batch import BatchRequestOutput
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    assert [line["custom_id"] for line in output] == [f"id-{row}" for row in range(ROWS)]
    for row, line in enumerate(output):
        body = line["response"]["body"]
        if row % 5 == 0:  # which vLLM's own batches do not have
            CompletionResponse.model_validate(body)
            texts = [choice.text for choice in Completion.model_validate(body).choices]
        else:
            assert BatchRequestOutput.model_validate(line).error is None
            chat = ChatCompletion.model_validate(body)
            texts = [choice.message.content or "" for choice in chat.choices]
        samples = [of_row[line["custom_id"], index] for index in range(len(texts))]
        assert len(texts) == (2 if row % 7 == 0 else 1)
        assert texts == [record["text"] for record in samples]
        assert {record["url"] for record in samples} == {COMPLETIONS if row % 5 == 0 else CHAT}
