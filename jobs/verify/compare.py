"""Records beside those that a replay made of the same requests: what differs, and why it may.

In: chosen records, the replay's parts. Out: ``Replay``: counts, and each mismatch with its reasons
and both sides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.verify.asked import TODAY_SAMPLING, TODAY_SEEDS, RowKey
from jobs.verify.choose import Chosen
from pipeline.commit import StoredPart
from pipeline.profile import FLOAT32
from pipeline.records import Status

_CONTEXT = 40
"""Characters shown on either side of the first difference of two texts."""
_GPU = "NVIDIA"
"""What the names of GPUs begin with (see ``hardware``)."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A record that came out otherwise."""

    custom_id: str
    input_file: str
    input_row: int
    sample_index: int
    reasons: tuple[str, ...]
    """What is known to differ, likeliest cause first."""
    difference: str
    """The first place where the texts differ, or what else does."""
    recorded: Mapping[str, Any]
    replayed: Mapping[str, Any]


@dataclass(frozen=True)
class Replay:
    """What came of a replay."""

    sampled: int
    text_equal: int
    token_equal: int
    mismatches: tuple[Mismatch, ...]
    environment: tuple[str, ...]
    """How the engine and its surroundings differ from those of the run."""
    requests: tuple[str, ...]
    """How what the input and config come to today differs from what was recorded; the recorded
    parameters and seeds were used."""
    seconds: float

    @property
    def mismatch_rate(self) -> float:
        """Share of records that came out otherwise."""
        return len(self.mismatches) / self.sampled if self.sampled else 0.0

    def to_json(self) -> dict[str, Any]:
        """For verify.json and the last line."""
        return {**asdict(self), "mismatch_rate": self.mismatch_rate}


def compare(
    samples: Mapping[RowKey, Sequence[Chosen]],
    parts: Sequence[StoredPart],
    *,
    environment: tuple[str, ...],
    engine: str,
    dtype: str,
    seconds: float,
) -> Replay:
    """What a replay came to.

    Args:
        samples: the chosen records by row, in the order their samples were asked for.
        parts: the replay's.
        environment: how today's model and versions differ from the run's.
        engine: the fingerprint of the engine in ``run.json``.
        dtype: what that engine computes in, by vLLM's names.
        seconds: what the replay took.
    """
    pairs = [
        (samples[record["input_file"], record["input_row"]][record["sample_index"]], record, part)
        for part in parts
        for record in part.table.to_pylist()
    ]
    equal = [(_is_text_equal(old, new), _is_token_equal(old, new)) for old, new, _ in pairs]
    requests = Counter(what for old, new, _ in pairs for what in _request_differences(old, new))
    found = [
        _mismatch(
            old,
            new,
            [
                *_request_differences(old, new),
                *environment,
                *_machine_differences(old, part.stats.replica.get("hardware", ""), engine, dtype),
                *_cache_differences(old.record, new),
            ],
        )
        for (old, new, part), sides in zip(pairs, equal, strict=True)
        if not all(sides)
    ]
    made = {_key(old) for old, _, _ in pairs}
    lacking = [each for of in samples.values() for each in of if _key(each) not in made]
    found += [_mismatch(each, {}, ["its row failed today, before the engine"]) for each in lacking]
    return Replay(
        sampled=len(made) + len(lacking),
        text_equal=sum(texts for texts, _ in equal),
        token_equal=sum(tokens for _, tokens in equal),
        mismatches=tuple(found),
        environment=environment,
        requests=tuple(f"{what} ({count} records)" for what, count in requests.items()),
        seconds=round(seconds, 3),
    )


def _key(chosen: Chosen) -> tuple[RowKey, int]:
    return chosen.row, chosen.record["sample_index"]


def _is_text_equal(before: Chosen, now: Mapping[str, Any]) -> bool:
    return all(before.record[name] == now[name] for name in ("text", "finish_reason"))


def _is_token_equal(before: Chosen, now: Mapping[str, Any]) -> bool:
    """By the digests of the tokens; where one is not known, by their number."""
    old, new = before.record.get("completion_digest"), now["completion_digest"]
    if old is not None and new is not None:
        return bool(old == new)
    return bool(before.record["completion_tokens"] == now["completion_tokens"])


def _request_differences(before: Chosen, now: Mapping[str, Any]) -> list[str]:
    """Where today's input and config come to another request than the recorded one."""
    record = before.record
    found = []
    old, new = record.get("prompt_digest"), now["prompt_digest"]
    if old is not None and new is not None and old != new:
        found.append("the prompt: its tokens or images differ from those recorded")
    elif record["prompt_tokens"] != now["prompt_tokens"]:
        found.append(f"the prompt: {record['prompt_tokens']} -> {now['prompt_tokens']} tokens")
    today = json.loads(now[TODAY_SAMPLING]) if now[TODAY_SAMPLING] else {}
    asked = json.loads(record["sampling"])
    changed = [key for key in asked if today and today.get(key) != asked[key]]
    found += [f"sampling.{key}: {asked[key]} -> {today.get(key)}" for key in changed]
    seeds = now[TODAY_SEEDS]
    index = record["sample_index"]
    if index < len(seeds) and seeds[index] != record["seed"]:
        found.append("the seed that config and row give")
    return found


def _machine_differences(before: Chosen, hardware: str, engine: str, dtype: str) -> list[str]:
    found = []
    if before.engine and before.engine != engine:
        found.append("engine arguments: the row was made with others than run.json has")
    if before.hardware != hardware:
        found.append(f"hardware: {before.hardware or 'not recorded'} -> {hardware}")
    elif _GPU in hardware:
        found.append("batch: on GPUs the numbers depend on what else is in the batch")
    elif dtype not in FLOAT32:
        found.append(f"batch: with dtype {dtype} the numbers depend on what else is in the batch")
    return found


def _cache_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before["cached_tokens"], now["cached_tokens"]
    return [f"prefix cache: {old} -> {new} tokens found in it"] if old != new else []


def _mismatch(before: Chosen, now: Mapping[str, Any], reasons: Sequence[str]) -> Mismatch:
    record = before.record
    return Mismatch(
        custom_id=record["custom_id"],
        input_file=record["input_file"],
        input_row=record["input_row"],
        sample_index=record["sample_index"],
        reasons=tuple(reasons) or ("unknown: request, engine, versions and hardware are the same",),
        difference=_difference(record, now),
        recorded=_shown(record),
        replayed=_shown(now),
    )


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    names = ("status", "text", "finish_reason", "prompt_tokens", "completion_tokens")
    more = ("cached_tokens", "seed", "prompt_digest", "completion_digest", "error_message")
    return {name: record.get(name) for name in (*names, *more)}


def _first_difference(old: str, new: str) -> int:
    pairs = enumerate(zip(old, new, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(old), len(new)))


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first place where two texts differ; else the first column that does."""
    old, new = before["text"], now.get("text")
    if now and now["status"] != Status.SUCCEEDED and new is None:
        return f"{now['error_code']}: {now['error_message']}"
    if new is None:
        return "no completion today"
    if old != new:
        place = _first_difference(old, new)
        start = max(0, place - _CONTEXT)
        here = f"at character {place}: {old[start : place + _CONTEXT]!r}"
        return f"{here} was, {new[start : place + _CONTEXT]!r} is"
    for name in ("finish_reason", "completion_tokens", "completion_digest"):
        if before.get(name) != now[name]:
            return f"{name}: {before.get(name)} -> {now[name]}"
    return "none"
