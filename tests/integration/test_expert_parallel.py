"""mini-Maverick's experts spread over two processes give the tokens of one process.

Two real engines, one after the other, each in a process of its own: memory is free again, and the
engines' logs can be read.

Compared in float32. In bfloat16 a layer's output summed from two halves rounds differently from one
summed whole, with or without expert parallelism: of these 64 rows, 8 changed tokens from TP1 to TP2
and 7 from TP1 to TP2 with EP (none between two runs of TP1). So in bfloat16 equality would fail for
reasons that are not expert parallelism's; that is not covered, nor are data parallelism, more than
two ranks, and GPUs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.profile import REPO_ROOT
from tests.integration.generate_tokens import MAX_TOKENS, ROWS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

ENGINE_TIMEOUT_S = 600  # a start takes 20-60 s, the rows a few seconds
SCRIPT = "tests.integration.generate_tokens"
PLUGIN_LINE = (
    "maverick-batch: replaced CPUUnquantizedExperts.apply, Llama4UnfoldConvolution.forward, "
    "GPUModelRunner._bookkeeping_sync, GPUModelRunner._sample"
)


@dataclass(frozen=True)
class Generation:
    """What one engine gave, by row, and all it printed."""

    tokens: list[list[int]]
    prompts: list[int]
    """Tokens of each prompt."""
    experts: list[list[list[int]]]
    """Of each token but the last, by layer."""
    log: str


def run_engine(profile: str, folder: Path) -> Generation:
    out = folder / f"{profile}.json"
    # No VLLM_PLUGINS: the plugin must load by itself, as it does for users.
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-m", SCRIPT, profile, str(out), json.dumps({"dtype": "float32"})],
        cwd=REPO_ROOT,
        env={**environment, "VLLM_LOGGING_LEVEL": "INFO"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENGINE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{profile} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return Generation(**json.loads(out.read_text()), log=done.stdout)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    return run_engine("mini-maverick-tp1", tmp_path_factory.mktemp("tp1"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    return run_engine("mini-maverick", tmp_path_factory.mktemp("ep2"))


def test_expert_parallel_tokens_equal_those_of_one_process(
    one_process: Generation, two_processes: Generation
) -> None:
    assert len(one_process.tokens) == ROWS >= 50
    differing = [
        row
        for row, pair in enumerate(zip(one_process.tokens, two_processes.tokens, strict=True))
        if pair[0] != pair[1]
    ]
    assert differing == []


def test_the_engine_tells_each_tokens_experts_and_two_processes_tell_the_same(
    one_process: Generation, two_processes: Generation
) -> None:
    rows = zip(two_processes.prompts, two_processes.tokens, two_processes.experts, strict=True)
    assert all(len(experts) == prompt + len(tokens) - 1 for prompt, tokens, experts in rows)
    used = [{token[layer] for row in two_processes.experts for token in row} for layer in range(4)]
    assert (used[0], used[2]) == ({0}, {0})  # no experts there
    assert used[1] | used[3] <= set(range(8))
    assert len(used[1]) + len(used[3]) > 8
    differing = sum(
        one != two
        for row in zip(one_process.experts, two_processes.experts, strict=True)
        for one, two in zip(*row, strict=True)
    )
    assert differing == 0


def test_the_compared_tokens_are_many_and_varied(one_process: Generation) -> None:
    lengths = [len(tokens) for tokens in one_process.tokens]
    assert lengths.count(MAX_TOKENS) >= ROWS // 2
    assert len({tuple(tokens) for tokens in one_process.tokens}) >= ROWS // 4


def test_each_rank_holds_its_half_of_the_experts(two_processes: Generation) -> None:
    # vLLM prints this line on one rank only; the plugin says it on each.
    assert re.search(r"EP Rank 0/2\].*Local/global number of experts: 4/8", two_processes.log)
    held = re.findall(
        r"\((\S+) pid=.*this EP rank holds 4 of 8 experts: (\[.*\])", two_processes.log
    )
    assert sorted(experts for _, experts in held) == ["[0, 1, 2, 3]", "[4, 5, 6, 7]"]
    assert len({worker for worker, _ in held}) == 2


@pytest.mark.parametrize("worker", ["VllmWorker-0", "VllmWorker-1"])
def test_plugin_says_in_each_worker_what_it_replaced(
    two_processes: Generation, worker: str
) -> None:
    lines = [line for line in two_processes.log.splitlines() if PLUGIN_LINE in line]
    assert [line for line in lines if worker in line], lines
