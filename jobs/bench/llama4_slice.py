"""A Llama 4 Maverick of real width and few layers, with random weights, for one GPU.

In: a folder. Out: there, a model folder (configuration, and mini-Maverick's tokenizer and image
processor, no weights: ``load_format: dummy``) and an engine profile that names it. The dimensions
are those of the published Llama-4-Maverick-17B-128E configuration. A layer with 128 experts takes
32 GB in bfloat16, so 80 GB hold two layers (one with experts) and 140 GB hold four (two).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from cluster.models.mini_maverick import CHECKPOINT
from pipeline.errors import CapacityError
from pipeline.hardware import gpus

SMALL_GPU_LAYERS = 2
LARGE_GPU_LAYERS = 4
LARGE_GPU_MIB = 120_000
TILE_PX = 336
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

TEXT = {
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": False,
    "use_qk_norm": False,
    "vocab_size": 202048,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}
"""Of the language model, where they differ from mini-Maverick's."""
VISION = {
    "hidden_size": 1408,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_hidden_layers": 34,
    "image_size": TILE_PX,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
}
"""Of the vision tower."""


def ensure(folder: Path) -> Path:
    """Write model and profile below ``folder``; returns the profile's path.

    Raises:
        CapacityError: no GPU is visible; nothing was written.
    """
    found = gpus()
    if not found:
        raise CapacityError(
            "llama4-slice needs a GPU, and nvidia-smi shows none here: run it on a machine with "
            "one of 80 GB, set up with `python3.11 cluster/install.py --extra gpu`."
        )
    memory_mib = int(found[0].rsplit(",", 1)[1].split()[0])
    layers = LARGE_GPU_LAYERS if memory_mib >= LARGE_GPU_MIB else SMALL_GPU_LAYERS
    model = (folder / "model").absolute()
    write_model(model, layers)
    profile = folder / "llama4-slice.yaml"
    profile.write_text(yaml.safe_dump(profile_document(model, layers), sort_keys=False))
    return profile


def write_model(folder: Path, layers: int) -> None:
    """The model's folder, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copy(CHECKPOINT / name, folder / name)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sliced(config, layers), indent=2))
    shutil.copy(CHECKPOINT / "generation_config.json", folder)
    processor = json.loads((CHECKPOINT / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(with_tile(processor), indent=2))


def sliced(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """mini-Maverick's configuration with Maverick's widths and ``layers`` layers.

    The token ids stay mini-Maverick's, as its tokenizer does; the embeddings are Maverick's.
    """
    no_rope = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    text = {
        **config["text_config"],
        **TEXT,
        "num_hidden_layers": layers,
        "moe_layers": list(range(1, layers, 2)),
        "no_rope_layers": no_rope,
        "layer_types": ["chunked_attention" if rope else "full_attention" for rope in no_rope],
    }
    return {**config, "text_config": text, "vision_config": {**config["vision_config"], **VISION}}


def with_tile(processor: dict[str, Any]) -> dict[str, Any]:
    """The image processor's configuration for tiles of ``TILE_PX``."""
    size = {"height": TILE_PX, "width": TILE_PX}
    return {**processor, "image_processor": {**processor["image_processor"], "size": size}}


def profile_document(model: Path, layers: int) -> dict[str, Any]:
    """The engine profile."""
    return {
        "description": f"{layers} layers of Llama 4 Maverick's dimensions, random weights, one GPU",
        "model": str(model),
        "engine_args": {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "max_num_seqs": 512,
            "max_num_batched_tokens": 16384,
            "gpu_memory_utilization": 0.92,
            "limit_mm_per_prompt": {"image": 4},
            "mm_processor_cache_gb": 0,
        },
        "needs": {
            "nodes": 1,
            "gpus_per_node": 1,
            "cpus_per_node": 4,
            "memory_gib_per_node": 32,
        },
        "verified": "not yet run on hardware",
    }
