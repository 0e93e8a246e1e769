"""The pictures of docs/simulation.md, as SVG: the same study gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from cluster.simulation.cluster import BUCKET_S, SimulatedRun
from cluster.simulation.scenarios import MOST_OVER_BOUND, Study

_WIDTH, _HEIGHT = 7.0, 3.4  # inches
_OURS, _FIFO, _GOAL = "#1f77b4", "#bbbbbb", "#d62728"
_TAIL_SHOWN = 0.12
"""Of the longer run, from its end."""


def draw(study: Study, folder: Path) -> list[str]:
    """Write all pictures to ``folder``; their file names."""
    mpl.rcParams["svg.hashsalt"] = "simulation"  # else ids are random
    pictures = {
        "simulation-scale.svg": _scale(study),
        "simulation-lengths.svg": _lengths(study),
        "simulation-tail.svg": _tail(study),
        "simulation-open-shards.svg": _open_shards(study),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / name, metadata={"Date": None})
    return list(pictures)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _scale(study: Study) -> Figure:
    figure, axes = _axes("Efficiency, log-normal lengths", "replicas", "of the replicas' best rate")
    places = range(len(study.scale))
    bars = ((-0.2, _OURS, 1), (0.2, _FIFO, 2))
    for shift, colour, index in bars:
        runs = [row[index] for row in study.scale]
        assert all(isinstance(run, SimulatedRun) for run in runs)
        heights = [run.efficiency for run in runs if isinstance(run, SimulatedRun)]
        label = "pipeline" if index == 1 else "FIFO, equal shards"
        drawn = axes.bar([p + shift for p in places], heights, 0.38, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.3f", fontsize=8)
    for place, (size, _, _) in zip(places, study.scale, strict=True):
        goal = size.least_efficiency
        axes.plot([place - 0.42, place + 0.42], [goal, goal], color=_GOAL, label="goal")
    axes.set_xticks(places, [str(size.replicas) for size, _, _ in study.scale])
    axes.set_ylim(0.8, 1.04)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[-3:], labels[-3:], ncols=3, fontsize=8)
    return figure


def _lengths(study: Study) -> Figure:
    replicas = study.lengths[0][0].replicas
    title = f"Efficiency by the length of a run, {replicas} replicas"
    figure, axes = _axes(title, "rows per replica", "of the replicas' best rate")
    counts = [ours.rows // ours.replicas for ours, _ in study.lengths]
    for index, colour in ((1, _FIFO), (0, _OURS)):
        runs: Sequence[SimulatedRun] = [pair[index] for pair in study.lengths]
        heights = [run.efficiency for run in runs]
        axes.plot(counts, heights, marker="o", color=colour, label=runs[0].policy)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_ylim(top=1.0)
    axes.legend(fontsize=8)
    return figure


def _tail(study: Study) -> Figure:
    figure, axes = _axes(
        f"The end of a run, {study.tail[0].workload}", "seconds", "sequences per replica"
    )
    ours, fifo = study.tail[0], study.tail[1]
    last = max(ours.makespan, fifo.makespan)
    for run, colour in ((fifo, _FIFO), (ours, _OURS)):
        times, running = _profile(run)
        axes.plot(times, running, color=colour, label=run.policy)
    axes.axvline(ours.bound, color=_GOAL, linestyle=":", label="lower bound")
    axes.set_xlim((1 - _TAIL_SHOWN) * last, 1.01 * last)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", fontsize=8)
    return figure


def _profile(run: SimulatedRun) -> tuple[list[float], list[float]]:
    buckets = range(int(run.makespan / BUCKET_S) + 1)
    running = [run.running.get(bucket, 0.0) / BUCKET_S / run.replicas for bucket in buckets]
    return [bucket * BUCKET_S for bucket in buckets], running


def _open_shards(study: Study) -> Figure:
    figure, axes = _axes("Shards open at a time", "open shards per replica", "makespan / bound")
    counts = sorted(study.open_shards)
    for index, colour in enumerate((_OURS, "#ff7f0e")):
        runs: Sequence[SimulatedRun] = [study.open_shards[count][index] for count in counts]
        heights = [run.over_bound for run in runs]
        axes.plot(counts, heights, marker="o", color=colour, label=runs[0].workload)
    axes.axhline(MOST_OVER_BOUND, color=_GOAL, linestyle=":", label="goal on log-normal lengths")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=1.0)
    axes.legend(fontsize=8)
    return figure
