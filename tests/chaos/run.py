"""The long form: a run of the real job, real engine and real cluster, under fire; then a verdict.

    python -m tests.chaos.run --kills 30 --rows 2000 --seed 1 [--profile NAME] [--markdown FILE]

First the input is run undisturbed, then once more while everything is killed that can be. Exit
code 0: every promise was kept; 1: the table says which was not. ``make chaos`` runs it.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster.signals import unwind_on_termination
from pipeline.profile import load_profile
from tests.chaos.corpus import Poison, make_corpus
from tests.chaos.judge import Check
from tests.chaos.stage import Outcome, Setting, judge_run, no_survivors, set_stage
from tests.chaos.victims import ENGINES, WORKERS, Victim

_STRIKE_COLUMNS = ("kill", "at s", "victim", "progress after s", "tokens again", "beyond journal")
_CHECK_COLUMNS = ("promise", "kept", "seen")
console = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    given = _parse(arguments)
    unwind_on_termination()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tests.chaos").setLevel(logging.INFO)
    folder = given.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"logs: {folder}")
    outcome, totals = _run(given, _setting(given), folder)
    _show(outcome, totals)
    if given.markdown:
        given.markdown.write_text(to_markdown(outcome, totals))
    return 0 if outcome.passed else 1


def draw_victims(kills: int, kinds: Sequence[Victim], rng: Random) -> list[Victim]:
    """Each kind equally often (give or take one), in random order."""
    drawn = [kinds[number % len(kinds)] for number in range(kills)]
    rng.shuffle(drawn)
    return drawn


def kinds_for(profile: str) -> list[Victim]:
    """What can be killed: an engine of one rank has no worker processes."""
    many = load_profile(profile).ranks > 1
    return [kind for kind in Victim if many or kind not in WORKERS]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", default="mini-maverick")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=1, help="max_num_seqs: fewer is slower")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--faults", type=float, default=0.05, help="share of S3 requests")
    parser.add_argument("--journal-s", type=float, default=5.0, help="as in the job's limits")
    parser.add_argument("--limit", action="append", default=[], metavar="KEY=VALUE", help="YAML")
    parser.add_argument("--without", action="append", default=[], help="a kind of poison")
    parser.add_argument("--echo", type=float, metavar="S", help="the echo engine, S s per row")
    parser.add_argument("--argument", action="append", default=[], help="one more of the job's")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for logs; else a temporary one")
    return parser.parse_args(arguments)


def _setting(given: argparse.Namespace) -> Setting:
    poison = [kind for kind in Poison if kind not in given.without]
    limits = dict(limit.split("=", 1) for limit in given.limit)
    return Setting(
        corpus=make_corpus(given.rows, seed=given.seed, poison=poison),
        seed=given.seed,
        profile=given.profile,
        replicas=given.replicas,
        overrides={"max_num_seqs": given.sequences},
        limits={
            "shard_rows": given.shard_rows,
            **{key: yaml.safe_load(value) for key, value in limits.items()},
        },
        echo_delay_s=given.echo,
        arguments=tuple(given.argument),
    )


def _run(
    given: argparse.Namespace, setting: Setting, folder: Path
) -> tuple[Outcome, dict[str, Any]]:
    kinds = kinds_for(setting.profile)
    if setting.echo_delay_s is not None:
        kinds = [kind for kind in kinds if kind not in ENGINES]
    targets = draw_victims(given.kills, kinds, Random(setting.seed))
    survivors: list[str] = []
    with ExitStack() as stack:
        groups = stack.enter_context(no_survivors(survivors))
        stage = stack.enter_context(set_stage(setting, folder))
        reference = stage.play("reference", [])
        console.print(f"reference: exit codes {list(reference.exits)}")
        stage.proxy.set_share(given.faults)
        begun = time.monotonic()
        story = stage.play("disturbed", targets)
        minutes = (time.monotonic() - begun) / 60
        counts = stage.proxy.counts
        stage.proxy.set_share(0)
        outcome = judge_run(stage, story, wanted=given.kills, journal_s=given.journal_s)
        groups.append(stage.cluster.state.group)
        totals = {
            "minutes undisturbed": f"{(reference.ended - reference.started) / 60:.1f}",
            "minutes under fire": f"{minutes:.1f}",
            "starts of the job": len(story.exits),
            "S3 requests": _listed(counts),
            "rows": setting.corpus.rows,
            "tokens": sum({one.seed: one.completion_tokens for one in story.generations}.values()),
        }
    after = Check("no process after the end", not survivors, "; ".join(survivors) or "none")
    return Outcome(story, outcome.repeats, [*outcome.checks, after]), totals


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def strike_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One per kill; a repeat counts for the last kill before it."""
    story = outcome.story
    rows: list[tuple[str, ...]] = []
    ends = [*(strike.at for strike in story.strikes[1:]), math.inf][: len(story.strikes)]
    for number, (strike, end) in enumerate(zip(story.strikes, ends, strict=True)):
        again = [one for one in outcome.repeats if strike.at <= one.again_at < end]
        after = story.recovered_after(number)
        rows.append(
            (
                str(number + 1),
                f"{strike.at - story.started:.0f}",
                f"{strike.victim} ({strike.where})",
                "-" if after is None else f"{after:.1f}",
                str(sum(one.tokens for one in again)),
                str(sum(one.tokens for one in again if not one.excused)),
            )
        )
    return rows


def check_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One per promise."""
    return [(one.name, "yes" if one.passed else "NO", one.detail) for one in outcome.checks]


def to_markdown(outcome: Outcome, totals: dict[str, Any]) -> str:
    """The same tables, for docs."""
    facts = [(key, str(value)) for key, value in totals.items()]
    return "\n".join(
        [
            *_markdown(_STRIKE_COLUMNS, strike_rows(outcome)),
            "",
            *_markdown(_CHECK_COLUMNS, check_rows(outcome)),
            "",
            *_markdown(("total", ""), facts),
            "",
        ]
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in cells]


def _show(outcome: Outcome, totals: dict[str, Any]) -> None:
    for columns, rows in (
        (_STRIKE_COLUMNS, strike_rows(outcome)),
        (_CHECK_COLUMNS, check_rows(outcome)),
    ):
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for key, value in totals.items():
        console.print(f"{key}: {value}")
    console.print("every promise kept" if outcome.passed else "NOT every promise kept")


if __name__ == "__main__":
    sys.exit(main())
