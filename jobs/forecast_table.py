"""A plan for people: tables on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.forecast import Forecast
from pipeline.redact import redacted

_LEAST_WIDTH = 100
"""Characters, where stderr is no terminal: ray job submit's log, say."""


def show(forecast: Forecast, console: Console | None = None) -> None:
    """Print the plan; ``console`` is stderr by default."""
    out = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, _LEAST_WIDTH)
    plan: dict[str, Any] = redacted(forecast.to_json())
    out.print(_overview(plan, forecast.job.run.uri))
    if plan["errors"]:
        out.print(_bad_rows(plan))
    out.print(_prices(plan))


def _overview(plan: Mapping[str, Any], run: str) -> Table:
    table = Table(title=f"plan of {plan['name']}: nothing was written to {run}", show_header=False)
    table.add_column("what")
    table.add_column("how much")
    for what, how_much in (*_input_lines(plan), *_token_lines(plan), *_engine_lines(plan)):
        table.add_row(what, how_much)
    return table


def _input_lines(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rows, shards = plan["rows"], plan["shards"]
    yield "rows", f"{rows['total']:,} in {shards['total']:,} shards"
    if not plan["exact"]:
        looked_at = f"{rows['looked_at']:,} rows in {shards['looked_into']:,} shards"
        yield "looked at", f"{looked_at}, evenly spread; below is scaled up, with 95 % ranges"
    if plan["pending"]["rows"] != rows["total"]:
        done = _count(rows["total"] - plan["pending"]["rows"])
        yield "done already", f"{done} rows, in the output folder; below is for the whole input"
    share = f"{plan['error_rate']:.2%}, limits.max_error_rate {plan['max_error_rate']:.2%}"
    yield "bad rows", f"{_range(rows['bad'], _count)}  ({share})"


def _token_lines(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    tokens = plan["tokens"]
    yield "images", _range(plan["images"], _count)
    image = _range(tokens["image"], _count)
    yield "prompt tokens", f"{_range(tokens['prompt'], _count)}, of images {image}"
    yield "completions", _range(plan["completions"], _count)
    completion = tokens["completion"]
    yield (
        "completion tokens",
        f"{_range(completion, _count)} expected, at most {_count(completion['most'])}",
    )
    yield "", plan["completion_source"]["text"]


def _engine_lines(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    engine = plan["engine"]
    kind = f"{engine['accelerator'] or ''} GPUs".strip()
    gpus = f", {engine['gpus_per_replica']} {kind} each" if engine["gpus_per_replica"] else ""
    yield "engine", f"{engine['replicas']} x {engine['profile']} ({engine['model']}){gpus}"
    if engine["fits"] is not None:
        yield "", "; ".join(engine["lacking"]) or "the cluster asked here can hold that"
    seconds, rates = plan["seconds"], engine["rates"]
    if seconds is None:
        yield "wall time", "unknown: the profile has no section rates"
        return
    parts = ", ".join(f"{part} {_duration(seconds[part])}" for part in ("load", "work", "tail"))
    yield "wall time", f"{_range(seconds, _duration)}: {parts}"
    yield (
        "",
        f"rates: {rates['basis']} of {rates['as_of']}, {rates['hardware']}: {rates['source']}",
    )


def _bad_rows(plan: Mapping[str, Any]) -> Table:
    table = Table(title="bad rows")
    for column in ("code", "rows", "for example", "what to do"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    for code, found in plan["errors"].items():
        row = found["example"]
        where = f"{row['input_file']} row {row['input_row']} ({row['custom_id']}): {row['message']}"
        table.add_row(code, _count(found["rows"]), where, found["remedy"])
    return table


def _prices(plan: Mapping[str, Any]) -> Table:
    expected, low, high = (plan["money"][end] for end in ("expected", "low", "high"))
    table = Table(title=f"money, {expected['currency']}")
    for column in ("where", "cost", "range", "how"):
        table.add_column(column, justify="right" if column in ("cost", "range") else "left")
    own = expected["cluster"]
    if own is None:
        table.add_row("this cluster", "-", "-", _why_no_cost(plan))
    else:
        table.add_row(
            "this cluster",
            _amount(own["cost"]),
            _amounts(low["cluster"]["cost"], high["cluster"]["cost"]),
            f"{own['gpu_hours']:,.2f} GPU-hours at {own['gpu_hour_price']:g}",
        )
    for each, least, most in zip(expected["hosted"], low["hosted"], high["hosted"], strict=True):
        table.add_row(
            each["name"],
            _amount(each["cost"]),
            _amounts(least["cost"], most["cost"]),
            f"list price of {each['as_of']}",
        )
    return table


def _why_no_cost(plan: Mapping[str, Any]) -> str:
    if not plan["engine"]["gpus_per_replica"]:
        return "no GPUs"
    if plan["seconds"] is None:
        return "wall time unknown"
    return f"no price of {plan['engine']['accelerator'] or 'its GPUs'}: set prices.gpu_hour"


def _range(found: Mapping[str, float], say: Callable[[float], str]) -> str:
    value, low, high = (say(found[end]) for end in ("value", "low", "high"))
    return value if low == high == value else f"{value} ({low} to {high})"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _amounts(low: float, high: float) -> str:
    return f"{_amount(low)} to {_amount(high)}"


def _amount(cost: float) -> str:
    """Cents, or of less than one four digits."""
    return f"{cost:,.2f}" if cost >= 1 or cost == 0 else f"{cost:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
