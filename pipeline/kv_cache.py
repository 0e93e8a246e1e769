"""The KV cache: what sequences take of it, and how many fit.

In: how a model keeps keys and values (``KVLayout``), the bytes an engine has for them. Out: bytes
per sequence and sequences that fit. Pure arithmetic, decimal units (1 GB = 10^9 bytes): profiles
are checked with it, nothing here asks a GPU.

Per token and layer the cache holds a key and a value for each KV head: ``2 * kv_heads * head_dim *
bytes per element``. Llama 4 has two kinds of layers: every fourth attends to the whole context and
keeps all of it; the others attend within a chunk of 8,192 tokens and keep that, plus, while a
prompt is read, what is in flight (vLLM 0.32, ``ChunkedLocalAttentionSpec``, with its hybrid KV
cache manager, which is on unless a profile turns it off). Ranks that split the KV heads (tensor
parallelism) hold a part each, so a replica's cache is one pool; data-parallel ranks have a pool
each. Blocks are rounded up to their size by vLLM; that is left out here (under 1 % from 2,000
tokens on).
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one model keeps keys and values."""

    global_layers: int
    """Layers that keep the whole context."""
    chunked_layers: int
    """Layers that keep ``chunk`` tokens at most."""
    chunk: int
    """Tokens; of no meaning without chunked layers."""
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, element_bytes: float) -> float:
        """Of all layers, while the context is shorter than a chunk."""
        layers = self.global_layers + self.chunked_layers
        return layers * self._bytes_per_layer(element_bytes)

    def bytes_per_sequence(self, tokens: int, element_bytes: float, in_flight: int = 0) -> float:
        """What a sequence of ``tokens`` holds.

        Args:
            tokens: prompt and completion.
            element_bytes: 1 for an FP8 cache, 2 for BF16.
            in_flight: tokens scheduled and not yet settled: a step's, with asynchronous scheduling
                two steps', while the prompt is read; 0 afterwards.
        """
        kept = min(tokens, self.chunk + in_flight)
        held = self.global_layers * tokens + self.chunked_layers * kept
        return held * self._bytes_per_layer(element_bytes)

    def sequences(self, pool_bytes: float, tokens: int, element_bytes: float) -> int:
        """Sequences of ``tokens`` that a pool of ``pool_bytes`` holds, none of them being read."""
        return int(pool_bytes // self.bytes_per_sequence(tokens, element_bytes))

    def _bytes_per_layer(self, element_bytes: float) -> float:
        return 2 * self.kv_heads * self.head_dim * element_bytes


def pool_bytes(
    *, gpus: int, gpu_gb: float, utilization: float, weights_gb: float, reserve_gb: float
) -> float:
    """What a replica's GPUs have left for the cache; negative if the weights do not fit.

    Args:
        gpus: of the replica.
        gpu_gb: memory of one of them.
        utilization: the share of it that vLLM may take (``gpu_memory_utilization``).
        weights_gb: weights on all of them, copies of data-parallel ranks included.
        reserve_gb: activations, CUDA graphs and the vision tower, on all of them.
    """
    return (gpus * gpu_gb * utilization - weights_gb - reserve_gb) * GB
