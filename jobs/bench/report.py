"""The report: stored measurements -> ``docs/benchmarks.md``, the picture beside it, a table.

Pure but for ``write``. Ratios stand in front, times are not told: they belong to one machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.bench import ray_llm_tuning as tuning
from jobs.bench.contenders import CLOCKS, DESCRIPTIONS, Contender
from jobs.bench.results import (
    Measurement,
    Setting,
    Spread,
    cache_hits,
    latest_settings,
    of_setting,
    ratio,
    same_work,
    spread,
)
from jobs.bench.workloads import WORKLOADS, Workload

REPORT = "benchmarks.md"
PICTURE = "benchmarks.svg"
MEMORY_PICTURE = "ceiling-memory.svg"
CEILINGS = {"text": 3000, "images": 400, "memory": None}
"""What ``jobs.bench.ceiling`` runs, and the least rows a second on two cores."""
ENOUGH_ROUNDS = 3

_ROUNDS = dict[Contender, dict[int, Measurement]]

_HEAD = """\
# Benchmarks

Made by `python -m jobs.bench --report` from `out/bench/results.jsonl`; do not edit by hand. Each
ratio is this pipeline's rate over another's on the same rows, engine arguments and machine,
measured in turns within one run: above 1 this pipeline is faster. A ratio pairs the two
measurements of one round; told are the smallest, the **median** and the largest of all rounds.
"""

_DEFINITIONS = """\
## What is measured

Rates are completion tokens a second of the steady state; model load is left out everywhere. Every
contender runs in a process of its own, fresh in each round; the order moves on by one each round.
Rows bring a seed and a length each, and a `logit_bias` of -100 on the ids that end a completion
makes lengths exact, so that all make the same tokens; answers of `images` end by themselves, with
temperature 0. A ratio counts only if both made as many completion tokens, within 1 %.

| contender | what it is | the clock |
|---|---|---|
{contenders}

On CPUs the pipeline's engine schedules and computes in one process, as its profiles say
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`); the others have vLLM's default, which computes in a process of
its own and keeps one core free of it. On two cores that is half the machine, so `vllm.LLM` is
measured with either.

`pipeline` and `ray-data-llm` read and tokenize their first rows while the model loads; `vllm-llm`
does all of that on the clock, as its one call does it.

`ray-data-llm` gets what it cannot do without on a CPU (`placement_group_config` of one CPU, no
metrics of Ray Serve, 8 logical CPUs, so that its stages do not wait for each other). Tuned means
{tuning}.
For images it needs an older vLLM, `{old}`, in a venv that the benchmark makes; that ratio
compares two versions of vLLM, and its prompts begin with a second start token, as its engine adds
one to the template's.
"""


def document(found: Sequence[Measurement], ceilings: Mapping[str, Any]) -> str:
    """All of ``docs/benchmarks.md``; ``ceilings`` as ``read_ceilings`` gives them."""
    settings = latest_settings(found)
    groups = {name: of_setting(found, setting) for name, setting in settings.items()}
    known = [name for name in WORKLOADS if name in settings]
    sections = [
        _HEAD,
        f"![Ratios]({PICTURE})\n" if known else "",
        _ratios([(WORKLOADS[name], settings[name], groups[name]) for name in known]),
        _prefix_cache(groups.get("prefixes", {})),
        _ceiling(ceilings),
        _not_run([name for name in WORKLOADS if name not in settings]),
        definitions(),
        _setup(settings.values(), [one for name in known for one in _all(groups[name])]),
    ]
    return "\n".join(section for section in sections if section)


def definitions() -> str:
    """What the words and the clocks mean."""
    rows = (f"| `{who}` | {DESCRIPTIONS[who]} | {CLOCKS[who]} |" for who in Contender)
    return _DEFINITIONS.format(
        contenders="\n".join(rows), tuning=tuning.DESCRIPTION, old=tuning.OLD_VLLM
    )


def verdict(found: Spread, target: float | None, *, fair: bool) -> str:
    """One word or two about a ratio."""
    if not fair:
        return "not comparable: token totals differ"
    if target is None:
        return "-"
    word = "reached" if found.middle >= target else "missed"
    few = "" if found.rounds >= ENOUGH_ROUNDS else f", {found.rounds} of {ENOUGH_ROUNDS} rounds"
    return f"{word}{few}"


def ratio_rows(workload: Workload, groups: _ROUNDS) -> list[tuple[Contender, Spread, str]]:
    """This pipeline against each contender that shares a round with it."""
    ours = groups.get(Contender.PIPELINE, {})
    rows = []
    for contender in workload.contenders:
        theirs = groups.get(contender, {})
        found = None if contender is Contender.PIPELINE else ratio(ours, theirs)
        if found is not None:
            told = verdict(found, workload.targets.get(contender), fair=same_work(ours, theirs))
            rows.append((contender, found, told))
    return rows


def console_table(found: Sequence[Measurement]) -> Table:
    """The same for a terminal, with the rates."""
    table = Table(title="this pipeline over the others")
    for name in ("workload", "rows", "contender", "tok/s", "rows/s", "ratio", "target", "verdict"):
        table.add_column(name, justify="left" if name in ("workload", "contender") else "right")
    for name, setting in latest_settings(found).items():
        groups = of_setting(found, setting)
        compared = {who: (how, told) for who, how, told in ratio_rows(WORKLOADS[name], groups)}
        for contender, rounds in groups.items():
            tokens = spread([one.tokens_per_s for one in rounds.values()])
            rows = spread([one.rows_per_s for one in rounds.values()])
            how, told = compared.get(contender, (None, ""))
            target = WORKLOADS[name].targets.get(contender)
            table.add_row(
                *(name, str(setting.rows), contender, f"{tokens.middle:.0f}"),
                *(f"{rows.middle:.1f}", _plain(how) if how else "", _target(target), told),
            )
    return table


def read_ceilings(out: Path) -> dict[str, Any]:
    """What ``jobs.bench.ceiling`` left in ``out``, by its workload."""
    files = (out / f"ceiling-{name}.json" for name in CEILINGS)
    documents = (json.loads(path.read_text("utf-8")) for path in files if path.exists())
    return {document["workload"]: document for document in documents}


def write(found: Sequence[Measurement], out: Path, docs: Path) -> None:
    """``docs/benchmarks.md`` and its pictures, of what is stored in ``out``."""
    ceilings = read_ceilings(out)
    (docs / REPORT).write_text(document(found, ceilings), encoding="utf-8")
    if "memory" in ceilings:
        shutil.copy(out / MEMORY_PICTURE, docs / MEMORY_PICTURE)
    known = latest_settings(found)
    if known:
        ratios = {
            name: ratio_rows(workload, of_setting(found, known[name]))
            for name, workload in WORKLOADS.items()
            if name in known
        }
        draw(ratios, docs / PICTURE)


def draw(ratios: Mapping[str, Sequence[tuple[Contender, Spread, str]]], path: Path) -> None:
    """A dot a ratio with its smallest and largest, one line a pair, as SVG."""
    import matplotlib as mpl  # deferred: only reports draw
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "bench"  # the same picture is the same file
    lines = [(f"{name}: {who}", how) for name, rows in ratios.items() for who, how, _ in rows]
    figure = Figure(figsize=(8, 1 + 0.35 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, how) in enumerate(reversed(lines)):
        axes.plot([how.low, how.high], [place, place], color="tab:blue", linewidth=2)
        axes.plot([how.middle], [place], "o", color="tab:blue")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [name for name, _ in reversed(lines)])
    axes.set_xlabel("rate of this pipeline over that of the other (1 = equal)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _ratios(chosen: Sequence[tuple[Workload, Setting, _ROUNDS]]) -> str:
    if not chosen:
        return "Nothing has been measured yet.\n"
    lines = [
        "## Ratios\n",
        "| workload | rows | pipeline over | min **median** max | rounds | target | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload, setting, groups in chosen:
        for contender, how, told in ratio_rows(workload, groups):
            target = _target(workload.targets.get(contender))
            lines.append(
                f"| {workload.name} | {setting.rows} | `{contender}` | {_bold(how)} | {how.rounds} "
                f"| {target or '-'} | {told} |"
            )
    lines.append("")
    lines += [f"- `{workload.name}`: {workload.describes}" for workload, _, _ in chosen]
    return "\n".join(lines) + "\n"


def _prefix_cache(groups: _ROUNDS) -> str:
    shuffled = cache_hits(groups.get(Contender.PIPELINE, {}))
    in_order = cache_hits(groups.get(Contender.PIPELINE_SORTED, {}))
    if shuffled is None or in_order is None:
        return ""
    hand = cache_hits(groups.get(Contender.LLM, {}))
    written = f"; `vllm-llm`, shuffled: {_bold(hand)}" if hand else ""
    return (
        "## Prefix cache\n\n"
        "Share of prompt tokens that the engine found in its cache (`cached_tokens` over "
        f"`prompt_tokens` of the records), on `prefixes`. This pipeline, rows shuffled: "
        f"{_bold(shuffled)}; the same rows sorted by prefix: {_bold(in_order)}{written}. Shuffled "
        f"over sorted, of the medians: **{shuffled.middle / in_order.middle:.3f}** "
        "(target 0.95).\n"
    )


def _ceiling(found: Mapping[str, Any]) -> str:
    """Rows a second and CPU by step with an engine that answers at once; memory of a long run."""
    costs = [found[name] for name in ("text", "images") if name in found]
    if not found:
        return ""
    lines = [
        "## The pipeline's own ceiling\n",
        "With an engine that answers at once (`python -m jobs.bench --workload null`).\n",
    ]
    if costs:
        lines += [
            "| rows | rows a second | target | CPU s per 1,000 rows, by step | whole | accounted |",
            "|---|---|---|---|---|---|",
        ]
    for cost in costs:
        name = cost["workload"]
        steps = cost["cpu_s_per_1000_rows"].items()
        told = ", ".join(f"{step} {seconds:.3f}" for step, seconds in steps)
        lines.append(
            f"| {cost['rows']:,} {name} | {cost['rows_per_s']:,} | >= {CEILINGS[name]:,} | {told} "
            f"| {cost['whole']:.3f} | {cost['accounted']:.0%} |"
        )
    if "memory" in found:
        memory = found["memory"]
        growth = memory["mib_per_100k_rows"].items()
        told = ", ".join(f"{kind} {mib:+.1f}" for kind, mib in growth)
        lines.append(
            f"\nMemory over {memory['rows']:,} rows, MiB grown per 100,000 rows after the first "
            f"quarter: {told}.\n\n![Memory]({MEMORY_PICTURE})"
        )
    return "\n".join(lines) + "\n"


def _not_run(names: Sequence[str]) -> str:
    if not names:
        return ""
    lines = ["## Not measured\n"]
    for name in names:
        workload = WORKLOADS[name]
        gpu = "; needs a GPU, and has not run" if workload.needs_gpu else ""
        lines.append(f"- `python -m jobs.bench --workload {name}`: {workload.describes}{gpu}")
    return "\n".join(lines) + "\n"


def _setup(settings: Iterable[Setting], measured: Sequence[Measurement]) -> str:
    if not measured:
        return ""
    lines = ["## On what\n"]
    lines += [
        f"- `{setting.workload}`: {setting.machine}; commit `{setting.code}`; "
        f"`python -m jobs.bench --workload {setting.workload} --rows {setting.rows}`"
        for setting in settings
    ]
    known = sorted({(name, value) for one in measured for name, value in one.versions.items()})
    lines.append("- versions: " + ", ".join(f"{name} {value}" for name, value in known))
    return "\n".join(lines) + "\n"


def _all(groups: _ROUNDS) -> list[Measurement]:
    return [one for rounds in groups.values() for one in rounds.values()]


def _bold(found: Spread) -> str:
    return f"{found.low:.3f} **{found.middle:.3f}** {found.high:.3f}"


def _plain(found: Spread) -> str:
    return f"{found.low:.2f} {found.middle:.2f} {found.high:.2f}"


def _target(target: float | None) -> str:
    return "" if target is None else f">= {target}"
