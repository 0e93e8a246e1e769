"""``ray.data.llm`` over the rows: its own processor, its own defaults, or tuned.

``python -m jobs.bench.run_ray_llm TASK.json``, with this environment's Python or, for images, with
that of ``ray_llm_venv``. The clock is that of ``Stamps``: from the first request that its engine
stage admits to the last one it completes, as for this pipeline; chat templates and tokens of the
first rows are made while the model loads, as there. Imports only what both environments have.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from jobs.bench.ray_llm_tuning import BATCH_SIZE, CONCURRENT_BATCHES
from jobs.bench.requests import (
    WARM_UP_REQUESTS,
    WARM_UP_TOKENS,
    Done,
    EngineTask,
    messages,
    sampling_arguments,
    with_data_url,
)
from jobs.bench.stamps import Stamps, read_seconds

LOGICAL_CPUS = 8
"""Its stages reserve one each; with the machine's two it would wait for itself."""


class TimedStage(vLLMEngineStageUDF):
    """Ray's engine stage, stamped and warmed up; its rows get what Arrow cannot carry."""

    def __init__(self, *args: Any, stamps: str, final_only: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stamps = Stamps(Path(stamps))
        self._final_only = final_only
        self._warm: asyncio.Task[None] | None = None

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """See Ray's ``vLLMEngineStageUDF.udf``. The first batch warms the engine up."""
        for row in batch:
            row["sampling_params"] = self._parameters(row["sampling_params"])
        if self._warm is None:
            self._warm = asyncio.create_task(self._warm_up(batch[0]))
        await self._warm
        self._stamps.enter()
        async for output in super().udf(batch):
            yield output
        self._stamps.leave()

    def _parameters(self, given: dict[str, Any]) -> dict[str, Any]:
        from vllm.sampling_params import RequestOutputKind  # deferred: this node has it, not all

        made = dict(given)
        if made.get("logit_bias"):
            made["logit_bias"] = {int(key): bias for key, bias in made["logit_bias"].items()}
        if self._final_only:
            made["output_kind"] = RequestOutputKind.FINAL_ONLY
        return made

    async def _warm_up(self, row: dict[str, Any]) -> None:
        copies = [copy.deepcopy(row) for _ in range(WARM_UP_REQUESTS)]
        for one in copies:
            one["sampling_params"]["max_tokens"] = WARM_UP_TOKENS
        await asyncio.gather(*(self.llm.generate_async(one) for one in copies))


def main() -> None:
    """Run the task that the command line names."""
    task = EngineTask(**json.loads(Path(sys.argv[1]).read_text()))
    ray.init(num_cpus=LOGICAL_CPUS, include_dashboard=False, logging_level="WARNING")
    Path(task.result).write_text(json.dumps(asdict(run(task))))
    ray.shutdown()


def run(task: EngineTask) -> Done:
    """Build the processor, run it over the rows, count tokens."""
    processor = build_processor(
        configuration(task),
        preprocess=partial(request, sampling=task.sampling, has_images=task.has_images),
        postprocess=token_counts,
    )
    name = "vLLMEngineStage"
    processor.stages[name] = timed(processor.get_stage_by_name(name), task)
    counted = processor(ray.data.read_parquet(task.rows)).to_pandas()
    return Done(
        seconds=read_seconds(Path(task.stamps)),
        rows=len(counted),
        prompt_tokens=int(counted["prompt_tokens"].sum()),
        completion_tokens=int(counted["completion_tokens"].sum()),
    )


def timed(stage: Any, task: EngineTask) -> Any:
    """The engine's stage with ``TimedStage`` as its function; Ray's validators, which change what
    they check and run on every assignment, do not run a second time."""
    more = {"stamps": task.stamps, "final_only": task.tuned}
    return type(stage).model_construct(
        fn=TimedStage,
        fn_constructor_kwargs={**stage.fn_constructor_kwargs, **more},
        map_batches_kwargs=stage.map_batches_kwargs,
    )


def configuration(task: EngineTask) -> Any:
    """Ray's configuration: what it cannot do without here, and what makes it faster."""
    quiet = {"disable_log_stats": True} if task.tuned else {}
    needed = {
        "model_source": task.model,
        "engine_kwargs": {**task.engine_args, **quiet},
        "log_engine_metrics": False,  # wants ray[serve]
        "placement_group_config": {"bundle_per_worker": {"CPU": 1}},
        # by default it would part image and text by a line break that the others do not have
        "prepare_multimodal_stage": {
            "enabled": task.has_images,
            "chat_template_content_format": "openai",
        },
        # a placeholder of an image is a token id only after vLLM's own processor
        "tokenize_stage": {"enabled": not task.has_images},
    }
    tuned = {
        "batch_size": BATCH_SIZE,
        "max_concurrent_batches": CONCURRENT_BATCHES,
        "detokenize_stage": {"enabled": False},
    }
    return vLLMEngineProcessorConfig(**needed, **(tuned if task.tuned else {}))


def request(
    row: dict[str, Any], sampling: Mapping[str, Any], *, has_images: bool
) -> dict[str, Any]:
    """What Ray's stages want of a row."""
    arguments = sampling_arguments(row, sampling)
    bias = arguments.get("logit_bias")
    if bias:  # Arrow's structs have strings for keys
        arguments["logit_bias"] = {str(key): value for key, value in bias.items()}
    chat = messages(row, with_data_url) if has_images else messages(row)
    return {"messages": chat, "sampling_params": arguments, "images": None}


def token_counts(row: dict[str, Any]) -> dict[str, Any]:
    """The two numbers that are compared."""
    return {
        "prompt_tokens": row["num_input_tokens"],
        "completion_tokens": row["num_generated_tokens"],
    }


if __name__ == "__main__":
    main()
