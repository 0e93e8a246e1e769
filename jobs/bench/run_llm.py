"""``vllm.LLM.chat`` over all rows in one call: what a user would write by hand.

``python -m jobs.bench.run_llm TASK.json``. The clock runs from the built model to the last output:
messages, parameters, tokenisation and generation; reading the Parquet file is left out.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.bench.requests import (
    WARM_UP_REQUESTS,
    WARM_UP_TOKENS,
    Done,
    EngineTask,
    messages,
    sampling_arguments,
)


def main() -> None:
    """Run the task that the command line names."""
    task = EngineTask(**json.loads(Path(sys.argv[1]).read_text()))
    Path(task.result).write_text(json.dumps(asdict(run(task))))


def run(task: EngineTask) -> Done:
    """Load, warm up, measure."""
    from vllm import LLM  # deferred: it takes seconds, and may be absent where tests run
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    rows: list[dict[str, Any]] = pq.read_table(task.rows).to_pylist()
    llm = LLM(model=task.model, **task.engine_args)

    def chat(chosen: list[dict[str, Any]], **more: Any) -> list[Any]:
        params = [
            SamplingParams(
                **{**sampling_arguments(row, task.sampling), **more},
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for row in chosen
        ]
        found: list[Any] = llm.chat([messages(row) for row in chosen], params, use_tqdm=False)
        return found

    chat([rows[0]] * WARM_UP_REQUESTS, max_tokens=WARM_UP_TOKENS)
    started = time.monotonic()
    outputs = chat(rows)
    return Done(
        seconds=time.monotonic() - started,
        rows=len(outputs),
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        completion_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        cached_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
    )


if __name__ == "__main__":
    main()
