"""vLLM plugin: makes expert and data parallelism, single image tiles, seeds and the count of routed
experts work on vLLM's CPU backend.

vLLM calls ``register`` in each of its processes (entry point group ``vllm.general_plugins``). Off
the CPU platform it does nothing. On it, it replaces methods of vLLM 0.32:

- ``CPUUnquantizedExperts.apply`` ignores ``expert_map`` and hands global expert ids to a kernel
  that holds only this rank's experts, which segfaults. Here ids go through ``localize`` first.
- ``Llama4UnfoldConvolution.forward`` hands oneDNN a transposed view, which it refuses when one
  tile is alone in the batch (``Expected a.stride(-1) == 1``). Here the view is made contiguous.
- ``GPUModelRunner._bookkeeping_sync``, which the CPU's runner inherits, winds a row's generator
  back where a prompt did not fit into one step and its sampled token is thrown away. CPU generators
  cannot be wound back: the engine dies (``CPU Generator does not use offset``). Here, and in
  ``_sample``, such rows' generators are out of sight, so nothing is drawn from them.
- ``VllmConfig._verify_aux_output_compatibility`` and three methods of ``CPUModelRunner``: see
  ``vllm_cpu_routing``.
- ``CpuCommunicator.all_gatherv`` and ``reduce_scatterv``: see ``vllm_cpu_ranks``.

Each is replaced only if the vLLM version is one this was run with and the method's source is what
the replacement was written for; otherwise a warning says so and vLLM stays as it is. What was done
is one log line per process.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import vllm_cpu_ranks, vllm_cpu_routing

if TYPE_CHECKING:  # torch and vllm take seconds to import; `localize` needs tensor methods only
    from torch import Tensor

VERIFIED_VERSIONS = ("0.32.",)
"""Prefixes of the vLLM versions these replacements were run with."""

MARK = "_maverick_batch"

# Below vLLM's own logger, whose handler and level it shares: the line shows up in engine logs.
logger = logging.getLogger("vllm.plugins.maverick_batch")


def localize(
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_map: Tensor,
    *,
    weight_on_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn one rank's MoE input with global expert ids into one with local ids; pure.

    ``hidden`` is (tokens, width), ``weights`` and ``ids`` are (tokens, top_k); ``expert_map`` is
    (global experts,) and holds the local id, or -1 for an expert of another rank. A miss goes to
    local expert 0 with weight 0, so it adds nothing to the sum over ranks. Where the router weight
    was applied on the input (Llama 4; top_k is 1) the kernel ignores weights, so the hidden row of
    a miss is zeroed: a gated MLP without bias maps zero to zero.
    """
    local = expert_map[ids.long()]
    miss = local < 0
    if weight_on_input:
        hidden = hidden.masked_fill(miss[:, :1], 0)
    return hidden, weights.masked_fill(miss, 0), local.masked_fill(miss, 0).to(ids.dtype)


@dataclass(frozen=True)
class Replacement:
    """One method to replace: where it is, what its source must and must not say, and by what."""

    owner: type
    method: str
    has: tuple[str, ...]
    lacks: tuple[str, ...]
    make: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def name(self) -> str:
        return f"{self.owner.__name__}.{self.method}"


def is_verified(version: str) -> bool:
    """Whether the replacements were run with this vLLM version."""
    return version.startswith(VERIFIED_VERSIONS)


def mismatch(replacement: Replacement) -> str | None:
    """Why the method is not the one the replacement was written for; None where it is."""
    source = inspect.getsource(getattr(replacement.owner, replacement.method))
    for text in replacement.has:
        if text not in source:
            return f"its source no longer has `{text}`"
    for text in replacement.lacks:
        if text in source:
            return f"its source now has `{text}`"
    return None


def replace(replacement: Replacement) -> str | None:
    """Replace the method once; return why not, or None where it is (or already was) replaced."""
    original = getattr(replacement.owner, replacement.method)
    if hasattr(original, MARK):
        return None
    reason = mismatch(replacement)
    if reason is not None:
        return reason
    replaced = replacement.make(original)
    setattr(replaced, MARK, True)
    setattr(replacement.owner, replacement.method, replaced)
    return None


def with_local_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``CPUUnquantizedExperts.apply`` so that it sees local expert ids only."""
    signature = inspect.signature(original)
    tell_once = functools.cache(tell_experts)

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        if given["expert_map"] is None:
            return original(*args, **kwargs)
        tell_once(tuple(given["expert_map"].tolist()))
        on_input = given["apply_router_weight_on_input"]
        experts = given["self"]
        if on_input and (experts.w1_bias is not None or experts.w2_bias is not None):
            raise NotImplementedError(
                "expert parallelism on CPU: experts with a bias and the router weight on the "
                "input are not supported; start the engine without enable_expert_parallel"
            )
        given["hidden_states"], given["topk_weights"], given["topk_ids"] = localize(
            given["hidden_states"],
            given["topk_weights"],
            given["topk_ids"],
            given["expert_map"],
            weight_on_input=on_input,
        )
        return original(*call.args, **call.kwargs)

    return apply


def tell_experts(expert_map: tuple[int, ...]) -> None:
    """Log which experts this rank holds: vLLM itself says so on rank 0 only."""
    held = [expert for expert, local in enumerate(expert_map) if local >= 0]
    logger.info(
        "maverick-batch: this EP rank holds %d of %d experts: %s", len(held), len(expert_map), held
    )


def with_contiguous_input(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``Llama4UnfoldConvolution.forward`` with the patches copied into row order."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Any:
        patches = self.unfold(hidden_states).permute(0, 2, 1).contiguous()
        output, _ = self.linear(patches)
        return output

    return forward


def without_generators_of_unread_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of ``GPUModelRunner`` so that it sees generators of completing rows only.

    The runner's ``discard_request_mask`` has, per row of the batch, whether its token is thrown
    away as its prompt has not been read to the end.
    """

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        generators = batch.generators
        unread = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        hidden = {row: generators.pop(row) for row in unread if row in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    return method


def replacements() -> tuple[Replacement, ...]:
    """The methods to replace. Imports vLLM's modules, so it is called on the CPU platform only."""
    from vllm.config import VllmConfig
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.models.mllama4 import Llama4UnfoldConvolution
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return (
        Replacement(
            owner=CPUUnquantizedExperts,
            method="apply",
            has=("expert_map: torch.Tensor | None,", "apply_router_weight_on_input: bool,"),
            lacks=("expert_map[", "expert_map)", "expert_map.", "expert_map is"),
            make=with_local_experts,
        ),
        Replacement(
            owner=Llama4UnfoldConvolution,
            method="forward",
            has=(
                "self.unfold(hidden_states)",
                "hidden_states.permute(0, 2, 1)",
                "hidden_states, _ = self.linear(hidden_states)",
            ),
            lacks=("contiguous",),
            make=with_contiguous_input,
        ),
        Replacement(
            owner=GPUModelRunner,
            method="_bookkeeping_sync",
            has=(
                "self.discard_request_mask.np[:num_reqs]",
                "gen = self.input_batch.generators.get(int(i))",
                "gen.set_offset(gen.get_offset() - 4)",
            ),
            lacks=(),
            make=without_generators_of_unread_prompts,
        ),
        Replacement(
            owner=GPUModelRunner,
            method="_sample",
            has=("sampling_metadata = self.input_batch.sampling_metadata", "self.sampler("),
            lacks=("discard_request_mask",),
            make=without_generators_of_unread_prompts,
        ),
        Replacement(
            owner=VllmConfig,
            method="_verify_aux_output_compatibility",
            has=("if not self.aux_output_config.enabled:", "not self.use_v2_model_runner and not"),
            lacks=("is_cpu()",),
            make=vllm_cpu_routing.with_the_v1_runner_accepted,
        ),
        Replacement(
            owner=CPUModelRunner,
            method="initialize_kv_cache",
            has=("super().initialize_kv_cache(",),
            lacks=("aux_output_connector",),
            make=vllm_cpu_routing.with_connector,
        ),
        Replacement(
            owner=CPUModelRunner,
            method="execute_model",
            has=("self._update_states(scheduler_output)", "self.execute_model_state is not None"),
            lacks=("aux_output_connector",),
            make=vllm_cpu_routing.with_step_begun,
        ),
        Replacement(
            owner=CPUModelRunner,
            method="sample_tokens",
            has=("self.execute_model_state is None", "sampled_token_ids=valid_sampled_token_ids"),
            lacks=("aux_output_connector",),
            make=vllm_cpu_routing.with_routed_experts,
        ),
        Replacement(
            owner=CpuCommunicator,
            method="all_gatherv",
            has=("sizes: list[int] | None", "raise NotImplementedError"),
            lacks=("self.",),
            make=vllm_cpu_ranks.gathering_rows,
        ),
        Replacement(
            owner=CpuCommunicator,
            method="reduce_scatterv",
            has=("sizes: list[int] | None", "raise NotImplementedError"),
            lacks=("self.",),
            make=vllm_cpu_ranks.reducing_rows,
        ),
    )


def register() -> None:
    """Entry point: called by vLLM in every process; a further call in one process is harmless."""
    import vllm  # deferred: this module is imported by tests and tools that do not need vLLM
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if not is_verified(vllm.__version__):
        logger.warning(
            "maverick-batch: vLLM %s is not one of the verified %s, nothing is replaced; expert "
            "parallelism, single image tiles and seeds may crash on CPU",
            vllm.__version__,
            ", ".join(f"{prefix}*" for prefix in VERIFIED_VERSIONS),
        )
        return
    outcome = {item.name: replace(item) for item in replacements()}
    for name, reason in outcome.items():
        if reason is not None:
            logger.warning("maverick-batch: %s is not replaced: %s", name, reason)
    done = [name for name, reason in outcome.items() if reason is None]
    logger.info("maverick-batch: replaced %s for the CPU platform", ", ".join(done) or "nothing")
