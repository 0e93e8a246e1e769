"""Engine arguments that a run refuses: those that load code, and those that prepare cannot know.

In: vLLM's engine arguments. Out: ``ValueError`` that names the argument and the remedy. vLLM
imports what some of its arguments name, at any depth of its configurations; a model, an override or
a copied profile is to bring settings, never code. Others change what a prompt is: prepare counts
and renders prompts by the model's own files, so the engine has to read the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_LOAD_FORMATS = (
    "auto",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "mistral",
    "runai_streamer",
    "runai_streamer_sharded",
    "sharded_state",
    "dummy",
)
"""vLLM's load formats that read safetensors or nothing. Of the others, some unpickle."""
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "load_format": _LOAD_FORMATS,
    "distributed_executor_backend": (None, "mp", "uni", "external_launcher"),
    "worker_cls": ("auto",),
    "tokenizer_mode": ("auto", "hf"),
    "config_format": ("auto", "hf"),
}
"""Values that import nothing but vLLM's own, or change no prompt, by the argument's name."""
_LOADS_CODE = frozenset(
    {
        *("trust_remote_code", "distributed_executor_backend", "logits_processors", "auto_map"),
        *("model_class_overrides", "inductor_passes", "kv_transfer_config", "ec_transfer_config"),
        *("weight_transfer_config", "additional_config", "log_config_file", "code_revision"),
    }
)
_CODE_ENDINGS = ("_cls", "_plugin", "module_path")
"""Ends of names of arguments that hold the name of something to import."""
_CHANGES_PROMPTS = frozenset(
    {
        *("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"),
        *("hf_config_path", "config_format", "model_weights", "vision_config", "tokens_only"),
        *("enable_prompt_embeds", "enable_mm_embeds", "interleave_mm_strings", "media_io_kwargs"),
        *("allowed_local_media_path", "allowed_media_domains", "language_model_only"),
    }
)
_HONOURED_OF_PROCESSOR = frozenset({"max_patches"})
"""What prepare knows of ``mm_processor_kwargs``; all else would change an image's tokens unseen."""


def check_engine_code(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments by which code is loaded, or prompts become others than prepare makes.

    Raises:
        ValueError: naming the argument.
    """
    for place, name, value in _all_arguments(arguments):
        if value in _HARMLESS.get(name, ()) or (name != "load_format" and not value):
            continue  # an empty value is vLLM's own default
        if name == "load_format":
            raise ValueError(
                f"{place} = {value!r} may run code of the weights' files; convert them to "
                f"safetensors and use one of {', '.join(_LOAD_FORMATS)}"
            )
        if name in _LOADS_CODE or name.endswith(_CODE_ENDINGS) or _is_custom(place, name, value):
            raise ValueError(
                f"{place}: models bring no code here, and vLLM would import what this names; leave "
                "it out, and take a model that vLLM knows itself"
            )
        if name in _CHANGES_PROMPTS:
            raise ValueError(
                f"{place}: prompts and images are prepared by the files of the profile's model, "
                "so the engine must read the same ones; leave it out"
            )
    _check_processor(arguments.get("mm_processor_kwargs") or {})


def _is_custom(place: str, name: str, value: Any) -> bool:
    """Whether a choice among vLLM's own names a class instead."""
    if name in ("method", "spec_method"):
        return bool(value == "custom_class")
    own = ("", "inductor", "eager")
    return place.endswith("compilation_config.backend") and value not in own


def _check_processor(settings: Mapping[str, Any]) -> None:
    for name in settings:
        if name not in _HONOURED_OF_PROCESSOR:
            raise ValueError(
                f"engine_args.mm_processor_kwargs.{name}: prepare counts an image's tokens "
                f"without it; of these, {', '.join(_HONOURED_OF_PROCESSOR)} alone is honoured"
            )


def _all_arguments(
    node: Any, place: str = "engine_args", name: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """(place, name, value) of each argument, at any depth of the configurations."""
    if name:
        yield place, name, node
    items = node.items() if isinstance(node, Mapping) else ()
    for key, value in items:
        yield from _all_arguments(value, f"{place}.{key}", str(key))
    for number, value in enumerate(node if isinstance(node, list | tuple) else ()):
        yield from _all_arguments(value, f"{place}[{number}]")
