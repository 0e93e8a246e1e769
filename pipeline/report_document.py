"""report.json's content: how a run ended, its totals, its course, and what it was made with.

In: the result's own object, the totals and the manifest. Out: one JSON document, of a size that
depends on replicas, starts and kinds of errors, not on rows or parts. ``docs/output.md`` describes
each field; ``report.html`` shows this document and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import ErrorCode
from pipeline.experts import experts_document
from pipeline.histogram import LATENCY_ERROR, latency_bounds, length_bounds, quantile_bucket
from pipeline.history import History, ReplicaHistory, StartHistory, Throughput
from pipeline.redact import redacted
from pipeline.remedies import REMEDIES
from pipeline.totals import Totals

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
Document = Mapping[str, Any]


def report_document(
    result: Document, totals: Totals, manifest: Document, finished: datetime
) -> dict[str, Any]:
    """The document.

    Args:
        result: the job's last stdout line.
        totals: of the run's parts.
        manifest: ``run.json``.
        finished: when this start ended.
    """
    return {
        **redacted(result),
        "finished_at": finished.isoformat(timespec="seconds"),
        "records": totals.records,
        "errors": dict(totals.errors),
        "error_details": _error_details(totals),
        "finish_reasons": dict(totals.finish_reasons),
        "completion_lengths": _lengths(totals.lengths, "completions"),
        "prompt_lengths": _lengths(totals.prompt_lengths, "rows"),
        "latency_s": _latency(totals.latencies),
        "parts": totals.parts,
        "time": _time(totals.history, float(result["seconds"])),
        "throughput": _throughput(totals.history.throughput(), totals),
        "replicas": [_replica(replica) for replica in totals.history.replicas()],
        "cpu_s": {step: round(spent, 3) for step, spent in sorted(totals.cpu_s.items())},
        "experts": _experts(totals, manifest),
        "made_with": _made_with(redacted(manifest)),
    }


def _experts(totals: Totals, manifest: Document) -> dict[str, Any] | None:
    if totals.experts is None:
        return None
    return experts_document(totals.experts, manifest.get("engine", {}).get("engine_args", {}))


def _error_details(totals: Totals) -> list[dict[str, Any]]:
    """Error codes, the most frequent first."""
    ordered = sorted(totals.errors.items(), key=lambda item: (-item[1], item[0]))
    return [
        {
            "code": code,
            "records": count,
            "share": round(count / totals.records, 6) if totals.records else 0.0,
            "remedy": REMEDIES[ErrorCode(code)],
            "examples": [asdict(example) for example in totals.examples.get(code, ())],
        }
        for code, count in ordered
    ]


def _lengths(counts: Mapping[str, int], of: str) -> list[dict[str, int]]:
    """Texts by length: each bucket holds those of ``from`` to ``to`` tokens."""
    return [
        {**dict(zip(("from", "to"), length_bounds(bucket), strict=True)), of: counts[str(bucket)]}
        for bucket in sorted(map(int, counts))
    ]


def _latency(counts: Mapping[str, int]) -> dict[str, Any]:
    """Quantiles are upper ends of buckets: at most ``bucket_error`` above the truth."""
    buckets = {int(bucket): count for bucket, count in counts.items()}
    quantiles = {name: quantile_bucket(buckets, share) for name, share in _QUANTILES.items()}
    return {
        "completions": sum(buckets.values()),
        **{
            name: None if bucket is None else _rounded(latency_bounds(bucket)[1])
            for name, bucket in quantiles.items()
        },
        "bucket_error": round(LATENCY_ERROR, 3),
        "histogram": [
            {
                "above": _rounded(latency_bounds(bucket)[0]),
                "to": _rounded(latency_bounds(bucket)[1]),
                "completions": buckets[bucket],
            }
            for bucket in sorted(buckets)
        ],
    }


def _rounded(seconds: float) -> float:
    """To four digits: more would pretend to know more than the bucket."""
    return float(f"{seconds:.4g}")


def _time(history: History, seconds: float) -> dict[str, Any]:
    starts = history.starts()
    return {
        "active_s": round(max(history.active_s(), seconds), 1),
        "first_start": _moment(starts[0].start) if starts else None,
        "last_commit": _moment(max(start.end for start in starts)) if starts else None,
        "starts": [_start(start) for start in starts],
    }


def _start(start: StartHistory) -> dict[str, Any]:
    return {
        "start": _moment(start.start),
        "first_shard": _moment(start.first_open),
        "last_commit": _moment(start.end),
        "rows": start.rows,
        "parts": start.parts,
        "replicas": len(start.replicas),
    }


def _throughput(throughput: Throughput, totals: Totals) -> dict[str, Any]:
    bins = sum(len(stretch.rows) for stretch in throughput.stretches)
    tokens = sum(sum(stretch.tokens) for stretch in throughput.stretches)
    return {
        "bin_s": throughput.bin_s,
        "rows": throughput.rows,
        "rows_without_time": max(0, totals.ended - throughput.rows),
        "completion_tokens": tokens,
        "mean_tokens_per_s": round(tokens / (bins * throughput.bin_s), 2) if bins else 0.0,
        "stretches": [
            {
                "start": _moment(stretch.start),
                "rows": list(stretch.rows),
                "completion_tokens": list(stretch.tokens),
            }
            for stretch in throughput.stretches
        ],
    }


def _replica(replica: ReplicaHistory) -> dict[str, Any]:
    stretches = replica.stretches()
    busy = sum(stretch.seconds for stretch in stretches)
    return {
        "name": replica.name,
        "nodes": sorted(replica.nodes),
        "first": _moment(stretches[0].start),
        "last": _moment(stretches[-1].end),
        "busy_s": round(busy, 1),
        "parts": replica.parts,
        "rows": replica.rows,
        "completion_tokens": replica.tokens,
        "tokens_per_s": round(replica.tokens / busy, 2) if busy else 0.0,
        "restarts": len(replica.engine_restarts) - 1,
        "engine_restarts": sum(replica.engine_restarts.values()),
        "cold_starts": len(replica.cold_starts_s),
        "cold_start_s": round(sum(replica.cold_starts_s.values()), 1),
        "stretches": [[_moment(stretch.start), _moment(stretch.end)] for stretch in stretches],
    }


def _made_with(manifest: Document) -> dict[str, Any]:
    """What a replay needs to know; of an accepted change, the last state."""
    config, engine = manifest["config"], manifest.get("engine", {})
    return {
        "name": config["name"],
        "seed": config["seed"],
        "sampling": {k: v for k, v in config.get("sampling", {}).items() if not _is_empty(v)},
        "max_error_rate": config.get("limits", {}).get("max_error_rate"),
        "model": manifest["model"],
        "engine": {
            "profile": config["engine"]["profile"],
            "replicas": config["engine"]["replicas"],
            "args": engine.get("engine_args", {}),
        },
        "versions": manifest["versions"],
        "input": manifest["input"],
        "changes": manifest.get("history", []),
    }


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, Sequence | Mapping) and not value)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
