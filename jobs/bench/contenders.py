"""Who is measured: this pipeline, and other ways to run the same rows.

The values are the words of ``--contenders``, of the stored results and of the report.
"""

from __future__ import annotations

from enum import StrEnum


class Contender(StrEnum):
    """One way to run a workload."""

    PIPELINE = "pipeline"
    LLM = "vllm-llm"
    LLM_ONE_PROCESS = "vllm-llm-one-process"
    RAY_LLM = "ray-data-llm"
    RAY_LLM_TUNED = "ray-data-llm-tuned"
    RUN_BATCH = "vllm-run-batch"
    PIPELINE_SORTED = "pipeline-sorted"


DESCRIPTIONS = {
    Contender.PIPELINE: "this pipeline: `jobs.nightly`, Ray on this machine, files in and out",
    Contender.LLM: "`vllm.LLM.chat` over all rows in one call, as written by hand",
    Contender.LLM_ONE_PROCESS: "the same, all in one thread: `VLLM_ENABLE_V1_MULTIPROCESSING=0`",
    Contender.RAY_LLM: "`ray.data.llm` with its defaults",
    Contender.RAY_LLM_TUNED: "`ray.data.llm`, tuned (see below)",
    Contender.RUN_BATCH: "`vllm run-batch` on the same requests as JSONL",
    Contender.PIPELINE_SORTED: "this pipeline on the same rows, sorted by prefix",
}

CLOCKS = {
    Contender.PIPELINE: "from the first request its engine admits to the last it completes, after "
    "8 warm-up requests of 8 tokens",
    Contender.LLM: "around the call, after the same warm-up: templates, tokenisation, images and "
    "generation",
    Contender.LLM_ONE_PROCESS: "the same",
    Contender.RAY_LLM: "as `pipeline`: its engine stage's first request to its last, after the "
    "same warm-up",
    Contender.RAY_LLM_TUNED: "the same",
    Contender.RUN_BATCH: "it cannot be warmed up or looked into: two runs, of all rows and of "
    "every fourth, and the difference in tokens over the difference in whole time. What both pay "
    "once (load, first steps, the last rows' half-empty engine) falls out, which favours it",
    Contender.PIPELINE_SORTED: "as `pipeline`",
}
"""What the time of each measurement is."""
