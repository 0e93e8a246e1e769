"""The evaluation job on the real engine: digits, likelihoods, and the same command again.

One engine start (mini-Maverick in one process) for two benchmarks: its own digits, and a
multiple-choice task whose log likelihoods are compared with transformers' on the same tokens. Not
covered: expert parallelism, S3, more than one replica.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from tests import quiz

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(1200)]

DIGITS = 150
QUESTIONS = 6
Outcome = tuple[int, dict[str, Any], str]


def evaluate(config: Path, *arguments: str) -> Outcome:
    """Exit code, the object on stdout's last line, stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", "--config", str(config), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    quiz.write_arc(folder / "data")
    document = {
        "tasks": [
            {"name": "digits", "chat": True, "limit": DIGITS, "subject": "answer"},
            {"name": "arc_easy", "data": str(folder / "data"), "limit": QUESTIONS},
        ],
        "output": {"uri": str(folder / "run")},
        "seed": 3,
        "engine": {"profile": "mini-maverick-tp1"},
    }
    path = folder / "evaluate.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def first(config: Path) -> Outcome:
    return evaluate(config)


def test_the_digits_are_read_and_every_request_is_accounted_for(
    first: Outcome, config: Path
) -> None:
    code, result, stderr = first
    assert code == 0, stderr
    requests = DIGITS + 4 * QUESTIONS
    assert result["requests"] == {"asked": requests, "distinct": requests, "saved": 0}
    assert result["rows"]["succeeded"] == result["generated_rows"] == requests
    digits = result["scores"]["digits"]
    assert digits["score"] >= 0.97
    assert digits["confidence"]["low"] < digits["score"] <= digits["confidence"]["high"]
    run = config.parent / "run"
    assert (run / "_SUCCESS").exists()
    stored = json.loads((run / "evaluation.json").read_text())
    assert [task["task"] for task in stored["tasks"]] == ["digits", "arc_easy"]
    assert len(stored["tasks"][0]["subjects"]) == 10
    right = pq.read_table(run / "items" / "digits.parquet")["score.exact_match"].to_pylist()
    assert sum(right) / len(right) == digits["score"]


def test_likelihoods_are_those_of_transformers(first: Outcome, config: Path) -> None:
    """Logits in bf16, whose steps are 2^-8 of their size: some hundredths apart, summed."""
    import torch
    from transformers import Llama4ForConditionalGeneration

    records = ds.dataset(config.parent / "run" / "data").to_table().to_pylist()
    scored = [record for record in records if record["prompt_logprobs"] is not None]
    assert len(scored) == 4 * QUESTIONS
    model = Llama4ForConditionalGeneration.from_pretrained(
        "cluster/models/mini-maverick", dtype=torch.float32
    )
    feed = next((config.parent / "run" / "_feed").iterdir()).read_text().splitlines()
    prompts = {line["custom_id"]: line["body"].get("prompt") for line in map(json.loads, feed)}
    for record in scored[:8]:
        token_ids = prompts[record["custom_id"]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([token_ids])).logits[0].log_softmax(-1)
        places = record["prompt_logprobs"]
        assert places[0] is None
        assert [place["token_id"] for place in places[1:]] == token_ids[1:]
        expected = [float(logits[i, token]) for i, token in enumerate(token_ids[1:])]
        found = [place["logprob"] for place in places[1:]]
        assert found == pytest.approx(expected, rel=0.02, abs=0.1)
        assert all((place["rank"] == 1) or place["logprob"] < -0.5 for place in places[1:])


def test_the_same_command_again_generates_nothing_and_finds_the_same_scores(
    first: Outcome, config: Path
) -> None:
    code, again, stderr = evaluate(config)
    assert (code, again["generated_rows"]) == (0, 0), stderr
    assert again["scores"] == first[1]["scores"]
    code, changed, _ = evaluate(config, "--set", "tasks=[{name: digits, chat: true, limit: 2}]")
    assert (code, changed["status"]) == (2, "invalid")
    assert "--new-run" in changed["error"]
