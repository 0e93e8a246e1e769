"""What vLLM 0.32 finds wrong only with the weights loaded, or never: said before a GPU is touched.

In: a profile's engine arguments and what it tells of the model. Out: nothing, or a ``ValueError``
that names argument, value and remedy. The rest vLLM's own config validation refuses at once; a test
holds the shipped profiles to that, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def expert_ranks(arguments: Mapping[str, Any]) -> int:
    """Ranks the experts are spread over: TP x DP with expert parallelism, else 1; pipeline stages
    have other layers."""
    if not arguments.get("enable_expert_parallel", False):
        return 1
    sizes = (arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "data"))
    return math.prod(int(size) for size in sizes)


def check_block_size(arguments: Mapping[str, Any], chunk: int) -> None:
    """Chunked attention cuts chunks into blocks: vLLM asserts it in the first step.

    Raises:
        ValueError: ``block_size`` does not divide ``chunk``.
    """
    size = arguments.get("block_size")
    if size is not None and (not isinstance(size, int) or size < 1 or chunk % size):
        raise ValueError(
            f"engine_args.block_size = {size!r}: must divide the model's attention chunk of "
            f"{chunk} tokens; leave it out, or take 16, 32 or 64"
        )


def check_experts(arguments: Mapping[str, Any], experts: int | None, ranks: int) -> None:
    """Expert load balancing needs as many experts on each rank: vLLM says so as layers are built.

    Args:
        arguments: vLLM's.
        experts: routed experts of each MoE layer; None: unknown.
        ranks: that the experts are spread over.

    Raises:
        ValueError: EPLB without expert parallelism, a malformed config of it, or copies that leave
            ranks uneven.
    """
    if not arguments.get("enable_eplb", False):
        return
    if ranks == 1:
        raise ValueError(
            "engine_args.enable_eplb: there is nothing to balance without expert parallelism over "
            "several ranks; set enable_expert_parallel, or leave it out"
        )
    copies = _copies(arguments.get("eplb_config", {}))
    uneven = 0 if experts is None else (experts + copies) % ranks
    if uneven:
        raise ValueError(
            f"engine_args.eplb_config.num_redundant_experts = {copies}: {experts} experts and "
            f"{copies} copies do not spread evenly over {ranks} ranks; take "
            f"{copies - uneven if copies >= uneven else copies - uneven + ranks}"
        )


def _copies(config: object) -> int:
    if not isinstance(config, Mapping):
        raise ValueError(f"engine_args.eplb_config = {config!r}: must be a mapping")
    copies = config.get("num_redundant_experts", 0)
    if not isinstance(copies, int) or isinstance(copies, bool) or copies < 0:
        raise ValueError(
            f"engine_args.eplb_config.num_redundant_experts = {copies!r}: must be a whole number "
            "from 0"
        )
    return copies
