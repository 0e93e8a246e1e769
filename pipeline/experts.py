"""How evenly a mixture of experts is used: tokens by MoE layer and expert.

In: the expert ids that the engine returns with a request, if it was started with vLLM's
``enable_return_routed_experts``. Out: an ``ExpertLoad`` per request, their sum per committed part
(``PackedLoad``), and of all parts the report's ``experts``.

Counted is what the engine computed for requests that it completed: of each the tokens of its prompt
that were not found in the prefix cache, and of its completion, but for the last token, which no
layer ever sees. What was computed twice after a preemption counts once; requests that died with an
engine, or whose replica died before its next commit, are not in it.
"""

from __future__ import annotations

import base64
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engine_rules import expert_ranks

Counts = npt.NDArray[np.int64]
_STORED = "<i8"


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where a model has routed experts."""

    layers: tuple[int, ...]
    """Numbers of the layers that have some, from 0."""
    experts: int
    """Of each such layer."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """Routed tokens."""

    layout: ExpertLayout
    tokens: int
    """Counted tokens; each was routed once, or ``top_k`` times, in each layer."""
    counts: Counts
    """(layers, experts): how often a token was sent to an expert."""

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        assert self.layout == other.layout
        return ExpertLoad(
            self.layout, self.tokens + other.tokens, np.add(self.counts, other.counts)
        )


@dataclass(frozen=True, slots=True)
class PackedLoad:
    """An ``ExpertLoad`` as a part's stats keep it: a few kB for a model as large as Maverick."""

    layers: tuple[int, ...]
    experts: int
    tokens: int
    counts: str
    """Base64 of zlib of little-endian 64-bit integers, layer by layer."""

    @classmethod
    def of(cls, load: ExpertLoad) -> PackedLoad:
        """``load``, packed."""
        raw = zlib.compress(load.counts.astype(_STORED).tobytes())
        layout = load.layout
        return cls(layout.layers, layout.experts, load.tokens, base64.b64encode(raw).decode())

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> PackedLoad:
        """From the object that ``dataclasses.asdict`` made, after a way through JSON.

        Raises:
            ValueError, TypeError: it is damaged.
        """
        packed = cls(**{**stored, "layers": tuple(stored["layers"])})
        packed.unpacked()
        return packed

    def unpacked(self) -> ExpertLoad:
        """The load.

        Raises:
            ValueError: the counts are damaged.
        """
        try:
            counts = np.frombuffer(zlib.decompress(base64.b64decode(self.counts)), _STORED)
            shaped = counts.astype(np.int64).reshape(len(self.layers), self.experts)
        except (zlib.error, ValueError) as error:
            raise ValueError(f"counts of experts: {error}") from None
        return ExpertLoad(ExpertLayout(self.layers, self.experts), self.tokens, shaped)


class ExpertTokens:
    """Sums up the loads of requests; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sum: ExpertLoad | None = None

    def add(self, load: ExpertLoad | None) -> None:
        """Count a request; None: its experts are not known."""
        if load is None:
            return
        with self._lock:
            self._sum = load if self._sum is None else self._sum + load

    def take(self) -> PackedLoad | None:
        """The sum since the last call; None if nothing was counted."""
        with self._lock:
            taken, self._sum = self._sum, None
        return None if taken is None else PackedLoad.of(taken)


class ExpertSums:
    """Sums up the loads of parts. Parts of a run that changed its model stay apart."""

    def __init__(self) -> None:
        self._sums: dict[ExpertLayout, ExpertLoad] = {}

    def add(self, packed: PackedLoad | None) -> None:
        """Count a part; None: its engine did not tell."""
        if packed is None:
            return
        load = packed.unpacked()
        known = self._sums.get(load.layout)
        self._sums[load.layout] = load if known is None else known + load

    def most(self) -> ExpertLoad | None:
        """The sum; of several models', the one with most tokens. None if nothing was counted."""
        return max(self._sums.values(), key=lambda load: load.tokens, default=None)


def layout_of(text_config: Any, experts: int) -> ExpertLayout:
    """The layout of a Hugging Face text config: Llama 4's names its MoE layers (``moe_layers``);
    where none are named, all are taken to be such."""
    named = getattr(text_config, "moe_layers", None)
    return ExpertLayout(tuple(named or range(text_config.num_hidden_layers)), experts)


def load_of(
    routed: npt.NDArray[Any] | None, cached_tokens: int, layout: ExpertLayout | None
) -> ExpertLoad | None:
    """One request's load; None if the engine was not told to return its routing.

    Args:
        routed: (tokens, all layers, top_k) expert ids by position in prompt and completion; of
            layers without experts they mean nothing.
        cached_tokens: the first so many were computed for an earlier request.
        layout: where the experts are.
    """
    if routed is None or layout is None:
        return None
    fresh = routed[cached_tokens:, list(layout.layers), :].astype(np.int64)
    rows = np.arange(len(layout.layers)) * layout.experts
    size = len(layout.layers) * layout.experts
    counts = np.bincount((fresh + rows[:, None]).ravel(), minlength=size)
    shape = (len(layout.layers), layout.experts)
    return ExpertLoad(layout, len(fresh), counts.reshape(shape).astype(np.int64))


def experts_document(load: ExpertLoad, engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """``experts`` of the report.

    Ranks hold neighbouring experts, as vLLM spreads them. With EPLB, which moves them meanwhile,
    the ranks' figures are those of an engine without: what it has to even out.
    """
    ranks = expert_ranks(engine_args)
    layers = [
        _layer(number, counts, ranks)
        for number, counts in zip(load.layout.layers, load.counts, strict=True)
    ]
    return {
        "tokens": load.tokens,
        "experts": load.layout.experts,
        "ranks": ranks,
        "balanced": bool(engine_args.get("enable_eplb", False)),
        "max_over_mean": _mean(layer["max_over_mean"] for layer in layers),
        "rank_max_over_mean": _mean(layer["rank_max_over_mean"] for layer in layers),
        "layers": layers,
    }


def _layer(number: int, counts: Counts, ranks: int) -> dict[str, Any]:
    by_rank = [int(held.sum()) for held in np.array_split(counts, ranks)]
    return {
        "layer": number,
        "busiest": int(counts.argmax()),
        "unused": int((counts == 0).sum()),
        "max_over_mean": _max_over_mean(counts.tolist()),
        "rank_max_over_mean": _max_over_mean(by_rank),
        "rank_tokens": by_rank,
        "tokens": counts.tolist(),
    }


def _max_over_mean(loads: Sequence[int]) -> float:
    """1 if all are equal; of nothing, 1 as well."""
    total = sum(loads)
    return round(max(loads) * len(loads) / total, 3) if total else 1.0


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return round(sum(given) / len(given), 3)
