"""vLLM's own validation of the GPU profiles' arguments, as far as it goes without a GPU.

One process with vLLM for all cases (see ``validate_arguments`` for what is real in it, and what is
not). The profiles for CPUs are not in it: other tests start engines with them. Not covered: what
vLLM finds out only on GPUs or with weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.profile import REPO_ROOT, load_profile, profile_names

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

VALIDATE_TIMEOUT_S = 600  # imports take 10-25 s, a config 0.1 s
GPU_PROFILES = [name for name in profile_names() if load_profile(name).needs.gpus]
Case = tuple[str, dict[str, Any]]
ONE_NODE, TWO_NODES = "maverick-fp8-8xh100", "maverick-fp8-2x8xh100"
STAGES, FOUR_BITS = "maverick-fp8-2x8xh100-pp2", "maverick-w4a16-2xh200"
WRONG: list[tuple[Case, str]] = [
    ((ONE_NODE, {"tensor_parallel_size": 16}), "attention heads (40) must be divisible"),
    ((ONE_NODE, {"max_model_len": 2_000_000}), "greater than the derived max_model_len"),
    ((ONE_NODE, {"max_num_batched_tokens": 100}), "greater than or equal to max_num_seqs (640)"),
    ((ONE_NODE, {"kv_cache_dtype": "fp7"}), "Input should be 'auto'"),
    ((ONE_NODE, {"block_size": 0}), "block_size"),
    ((ONE_NODE, {"mm_encoder_tp_mode": "some"}), "mm_encoder_tp_mode"),
    ((TWO_NODES, {"enable_expert_parallel": False}), "must be True to use EPLB"),
    ((TWO_NODES, {"enable_eplb": False}), "Either enable EPLB or unset num_redundant_experts"),
    ((TWO_NODES, {"eplb_config": {"windw_size": 5}}), "windw_size"),
    ((TWO_NODES, {"eplb_config": {"communicator": "pynccl"}}), "incompatible with async EPLB"),
    ((STAGES, {"enable_return_routed_experts": True}), "incompatible with pipeline parallelism"),
]
NODES = {TWO_NODES: [[0, 0], [1, 0]], STAGES: [[0, 0], [0, 1]]}
"""(data-parallel rank, place within it) of each node, where a replica has more than one."""
COUNTING: Case = (TWO_NODES, {"enable_return_routed_experts": True})


@pytest.fixture(scope="module")
def found() -> Mapping[str, dict[str, Any] | str]:
    """What vLLM says, by case."""
    cases: list[Case] = [(name, {}) for name in GPU_PROFILES]
    cases += [case for case, _ in WRONG] + [COUNTING]
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.validate_arguments"],
        input=json.dumps(cases),
        cwd=REPO_ROOT,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=VALIDATE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return {json.dumps(case): words for case, words in zip(cases, said, strict=True)}


def says(found: Mapping[str, dict[str, Any] | str], case: Case) -> dict[str, Any] | str:
    return found[json.dumps(case)]


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_vllm_takes_a_shipped_profiles_arguments_as_they_are_meant(
    found: Mapping[str, dict[str, Any] | str], name: str
) -> None:
    profile = load_profile(name)
    facts = says(found, (name, {}))
    assert isinstance(facts, dict), facts
    assert facts["world_size"] * facts["data_parallel_size"] == profile.needs.gpus
    assert facts["executor"] == "mp"
    assert facts["nodes"] == NODES.get(name, [[0, 0]])
    assert facts["async_scheduling"] is True
    assert facts["hybrid_kv_cache"] is True
    assert facts["quantization"] == "compressed-tensors"
    assert facts["largest_graph"] >= profile.engine_args["max_num_seqs"]
    balancing = profile.engine_args.get("eplb_config", {})
    assert facts["redundant_experts"] == balancing.get("num_redundant_experts", 0)


def test_every_gpu_profile_is_looked_at() -> None:
    assert {ONE_NODE, TWO_NODES, STAGES, FOUR_BITS} <= set(GPU_PROFILES)


@pytest.mark.parametrize(("case", "words"), WRONG, ids=[str(case[1]) for case, _ in WRONG])
def test_vllm_refuses_a_planted_wrong_value(
    found: Mapping[str, dict[str, Any] | str], case: Case, words: str
) -> None:
    refusal = says(found, case)
    assert isinstance(refusal, str), f"accepted: {refusal}"
    assert words in refusal


def test_vllm_counts_routed_experts_with_data_parallel_ranks_and_balancing(
    found: Mapping[str, dict[str, Any] | str],
) -> None:
    assert isinstance(says(found, COUNTING), dict), says(found, COUNTING)
