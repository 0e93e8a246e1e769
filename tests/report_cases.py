"""Runs that never ran: the stats of their parts, for reports of every kind. Nothing is random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.commit import Attempt, Example, PartStats
from pipeline.errors import ErrorCode
from pipeline.experts import ExpertLayout, ExpertLoad
from pipeline.histogram import latency_bucket
from pipeline.pace import Pace
from pipeline.report import Result, RunStatus, total

START = 1_795_640_400.0  # 25 Nov 2026, 21:00 UTC
MANIFEST: Mapping[str, Any] = {
    "config": {
        "name": "nightly",
        "seed": 20261125,
        "sampling": {"temperature": 0.7, "max_completion_tokens": 256, "stop": None},
        "engine": {"profile": "maverick-fp8-8xh100", "replicas": 4},
        "limits": {"max_error_rate": 0.01},
    },
    "engine": {"engine_args": {"max_model_len": 16384, "enable_expert_parallel": True}},
    "model": {"name": "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", "revision": "0" * 40},
    "input": {
        "uri": "s3://batch/prompts/",
        "files": 12,
        "rows": 98_304,
        "fingerprint": "sha256:" + "5" * 64,
    },
    "versions": {"maverick-batch": "0.1.0", "python": "3.11.13", "engine": "vllm 0.32.0"},
}
MONEY = {
    "currency": "USD",
    "cluster": {"gpu_hours": 38.93, "gpu_hour_price": 2.5, "cost": 97.33},
    "hosted": [{"name": "a hosted API", "cost": 141.2, "as_of": "2026-11-25"}],
}
MESSAGES: Mapping[str, str] = {
    "image_invalid": "image 1: cannot identify image file (PNG, JPEG, WebP, GIF, BMP, TIFF)",
    "context_length_exceeded": "the prompt has 16,912 tokens, the model takes 16,384",
    "timeout": "not finished after 600 s",
}


@dataclass(frozen=True)
class Night:
    """A run of equal shards over some replicas, in one or more starts."""

    shards: int
    rows: int = 512
    """Of each shard."""
    replicas: int = 4
    starts: tuple[float, ...] = (START,)
    per_start: tuple[int, ...] = ()
    """Shards that each start commits; by default, equal shares."""
    open_s: float = 90.0
    """Seconds a shard is open."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """Records of each code in every shard."""
    tokens_per_row: int = 180

    def parts(self) -> Iterator[PartStats]:
        """The stats of its parts."""
        share = -(-self.shards // len(self.starts))
        counts = self.per_start or (share,) * len(self.starts)
        index = 0
        for number, (start, count) in enumerate(zip(self.starts, counts, strict=True)):
            for n in range(min(count, self.shards - index)):
                yield self._part(index, number, start, n)
                index += 1

    def _part(self, index: int, start_number: int, start: float, n: int) -> PartStats:
        replica = n % self.replicas
        at_once = 4
        opened = start + 75 + replica * 3 + (n // self.replicas) * self.open_s / at_once
        errored = sum(self.errors.values())
        made = self.rows - errored
        seconds = [int(opened) + i for i in range(8, int(self.open_s))]
        weights = [
            2 + math.sin(i / 9) + math.cos((index * 7 + i) / 23) for i in range(len(seconds))
        ]
        rows = [round(self.rows * w / sum(weights)) for w in weights]
        rows[-1] += self.rows - sum(rows)
        per_row = self.tokens_per_row + index % 40
        return PartStats(
            shard=index,
            rows={"succeeded": made, "errored": errored, "expired": 0},
            records=self.rows,
            tokens={
                "prompt": 420 * self.rows,
                "completion": per_row * made,
                "cached": 96 * self.rows,
                "image": 50 * self.rows,
            },
            errors=dict(self.errors),
            finish_reasons={"stop": made - made // 50, "length": made // 50} if made else {},
            lengths=_bell(made, per_row.bit_length(), 1.2),
            seconds=self.open_s,
            run="r",
            cpu_s={"read": 0.02, "prepare": 0.4, "engine": 0.6, "commit": 0.05},
            latencies=_bell(made, latency_bucket(6.5), 7.0),
            prompt_lengths=_bell(self.rows, 9, 1.0),
            examples={code: (_example(code, index),) for code in self.errors},
            pace=Pace(
                1,
                seconds[0],
                tuple(s - seconds[0] for s in seconds[:64]),
                tuple(_fold(rows)),
                tuple(per_row * count if made else 0 for count in _fold(rows)),
            ),
            attempt=Attempt(
                replica=f"{start_number:x}{replica:03x}a7c4",
                process=f"{start_number:x}{replica:03x}p000",
                node=f"gpu-{replica + 1:02d}",
                engine_restarts=int(replica == 1),
                start=start,
                opened=opened,
            ),
            made_tokens=per_row * made,
            committed_at=opened + self.open_s,
        )


def _fold(rows: list[int]) -> list[int]:
    """What a pace has no bins for goes into the last one."""
    return [*rows[:63], sum(rows[63:])] if len(rows) > 64 else rows


def _bell(count: int, middle: int, width: float) -> dict[str, int]:
    """``count`` over buckets around ``middle``, most of them there."""
    if not count:
        return {}
    reach = range(max(0, middle - int(3 * width)), middle + int(3 * width) + 1)
    weights = {k: math.exp(-(((k - middle) / width) ** 2) / 2) for k in reach}
    found = {k: int(count * w / sum(weights.values())) for k, w in weights.items()}
    found[middle] += count - sum(found.values())
    return {str(k): n for k, n in found.items() if n}


def _example(code: str, index: int) -> Example:
    message = MESSAGES.get(code, f"what was wrong with it ({code})")
    return Example(
        f"request-{index:06d}", "s3://batch/prompts/part-3.parquet", 512 * index, message
    )


def result(
    night: Night,
    *,
    status: RunStatus = RunStatus.COMPLETE,
    rows_total: int | None = None,
    error: str | None = None,
    run: str = "s3://batch/runs/2026-11-25",
) -> Result:
    """How a run that committed ``night`` ended."""
    parts = list(night.parts())
    totals = total(parts)
    ends = [part.committed_at for part in parts]
    seconds = max(ends, default=START + 2.2) - night.starts[-1] + 4.5
    rows = totals.ended if rows_total is None else rows_total
    return Result(status, run, rows, totals, seconds, totals.ended, error)


def skewed_load() -> ExpertLoad:
    """Maverick's 24 MoE layers, each with a few favourites among its 128 experts, and two idle."""
    layer, expert = np.mgrid[0:24, 0:128]
    far = (expert * 37 + layer * 11) % 128  # from the layer's favourite
    counts = (8_000_000 / (1 + far)).astype(np.int64) + 40_000 * (far < 126)
    counts[far >= 126] = 0
    tokens = int(counts[0].sum())
    counts[:, 0] += tokens - counts.sum(axis=1)
    return ExpertLoad(ExpertLayout(tuple(range(1, 48, 2)), 128), tokens, counts)


ONE_NIGHT = Night(192, errors={"image_invalid": 1, "context_length_exceeded": 1, "timeout": 1})
EVERY_CODE = Night(8, errors={str(code): 3 for code in ErrorCode})
SEVERAL_STARTS = Night(
    96,
    starts=(START, START + 7_200, START + 93_600),
    per_start=(20, 50, 26),
    errors={"image_invalid": 2},
)
ALL_FAILED = Night(4, rows=50, errors={"image_not_found": 50})
MANY_REPLICAS = Night(640, replicas=64)
TEN_MILLION = Night(20_000, rows=500, replicas=32, errors={"timeout": 1})
