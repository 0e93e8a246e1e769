"""docs/simulation.md: what is modelled, what came of it, and how to run it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from cluster.simulation.cluster import Churn, ClusterSpec
from cluster.simulation.driver import DriverTimes
from cluster.simulation.memory import DriverMemory
from cluster.simulation.policies import FIFO, PIPELINE
from cluster.simulation.scenarios import (
    GIVEN,
    LATE_S,
    MOST_OVER_BOUND,
    MOST_OVER_CHURN_BOUND,
    TIGHT,
    Study,
)
from cluster.simulation.validation import DriverCost, Validation

_TEMPLATE = Path(__file__).with_name("page.md.jinja")
_MOST_OFF = 0.15


def page(
    study: Study,
    driver: DriverTimes,
    memory: DriverMemory,
    validations: Sequence[Validation],
    flow: DriverCost | None,
    *,
    command: str,
    pictures: Sequence[str],
) -> str:
    """The page as Markdown."""
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        _TEMPLATE.read_text()
    )
    return template.render(
        command=command,
        pictures=pictures,
        engine=GIVEN,
        tight=TIGHT,
        curve=", ".join(f"{s * 1000:.0f} ms with {n}" for n, s in GIVEN.curve),
        spec=ClusterSpec(1, GIVEN),
        churn=Churn(),
        pipeline=PIPELINE,
        fifo=FIFO,
        scale=_scale(study),
        lengths=_lengths(study),
        length_replicas=study.lengths[0][0].replicas,
        tail=_tail(study),
        tail_replicas=study.tail[0].replicas,
        tail_verdict=_verdict(study.tail[0].over_bound <= MOST_OVER_BOUND),
        most_over_bound=MOST_OVER_BOUND,
        open_shards=_open_shards(study),
        late=_late(study),
        late_s=LATE_S,
        churn_table=_churn(study),
        churn_seeds=len(study.churn[0]),
        driver=driver,
        driver_table=_driver(driver),
        memory=memory,
        flow=flow,
        validation=_validation(validations) if validations else "",
    )


def _scale(study: Study) -> str:
    head = (
        *("replicas", "rows", "shards", "makespan", "makespan / bound", "efficiency", "goal"),
        *("FIFO's efficiency", "driver busy"),
    )
    rows = [
        (
            size.replicas,
            f"{ours.rows:,}",
            f"{ours.shards:,}",
            f"{ours.makespan:,.0f} s",
            f"{ours.over_bound:.3f}",
            f"**{ours.efficiency:.3f}**",
            f"{size.least_efficiency:.2f} {_verdict(ours.efficiency >= size.least_efficiency)}",
            f"{fifo.efficiency:.3f}",
            f"{ours.driver_s / ours.makespan:.1%}",
        )
        for size, ours, fifo in study.scale
    ]
    return _table(head, rows)


def _lengths(study: Study) -> str:
    head = ("rows per replica", "makespan", "makespan / bound", "FIFO's", "efficiency", "FIFO's")
    rows = [
        (
            f"{ours.rows // ours.replicas:,}",
            f"{ours.makespan:,.0f} s",
            f"{ours.over_bound:.3f}",
            f"{fifo.over_bound:.3f}",
            f"**{ours.efficiency:.3f}**",
            f"{fifo.efficiency:.3f}",
        )
        for ours, fifo in study.lengths
    ]
    return _table(head, rows)


def _tail(study: Study) -> str:
    head = (
        *("lengths", "engine", "rows", "makespan", "makespan / bound", "FIFO's"),
        *("rows preempted", "FIFO's"),
    )
    rows = [
        (
            ours.workload,
            ours.engine,
            f"{ours.rows:,}",
            f"{ours.makespan:,.0f} s",
            f"**{ours.over_bound:.3f}**",
            f"{fifo.over_bound:.3f}",
            f"{ours.preempted / ours.rows:.2%}",
            f"{fifo.preempted / fifo.rows:.2%}",
        )
        for ours, fifo in zip(study.tail[::2], study.tail[1::2], strict=True)
    ]
    return _table(head, rows)


def _open_shards(study: Study) -> str:
    first = next(iter(study.open_shards.values()))
    rows = [
        (f"{count} {label}", *(f"{run.over_bound:.3f}" for run in runs))
        for label, variants in (("open", study.open_shards), ("queued", study.queued_shards))
        for count, runs in variants.items()
    ]
    return _table(("shards per replica", *(run.workload for run in first)), rows)


def _late(study: Study) -> str:
    head = ("lengths", "rows per replica", "shards", "makespan", "makespan / bound", "FIFO's")
    rows = [
        (
            ours.workload,
            f"{ours.rows // ours.replicas:,}",
            ours.shards,
            f"{ours.makespan:,.0f} s",
            f"**{ours.over_bound:.3f}**",
            f"{fifo.over_bound:.3f}",
        )
        for ours, fifo in study.late
    ]
    return _table(head, rows)


def _churn(study: Study) -> str:
    head = (
        *("replicas", "rows", "makespan", "losses per run", "makespan / bound, mean", "worst"),
        *(f"goal {MOST_OVER_CHURN_BOUND:.2f}", "finished tokens made again, worst"),
    )
    rows = [
        (
            runs[0].replicas,
            f"{runs[0].rows:,}",
            f"{runs[0].makespan:,.0f} s",
            _span([len(run.losses) for run in runs]),
            f"{sum(run.over_bound for run in runs) / len(runs):.3f}",
            f"**{max(run.over_bound for run in runs):.3f}**",
            _verdict(max(run.over_bound for run in runs) <= MOST_OVER_CHURN_BOUND),
            f"{max(run.redone_tokens / run.tokens for run in runs):.3%}",
        )
        for runs in study.churn
    ]
    return _table(head, rows)


def _driver(driver: DriverTimes) -> str:
    steps = {
        "cut the plan": driver.plan_s,
        "save it": driver.save_s,
        "load it (resume)": driver.load_s,
        "list the parts (resume)": driver.listing_s,
        "read their footers (resume)": driver.footers_s,
        "totals": driver.totals_s,
    }
    rows = [(what, f"{driver.per_million(seconds):.2f} s") for what, seconds in steps.items()]
    return _table(("what", "CPU"), rows)


def _validation(validations: Sequence[Validation]) -> str:
    head = ("replicas", "rows", "shards", "real", "simulated", "simulated / real", "within 15 %")
    rows = [
        (
            each.replicas,
            f"{each.rows:,}",
            each.shards,
            f"{each.real_s:.1f} s",
            f"{each.simulated_s:.1f} s",
            f"**{each.ratio:.3f}**",
            _verdict(abs(each.ratio - 1) <= _MOST_OFF),
        )
        for each in validations
    ]
    return _table(head, rows)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least}-{most}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines: list[Sequence[object]] = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
