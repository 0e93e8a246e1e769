"""vLLM plugin, part of ``vllm_cpu``: ``enable_return_routed_experts`` works on the CPU backend.

vLLM 0.32 returns each request's routed experts from its V2 model runner only. On CPUs that runner
needs a Triton with a CPU backend, which the one vLLM installs with has not, and the V1 runner runs.
What captures, keeps and hands over the routing belongs to neither runner
(``vllm.distributed.aux_output_connector``): here the CPU's V1 runner drives it as the V2 runner
does. Nothing happens unless the argument is set.

The CPU runner works step by step (no asynchronous scheduling, no speculative decoding here), so a
step's capture is complete before the next one begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class V2View:
    """A config as it would be with the V2 model runner; everything else is the config's own."""

    use_v2_model_runner = True

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def with_the_v1_runner_accepted(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``VllmConfig._verify_aux_output_compatibility``: all is checked but the runner."""

    @functools.wraps(original)
    def verify(self: Any) -> Any:
        return original(V2View(self))

    return verify


def with_connector(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``CPUModelRunner.initialize_kv_cache``: routers are listened to from there on."""

    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if self.vllm_config.aux_output_config.enabled:
            from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

            self.aux_output_connector = get_aux_output_connector(
                model=self.model, vllm_config=self.vllm_config, kv_cache_config=self.kv_cache_config
            )
        return result

    return initialize_kv_cache


def with_step_begun(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``CPUModelRunner.execute_model``: the connector hears of a step before it runs."""

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        connector = getattr(self, "aux_output_connector", None)
        if connector is not None:
            connector.begin_step(scheduler_output.aux_output_connector_metadata)
        return original(self, scheduler_output, *args, **kwargs)

    return execute_model


def with_routed_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``CPUModelRunner.sample_tokens``: its output has the step's routed experts."""

    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        connector = getattr(self, "aux_output_connector", None)
        if connector is None or self.execute_model_state is None:
            return original(self, *args, **kwargs)
        pending = connector.prepare_output(_step_of(self))
        output = original(self, *args, **kwargs)
        if pending is not None:  # this rank hands them over
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            pending.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
            output.aux_output_connector_output = pending.process_output()
        return output

    return sample_tokens


def _step_of(runner: Any) -> SimpleNamespace:
    """The step's rows as the connector asks for them: who they are, and which tokens were read."""
    batch = runner.input_batch
    rows = batch.num_reqs
    return SimpleNamespace(
        req_ids=list(batch.req_ids),
        num_computed_tokens_np=batch.num_computed_tokens_cpu[:rows].copy(),
        query_start_loc_np=runner.query_start_loc.np[: rows + 1].copy(),
    )
