"""vLLM plugin for the older vLLM of ``ray_llm_venv``: one image tile alone must not end the engine.

The mending is ``pipeline.vllm_cpu``'s, which by itself touches only the vLLM it was run with.
"""

from __future__ import annotations

from pipeline.vllm_cpu import replace, replacements

GROUP = "vllm.general_plugins"
ENTRY_POINT = "bench_single_tile = jobs.bench.single_tile:register"
METHOD = "Llama4UnfoldConvolution.forward"


def register() -> None:
    """Called by vLLM in each of its processes.

    Raises:
        RuntimeError: the method is not the one that the mending was written for.
    """
    (unfold,) = (item for item in replacements() if item.name == METHOD)
    reason = replace(unfold)
    if reason is not None:
        raise RuntimeError(f"{METHOD}: {reason}")
