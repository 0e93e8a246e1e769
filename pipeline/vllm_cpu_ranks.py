"""What data-parallel ranks on CPUs lack to share their experts: rows of all, and sums of rows.

vLLM spreads a data-parallel engine's experts over all ranks: each gathers the others' rows, adds
what its own experts make of them, and takes its rows of the sum back. ``CpuCommunicator`` has
neither operation (``NotImplementedError``). Made into replacements by ``vllm_cpu``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def gathering_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """``all_gatherv`` of a CPU group: the rows of all ranks, ``sizes[rank]`` of each."""
    import torch  # deferred, as it takes seconds

    @functools.wraps(original)
    def all_gatherv(
        self: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> Any:
        if dim != 0:
            raise NotImplementedError("all_gatherv on CPU: rows only")
        if isinstance(input_, list):
            return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
        counts = sizes or [input_.shape[0]] * self.world_size
        padded = input_.new_zeros((max(counts), *input_.shape[1:]))  # gloo wants equal shapes
        padded[: input_.shape[0]] = input_
        gathered = self.all_gather(padded, dim=0).unflatten(0, (self.world_size, max(counts)))
        rows = [gathered[rank, :count] for rank, count in enumerate(counts)]
        return torch.cat(rows)

    return all_gatherv


def reducing_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """``reduce_scatterv`` of a CPU group: this rank's ``sizes[rank]`` rows of the sum of all."""

    @functools.wraps(original)
    def reduce_scatterv(
        self: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> Any:
        if dim != 0:
            raise NotImplementedError("reduce_scatterv on CPU: rows only")
        counts = sizes or [input_.shape[0] // self.world_size] * self.world_size
        begin = sum(counts[: self.rank_in_group])
        total = self.all_reduce(input_.clone())
        return total[begin : begin + counts[self.rank_in_group]].clone()

    return reduce_scatterv
