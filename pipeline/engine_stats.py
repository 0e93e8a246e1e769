"""vLLM's own metrics, a choice of them, by vLLM's names.

In: what vLLM tells of each step. Out: ``vllm_`` metrics in the process's registry, from where they
are handed on once a second. vLLM's own Prometheus loggers write all of its series, with its own or
Ray's library, on the loop that feeds the engine. This writes eight values a step, and four a
request, into dictionaries: 5 and 4 microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import metrics

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats


def note_step(
    scheduler: SchedulerStats | None, iteration: IterationStats | None, *labels: str
) -> None:
    """Note one step of a data-parallel rank, as vLLM's stat loggers hear of it; ``labels`` are
    vLLM's: the model's name and the rank."""
    if scheduler is not None:
        waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
        metrics.VLLM_RUNNING.set(scheduler.num_running_reqs, *labels)
        metrics.VLLM_WAITING.set(waiting, *labels)
        metrics.VLLM_KV_CACHE.set(scheduler.kv_cache_usage, *labels)
        metrics.VLLM_PREFIX_QUERIES.add(scheduler.prefix_cache_stats.queries, *labels)
        metrics.VLLM_PREFIX_HITS.add(scheduler.prefix_cache_stats.hits, *labels)
    if iteration is not None:
        metrics.VLLM_PREEMPTIONS.add(iteration.num_preempted_reqs, *labels)
        metrics.VLLM_PROMPT_TOKENS.add(iteration.num_prompt_tokens, *labels)
        metrics.VLLM_GENERATION_TOKENS.add(iteration.num_generation_tokens, *labels)
        for seconds in iteration.time_to_first_tokens_iter:
            metrics.VLLM_FIRST_TOKEN.observe(seconds, *labels)
        for request in iteration.finished_requests:
            metrics.VLLM_SUCCESS.add(1, *labels, str(request.finish_reason))
            metrics.VLLM_LATENCY.observe(request.e2e_latency, *labels)
            metrics.VLLM_QUEUE_TIME.observe(request.queued_time, *labels)
            metrics.VLLM_PER_TOKEN.observe(request.mean_time_per_output_token, *labels)
