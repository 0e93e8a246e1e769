"""Builds vLLM's real configs for GPU profiles on a machine without a GPU, in its own process.

In, on stdin: JSON, a list of ``[profile, overrides]``. Out, the last line on stdout: JSON, per case
what the config says (``Facts``), or vLLM's own words on why it is refused.

vLLM's arguments and configs are the real ones, ``AsyncEngineArgs(...).create_engine_config()`` as
an engine starts with. What a machine with GPUs would have stands in: a CUDA platform of eight
Hopper GPUs, empty modules for CUDA's compiled kernels (nothing is computed), and the word that
Triton works. The model is a folder with Llama 4 Maverick's dimensions, a quantization section of
its kind, no weights, and mini-Maverick's tokenizer.

So nothing is said of what comes after: whether the kernels take these shapes, weights and cache
fit, Ray finds two nodes, or the checkpoint's own config differs from the one here.

Use: ``python -m tests.integration.validate_arguments < CASES.json``
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.engine_spec import EngineSpec, Meeting
from pipeline.profile import REPO_ROOT, EngineProfile, load_profile

GPUS = 8
KERNELS = (
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
"""Compiled modules that vLLM's CPU build lacks and its Python code imports."""
QUESTIONS = ("_C::cutlass_scaled_mm_supports_fp8", "_C::cutlass_scaled_mm_supports_block_fp8")
"""What vLLM asks its kernels; Hopper can both."""
TEXT = {
    "model_type": "llama4_text",
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "head_dim": 128,
    "hidden_size": 5120,
    "interleave_moe_layer_step": 2,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 1048576,
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "use_qk_norm": False,
    "vocab_size": 202048,
}
VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 1408,
    "image_size": 336,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
}
UNQUANTIZED = ["lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model", "re:.*projector"]
FP8 = {
    "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}
W4A16 = {
    "format": "pack-quantized",
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
}


MEETING = Meeting("192.0.2.1", 29500, 29550)


@dataclass(frozen=True)
class Facts:
    """What vLLM made of a profile's arguments."""

    world_size: int
    data_parallel_size: int
    executor: str
    async_scheduling: bool
    hybrid_kv_cache: bool
    """Whether chunked layers keep their chunk only, as ``pipeline.kv_cache`` counts."""
    quantization: str
    redundant_experts: int
    largest_graph: int
    """Sequences of the largest CUDA graph."""
    nodes: list[tuple[int, int]]
    """Of each node of a replica: its first data-parallel rank, and its place within that rank."""


def pretend_gpus() -> None:
    """Let vLLM find Hopper GPUs; before anything of it is imported that looks."""
    import torch

    for name in KERNELS:
        sys.modules[name] = types.ModuleType(name)
    for question in QUESTIONS:
        torch.library.define(question, "(int capability) -> bool")
        torch.library.impl(question, "CompositeExplicitAutograd", lambda capability: True)

    from vllm import platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Hopper(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 10**9

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return True

        @classmethod
        def device_count(cls) -> int:
            return GPUS

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    platforms._current_platform = Hopper()
    import vllm.config.vllm as vllm_config  # takes the platform as it finds it

    vllm_config.HAS_TRITON = True


def write_model(folder: Path, quantized: Mapping[str, Any]) -> Path:
    """A checkpoint's small files: Maverick's dimensions, mini-Maverick's tokenizer."""
    source = REPO_ROOT / "cluster" / "models" / "mini-maverick"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(source, folder, ignore=weights)
    config = json.loads((folder / "config.json").read_text())
    group = {key: value for key, value in quantized.items() if key != "format"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": quantized["format"],
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": UNQUANTIZED,
    }
    changed = {"text_config": TEXT, "vision_config": VISION, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def facts(model: Path, profile: EngineProfile, overrides: Mapping[str, Any]) -> Facts:
    """What vLLM makes of the profile; raises what vLLM raises."""
    from vllm import AsyncEngineArgs

    spec = EngineSpec(str(model), None, {**profile.engine_args, **overrides}, {})
    count = profile.needs.nodes
    on_nodes = (
        [spec.on_node(MEETING, count, rank) for rank in range(count)] if count > 1 else [spec]
    )
    configs = [
        AsyncEngineArgs(model=spec.model, **spec.engine_args).create_engine_config(
            headless=rank > 0
        )
        for rank, spec in enumerate(on_nodes)
    ]
    config = configs[0]
    parallel, scheduler = config.parallel_config, config.scheduler_config
    return Facts(
        world_size=parallel.world_size,
        data_parallel_size=parallel.data_parallel_size,
        executor=str(parallel.distributed_executor_backend),
        async_scheduling=bool(scheduler.async_scheduling),
        hybrid_kv_cache=not scheduler.disable_hybrid_kv_cache_manager,
        quantization=str(config.model_config.quantization),
        redundant_experts=parallel.eplb_config.num_redundant_experts,
        largest_graph=config.compilation_config.max_cudagraph_capture_size,
        nodes=[
            (each.parallel_config.data_parallel_rank, each.parallel_config.node_rank_within_dp)
            for each in configs
        ],
    )


def main() -> None:
    """Validate the cases on stdin."""
    pretend_gpus()
    found: list[dict[str, Any] | str] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {
            "fp8": write_model(Path(scratch) / "fp8", FP8),
            "w4a16": write_model(Path(scratch) / "w4a16", W4A16),
        }
        for name, overrides in json.load(sys.stdin):
            profile = load_profile(name)
            model = models["w4a16" if "w4a16" in profile.model else "fp8"]
            try:
                found.append(asdict(facts(model, profile, overrides)))
            except (ValueError, TypeError) as error:
                found.append(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
