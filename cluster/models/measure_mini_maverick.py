"""Measure mini-Maverick on digits it has never seen.

    python -m cluster.models.measure_mini_maverick [--engine vllm] [--temperature 0.7]

In: a checkpoint and a fixed set of questions over the held-out digits. Out: the share of exactly
right answers per task, as a Markdown table on stdout. The answers come from transformers, or
from vLLM with one process; both in bf16 as the checkpoint is served.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any, Final

from cluster.models.digits import Split, digits
from cluster.models.mini_maverick import CHECKPOINT, MAX_POSITIONS
from cluster.models.tasks import (
    COUNT_MAX,
    WORDINGS,
    Example,
    Task,
    count,
    random_example,
    single,
)

SEED: Final = 1
WIDE_QUESTIONS: Final = 600
LARGER_QUESTIONS: Final = 400
MAX_ANSWER_TOKENS: Final = 64
BATCH: Final = 64

Answer = Callable[[Path, Sequence[Example], float], list[str]]


class Engine(Enum):
    """What runs the model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def questions() -> list[Example]:
    """Every held-out digit in three wordings, random rows and pairs, every count and wording."""
    pool = digits(Split.HELD_OUT)
    rng = Random(SEED)
    singles = [single(d, text) for d in pool for text in rng.sample(WORDINGS[Task.SINGLE], k=3)]
    wides = [random_example(Task.WIDE, pool, rng) for _ in range(WIDE_QUESTIONS)]
    pairs = [random_example(Task.LARGER, pool, rng) for _ in range(LARGER_QUESTIONS)]
    numbers = range(1, COUNT_MAX + 1)
    counts = [count(n, text) for n in numbers for text in WORDINGS[Task.COUNT]]
    return [*singles, *wides, *pairs, *counts]


def messages(example: Example) -> list[dict[str, Any]]:
    """The chat of one question: its images, then its text."""
    parts = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.prompt}]
    return [{"role": "user", "content": parts}]


def answers_transformers(
    checkpoint: Path, examples: Sequence[Example], temperature: float
) -> list[str]:
    """The answers of `Llama4ForConditionalGeneration.generate`, in batches of one task."""
    import torch  # heavy, and vLLM brings its own set-up
    from transformers import AutoProcessor, Llama4ForConditionalGeneration

    torch.manual_seed(SEED)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    choice = {"do_sample": True, "temperature": temperature} if temperature else {}
    answers: list[str] = []
    for batch in task_batches(examples):
        inputs = processor(
            text=[
                processor.apply_chat_template(messages(e), add_generation_prompt=True)
                for e in batch
            ],
            images=[list(e.images) for e in batch] if batch[0].images else None,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, **choice)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return answers


def task_batches(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """Consecutive examples of one task, at most `BATCH` at a time."""
    batches: list[Sequence[Example]] = []
    for task in Task:
        same = [e for e in examples if e.task is task]
        batches += [same[i : i + BATCH] for i in range(0, len(same), BATCH)]
    assert [e for batch in batches for e in batch] == list(examples), "examples not in task order"
    return batches


def answers_vllm(checkpoint: Path, examples: Sequence[Example], temperature: float) -> list[str]:
    """The answers of vLLM with one process and default scheduling, a seed for each question."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read when vLLM is imported
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint),
        enforce_eager=True,
        max_model_len=MAX_POSITIONS,
        max_num_seqs=BATCH,
        max_num_batched_tokens=MAX_POSITIONS,
        limit_mm_per_prompt={"image": 2},
        mm_processor_cache_gb=0,
    )
    tokenizer = llm.get_tokenizer()
    prompts, params = [], []
    for i, example in enumerate(examples):
        text = tokenizer.apply_chat_template(
            messages(example), add_generation_prompt=True, tokenize=False
        )
        prompt: dict[str, Any] = {
            "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)
        }
        if example.images:
            prompt["multi_modal_data"] = {"image": list(example.images)}
        prompts.append(prompt)
        params.append(
            SamplingParams(temperature=temperature, max_tokens=MAX_ANSWER_TOKENS, seed=SEED + i)
        )
    return [output.outputs[0].text for output in llm.generate(prompts, params)]


ANSWER: Final[Mapping[Engine, Answer]] = {
    Engine.TRANSFORMERS: answers_transformers,
    Engine.VLLM: answers_vllm,
}


def table(examples: Sequence[Example], answers: Sequence[str]) -> str:
    """Right answers per task, as Markdown."""
    asked = Counter(example.task for example in examples)
    right = Counter(
        e.task for e, answer in zip(examples, answers, strict=True) if answer == e.answer
    )
    lines = ["| task | right | asked | share |", "|---|---|---|---|"]
    lines += [
        f"| {task.value} | {right[task]} | {asked[task]} | {right[task] / asked[task]:.1%} |"
        for task in asked
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line: ask everything, print the table."""
    parser = argparse.ArgumentParser(description="Measure mini-Maverick on held-out digits.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    engines = [engine.value for engine in Engine]
    parser.add_argument("--engine", choices=engines, default=Engine.TRANSFORMERS.value)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    examples = questions()
    answer = ANSWER[Engine(args.engine)]
    print(table(examples, answer(args.checkpoint, examples, args.temperature)))


if __name__ == "__main__":
    main()
